"""Plan an output that is an adapter: its tasks, config, card and tokenizer."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.adapter_config import base_id, rank_settings, target_settings
from adapterkit.core.adapter.factors import rank_and_scale
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS, canonical_key
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.fingerprint import metadata_with
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, Refused, Unrecoverable, shown
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.merge.sites import JoinedSite, levels_of
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.outputs.cards import plain
from adapterkit.core.outputs.folder_files import as_json, tokenizer_files
from adapterkit.core.plan import (
    Change,
    Files,
    Finalize,
    FromMetrics,
    OutputFile,
    Plan,
    Task,
    TaskResult,
    unchanged,
)
from adapterkit.core.records import Json
from adapterkit.core.tasks.common import CopiedTensor, FactorsTask, SummedTensor
from adapterkit.verbs.shared.options import ScaleOptions

# settings that a combined adapter inherits from the first one
INHERITED = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out",
    "target_parameters",
)  # fmt: skip


def sum_biases(
    sites: Mapping[str, JoinedSite],
    weight_of: Callable[[int, str], float],  # (adapter's number, module)
    dtype: str,
    errors: Problems,
    prefix: str = "",  # of the tasks' names
) -> list[SummedTensor]:
    """Tasks for the sum of the LoRAs' biases (lora_bias): Σ weight · scale · bias of each module,
    zeros if no adapter has one there; no tasks if no module has one.

    PEFT then gives every module a bias, and refuses embeddings and parameters: these join the
    errors."""
    terms = {
        name: tuple(
            (factors.bias, factors.scale * weight_of(number, factors.module))
            for number, factors in site.members.items()
            if factors.bias is not None
        )
        for name, site in sites.items()
    }
    if not any(terms.values()):
        return []
    levels = levels_of(sites.values())
    places = {name: site.place(levels) for name, site in sites.items()}
    for name, site in sites.items():
        if site.parameter or places[name].is_embedding:
            errors.add(
                f"{shown(name)} together with biases of b (lora_bias)",
                "linear layers and convolutions only: PEFT has no such bias on embeddings and "
                "parameters",
                "merge the adapters into their base instead, or remove the one with lora_bias",
                where="adapters",
                code="AK305",
            )
    return [
        SummedTensor(f"{prefix}{name} bias", places[name].bias_key, its, dtype, (places[name].out,))
        for name, its in terms.items()
    ]


@dataclass(frozen=True)
class Output:
    """One adapter that a job writes."""

    adapters: Sequence[Adapter]  # its sources; the first one's config sets the task
    tasks: Sequence[Task]
    # name of a task that makes factors -> their target: a module, or a parameter's full name
    modules: dict[str, str]
    settings: Json  # of its config, without ranks and scales
    summary: str  # for the card
    folder: str = ""  # inside the output
    # from the tasks in the file's order to `OutputFile.finalize`
    finalize: Callable[[Sequence[Task]], Finalize | None] | None = None
    # one lora_alpha for all, or by target; None: each one's rank, so that scales are 1
    alpha: float | Mapping[str, float] | None = None
    base_settings: Json | None = None  # the INHERITED ones without an adapter
    parameters: frozenset[str] = frozenset()  # targets that are parameters
    # modules among them, because their parameter is unknown
    unnamed: frozenset[str] = frozenset()
    tokenizer: str | None = None  # "base": none is copied from the adapters
    base_fingerprint: str | None = None  # without an adapter

    def inside(self, name: str) -> str:
        """A file's name in the output."""
        return f"{self.folder}/{name}" if self.folder else name

    def shard(self) -> OutputFile:
        """Its file of weights; `Refused` if the tasks' ranks cannot be finalized."""
        # the wider dtype first, so that no tensor is misaligned
        ordered = sorted(
            self.tasks,
            key=lambda task: -max((dtypes.BITS[s.dtype] for s in task.max_outputs), default=0),
        )
        counts = Counter(self.modules.values())
        pairs = {target for target, count in counts.items() if count > 1} - self.parameters
        if pairs and self.finalize:
            raise Refused(
                f"--max-size with MultiheadAttention ({shown(min(pairs))})",
                expected="a rank or an energy: both projections have one rank",
                where="options",
                hint="give --rank or --energy",
                code="AK108",
            )
        finalize = None
        if self.finalize:
            finalize = self.finalize(ordered)
        elif pairs:
            targets = (self.modules.get(task.name) for task in ordered)
            homes = [target if target in pairs else None for target in targets]
            finalize = partial(_pad_pairs, ordered, homes)
        fingerprints = {adapter.base_fingerprint for adapter in self.adapters}
        made_for = fingerprints.pop() if len(fingerprints) == 1 else None
        metadata = metadata_with(made_for or self.base_fingerprint)
        return OutputFile.computed(self.inside(WEIGHTS), ordered, metadata, finalize=finalize)

    def files(self, notes: list[str]) -> Files:
        """Its other files; a tokenizer among them joins the notes."""
        files: Files = {**tokenizer_files(list(self.adapters), self.tokenizer, notes)}
        receipt = "../" * bool(self.folder) + RECEIPT
        from adapterkit.adapters.formats.engines import adapter_card

        card = adapter_card(self.base(), self.adapters, self.summary, receipt)
        files["README.md"] = card.encode()
        files[CONFIG] = FromMetrics(self.config)
        return {self.inside(name): file for name, file in files.items()}

    def base(self) -> str | None:
        """The Hub id of its base, if known."""
        if self.adapters:
            return base_id(self.adapters[0])
        return (self.base_settings or {}).get("base_model_name_or_path")

    def config(self, metrics: dict[str, dict], grown: int = 0) -> bytes:
        """adapter_config.json for the ranks in the metrics; `Unrecoverable` if two parameters of
        one target have different ones."""

        from adapterkit.adapters.formats.peft.expert_order import in_order_of_peft

        inherited = self.base_settings
        if inherited is None:
            first = self.adapters[0].config
            inherited = {key: value for key, value in first.items() if key in INHERITED}
        by_target: dict[str, int] = {}
        alphas: dict[str, float] = {}  # of tasks with a rank
        for name, target in self.modules.items():
            rank = metrics.get(name, {}).get("rank")
            if "alpha" in metrics.get(name, {}):
                alphas[target] = metrics[name]["alpha"]
            if rank is not None and by_target.setdefault(target, rank) != rank:
                raise Unrecoverable(
                    f"ranks {by_target[target]} and {rank} for two parameters of {shown(target)}",
                    expected="one for both",
                    where=self.inside(CONFIG),
                    hint="give --rank, or --base",
                    code="AK108",
                )
        config = inherited | self.settings | {"base_model_name_or_path": self.base()}
        config |= target_settings(self.adapters, sorted(by_target.keys() - self.parameters))
        config |= rank_settings(by_target, alphas or self.alpha, self.unnamed)
        return as_json(in_order_of_peft(config))


