"""The plan of an output that is an adapter: its tasks, config, card and tokenizer."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from adapterkit import dtypes
from adapterkit.adapters.factors import rank_and_scale
from adapterkit.adapters.keys import CONFIG, WEIGHTS, canonical
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, Unrecoverable, shown
from adapterkit.plan import (
    Change,
    Computed,
    CopyFile,
    Finalize,
    FromMetrics,
    Plan,
    Task,
    TaskResult,
    unchanged,
)
from adapterkit.planning.adapter_config import base_id, ranks, targets
from adapterkit.planning.cards import adapter_card, cell
from adapterkit.planning.folder_files import as_json
from adapterkit.planning.input_files import headers_of, identities, model_headers
from adapterkit.planning.sites import Site, levels_of
from adapterkit.planning.tokenizer_files import tokenizer_files
from adapterkit.tasks.common import CopiedTensor, SummedTensor

if TYPE_CHECKING:
    from torch import Tensor


# What an adapter that is the sum of others takes over from the first of them
KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "fan_in_fan_out",
    "target_parameters",
)


def added_biases(
    joined: Mapping[str, Site],
    weight_of: Callable[[int, str], float],  # (adapter's number, module)
    dtype: str,
    errors: list[AdapterkitError],
    prefix: str = "",
) -> list[SummedTensor]:
    """The biases that LoRAs add (lora_bias): Σ weight · scale · bias of each module, zeros where no adapter has one.

    PEFT gives every module a bias then, and refuses embeddings and parameters beside them.
    """
    terms = {
        name: tuple(
            (x.bias, f.scale * weight_of(n, x.module))
            for n, (x, f) in site.members.items()
            if x.bias is not None
        )
        for name, site in joined.items()
    }
    if not any(terms.values()):
        return []
    levels = levels_of(joined.values())
    places = {name: site.place(levels) for name, site in joined.items()}
    errors += [
        Refused(
            f"{shown(name)} beside biases of b (lora_bias)",
            expected="linear layers and convolutions only: PEFT has no such bias on embeddings and parameters",
            where="adapters",
            hint="merge the adapters into their base instead, or leave the one with lora_bias out",
        )
        for name, site in joined.items()
        if site.parameter or places[name].is_embedding
    ]
    return [
        SummedTensor(f"{prefix}{name} bias", places[name].bias_key, its, dtype, (places[name].out,))
        for name, its in terms.items()
    ]


@dataclass(frozen=True)
class Output:
    """One adapter that a job writes: `tasks` make its tensors, `settings` go into its config, ranks and scales are filled in once
    they are known."""

    adapters: Sequence[Adapter]  # what it is made from; the first one's config says what it is for
    tasks: Sequence[Task]
    modules: dict[
        str, str
    ]  # task name -> the target whose factors it makes: a module, or a parameter's full name
    settings: dict[str, Any]
    summary: str
    folder: str = ""  # inside the output
    # from the tasks in the file's order to `Computed.finalize`
    finalize: Callable[[Sequence[Task]], Finalize | None] | None = None
    alpha: float | None = (
        None  # one lora_alpha for all modules; None: each one's rank, so that every scale is 1
    )
    kept: dict[str, Any] | None = (
        None  # where there is no adapter: what the config says of the base
    )
    parameters: frozenset[str] = frozenset()  # targets that are parameters
    unnamed: frozenset[str] = (
        frozenset()
    )  # those of them that are modules: which of their parameters it is was not known
    tokenizer: str | None = None  # "base": none is copied from the adapters

    def inside(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def shard(self) -> Computed:
        # the wider dtype first, so that no tensor is misaligned
        ordered = sorted(
            self.tasks,
            key=lambda task: -max((dtypes.BITS[s.dtype] for s in task.max_outputs), default=0),
        )
        pairs = {
            t for t, count in Counter(self.modules.values()).items() if count > 1
        } - self.parameters
        if pairs and self.finalize:
            found, hint = (
                f"--max-size with MultiheadAttention ({shown(min(pairs))})",
                "give --rank or --energy",
            )
            raise Refused(
                found,
                expected="a rank or an energy: both projections have one rank",
                where="options",
                hint=hint,
            )
        finalize = (
            self.finalize(ordered)
            if self.finalize
            else _finalize_pairs(ordered, self.modules, pairs)
            if pairs
            else None
        )
        return Computed(self.inside(WEIGHTS), tuple(ordered), finalize=finalize)

    def files(self, notes: list[str]) -> dict[str, bytes | CopyFile | FromMetrics]:
        files: dict[str, bytes | CopyFile | FromMetrics] = {}
        for name, copy in tokenizer_files(list(self.adapters), self.tokenizer, notes).items():
            files[self.inside(name)] = copy
        files[self.inside("README.md")] = adapter_card(
            self.base(), self.adapters, self.summary
        ).encode()
        files[self.inside(CONFIG)] = FromMetrics(self.config)
        return files

    def base(self) -> str | None:
        return (
            base_id(self.adapters[0])
            if self.adapters
            else (self.kept or {}).get("base_model_name_or_path")
        )

    def config(self, metrics: dict[str, dict], grown: int = 0) -> bytes:
        """adapter_config.json for the ranks that came out."""
        kept = (
            self.kept
            if self.kept is not None
            else {k: v for k, v in self.adapters[0].config.items() if k in KEPT}
        )
        found: dict[str, int] = {}
        for name, module in self.modules.items():
            rank = metrics.get(name, {}).get("rank")
            if rank is not None and found.setdefault(module, rank) != rank:
                found_ranks = (
                    f"ranks {found[module]} and {rank} for two parameters of {shown(module)}"
                )
                raise Unrecoverable(
                    found_ranks,
                    expected="one for both",
                    where=self.inside(CONFIG),
                    hint="give --rank, or --base",
                )
        config = kept | self.settings | {"base_model_name_or_path": self.base()}
        plain = sorted(found.keys() - self.parameters)
        return as_json(
            config | targets(self.adapters, plain) | ranks(found, self.alpha, self.unnamed)
        )


def _finalize_pairs(
    tasks: Sequence[Task], modules: dict[str, str], pairs: Collection[str]
) -> Finalize:
    """Bring both projections of a MultiheadAttention to one rank: PEFT has one pattern for them."""
    homes = [target if (target := modules.get(task.name)) in pairs else None for task in tasks]
    return partial(_pad_pairs, tasks, homes)


def _pad_pairs(
    tasks: Sequence[Task], homes: Sequence[str | None], metrics: list[dict]
) -> list[Change]:
    ranks: dict[str, int] = {}
    for home, metric in zip(homes, metrics, strict=True):
        if home is not None:
            ranks[home] = max(ranks.get(home, 0), metric["rank"])
    return [
        unchanged if home is None else partial(_pad_factors, task, ranks[home])
        for task, home in zip(tasks, homes, strict=True)
    ]


def _pad_factors(task: Any, rank: int, result: TaskResult) -> TaskResult:
    """The factors with zeros up to `rank`."""
    import torch

    a, b = (cast("Tensor", result.tensors[key]) for key in (task.place.a_key, task.place.b_key))
    more = rank - len(a)
    if not more:
        return result
    tensors = {
        task.place.a_key: torch.cat([a, a.new_zeros(more, *a.shape[1:])]),
        task.place.b_key: torch.cat([b, b.new_zeros(len(b), more)], 1),
    }
    return TaskResult(tensors, result.metrics | {"rank": rank})


def adapter_plan(
    verb: str,
    options: dict[str, Any],
    inputs: Sequence[Adapter],
    outputs: Sequence[Output],
    notes: list[str],
    decisions: dict[str, Any],
    base: Checkpoint | None = None,
) -> Plan:
    """A plan that writes adapters, made from the adapters `inputs`, numbered from 0, and a base behind them."""
    _one_base(inputs, notes)
    folders, headers, count = tuple(a.folder for a in inputs), headers_of(inputs), len(inputs)
    if base is None:
        return output_plan(verb, options, folders, headers, outputs, notes, decisions)
    headers |= model_headers(base, count)
    return output_plan(
        verb, options, (*folders, base.folder), headers, outputs, notes, decisions, (count,)
    )


def output_plan(
    verb: str,
    options: dict[str, Any],
    folders: tuple[Folder, ...],
    headers: dict[tuple[int, str], str],
    outputs: Sequence[Output],
    notes: list[str],
    decisions: dict[str, Any],
    models: tuple[int, ...] = (),
) -> Plan:
    """A plan that writes adapters, made from these folders."""
    files: dict[str, bytes | CopyFile | FromMetrics] = {}
    for output in outputs:
        files |= output.files(notes)
    shards = tuple(output.shard() for output in outputs)
    return Plan(
        verb,
        options,
        folders,
        headers,
        identities(folders, headers),
        shards,
        files,
        decisions,
        tuple(notes),
        models,
    )


def _one_base(adapters: Iterable[Adapter], notes: list[str]) -> None:
    bases = {str(base_id(a)) for a in adapters}
    if len(bases) > 1:
        notes.append(f"the adapters name {len(bases)} bases: {', '.join(sorted(map(cell, bases)))}")


def beside_factors(adapter: Adapter, dtype: str) -> list[Task]:
    """All that an adapter holds besides its factors: biases of b with the scale folded in, the rest byte for byte."""
    tasks: list[Task] = []
    for lora in adapter.loras:
        if lora.bias is not None:
            terms = ((lora.bias, rank_and_scale(adapter, lora, None)[1]),)
            tasks.append(
                SummedTensor(
                    f"{lora.module} bias", canonical(lora.bias.key), terms, dtype, lora.bias.shape
                )
            )
        if lora.magnitude is not None:
            tasks.append(_copy(lora.magnitude))
    whole = [*adapter.replaced.values(), *(tokens.values for tokens in adapter.tokens)]
    return [*tasks, *map(_copy, whole)]


def _copy(spec: TensorSpec) -> CopiedTensor:
    """A tensor of an adapter under PEFT's own key for it."""
    key = canonical(spec.key)
    return CopiedTensor(key, spec, key, checked=True)


def check_refit(rank: int | None, energy: float | None) -> None:
    """`Refused` for a rank and a share of the energy together."""
    if rank is not None and energy is not None:
        raise Refused(
            "--rank and --energy", expected="one of them", where="options", hint="leave one out"
        )