def _pad_pairs(
    tasks: Sequence[Task], homes: Sequence[str | None], metrics: list[dict]
) -> list[Change]:
    """Bring both projections of a MultiheadAttention to one rank, because PEFT has one pattern for
    them. `homes`: the attention of each."""
    ranks: dict[str, int] = {}
    for home, metric in zip(homes, metrics, strict=True):
        if home is not None:
            ranks[home] = max(ranks.get(home, 0), metric["rank"])
    return [
        unchanged if home is None else partial(_pad_factors, cast(FactorsTask, task), ranks[home])
        for task, home in zip(tasks, homes, strict=True)
    ]


def _pad_factors(task: FactorsTask, rank: int, result: TaskResult) -> TaskResult:
    """The factors, zero-padded up to `rank`."""
    import torch

    a, b = task.place.pair(result.tensors)
    more = rank - len(a)
    if not more:
        return result
    a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(len(b), more)], 1)
    return TaskResult(task.place.keyed(a, b), result.metrics | {"rank": rank})


def plan_adapters(
    verb: str,
    options: Json,
    inputs: Sequence[Adapter | Checkpoint],
    outputs: Sequence[Output],
    notes: list[str],
    decisions: Json,
) -> Plan:
    """The plan of adapters made from the inputs, numbered from 0: adapters, models, statistics."""
    adapters = [one for one in inputs if isinstance(one, Adapter)]
    bases = sorted({plain(str(one.base_change or base_id(one))) for one in adapters})
    if len(bases) > 1:
        notes.append(f"the adapters were trained on different bases: {', '.join(bases)}")
    files: Files = {}
    for output in outputs:
        files |= output.files(notes)
    return plan_of(
        verb,
        options,
        inputs,
        shards=[output.shard() for output in outputs],
        files=files,
        decisions=decisions,
        notes=notes,
    )


def modules_of(adapters: Sequence[Adapter]) -> list[Json]:
    """A receipt's entries for adapters: their names, and the number of modules with factors."""
    return [{"name": adapter.name, "modules": len(adapter.loras)} for adapter in adapters]


def settings_of(adapter: Adapter) -> Json:
    """The settings of an output with an adapter's flags and values, but other factors."""
    kept = adapter_config.value_settings([adapter]) | adapter_config.flags(adapter)
    return adapter_config.plain_settings() | kept


def check_factors(tasks: Sequence[Task], where: str) -> None:
    """`Refused` for inputs without any factors."""
    if not tasks:
        expected, hint = "adapters of low-rank factors", "check the adapters"
        raise Refused(
            "no module with factors", expected=expected, where=where, hint=hint, code="AK105"
        )


def copy_all_but_factors(adapter: Adapter, dtype: str) -> list[Task]:
    """Tasks for an adapter's other values: biases of b in `dtype` with the scale folded in, the
    rest byte for byte."""
    tasks: list[Task] = []
    for lora in adapter.loras:
        if lora.bias is not None:
            terms = ((lora.bias, rank_and_scale(adapter, lora, None)[1]),)
            name, key = f"{lora.module} bias", canonical_key(lora.bias.key)
            tasks.append(SummedTensor(name, key, terms, dtype, lora.bias.shape))
        if lora.magnitude is not None:
            tasks.append(_copy(lora.magnitude))
    values = [*adapter.replaced.values(), *(tokens.values for tokens in adapter.tokens)]
    return [*tasks, *map(_copy, values)]


def _copy(spec: TensorSpec) -> CopiedTensor:
    """A task that copies a tensor of an adapter under PEFT's own key."""
    key = canonical_key(spec.key)
    return CopiedTensor(key, spec, key, checked=True)


def new_adapter(
    base: Checkpoint,
    factors: Sequence[Task],
    options: ScaleOptions,
    summary: str,
    folder: str = "",
    fingerprint: str | None = None,
) -> Output:
    """The output of factors made from this base, with the fingerprint."""
    return Output(
        adapters=[],
        tasks=factors,
        modules={task.name: task.name for task in factors},
        settings=adapter_config.plain_settings() | {"use_rslora": options.rslora},
        summary=summary,
        folder=folder,
        alpha=options.lora_alpha,
        base_settings={
            "base_model_name_or_path": adapter_config.hub_id(base.folder),
            "task_type": adapter_config.task_type(base.config),
        },
        base_fingerprint=fingerprint,
    )
