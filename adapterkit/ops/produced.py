"""What every verb that writes an adapter shares: its config, its card, tensors taken over as they are, ranks that came out."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit import __version__, dtypes
from adapterkit.adapter import CONFIG, WEIGHTS, Adapter, canonical, inside
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.hashes import sha256_of_small_file
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.stage import RECEIPT
from adapterkit.errors import AdapterkitError, Refused, Unrecoverable, shown
from adapterkit.factors import Place, rank_and_scale
from adapterkit.ops.packaging import as_json, cell, check_output_apart, hub_or_name, tokenizer_files
from adapterkit.ops.sites import Site, levels_of
from adapterkit.options import parse_size
from adapterkit.plan import (
    Computed,
    CopyFile,
    FromMetrics,
    Inputs,
    Plan,
    Receipt,
    Task,
    TaskResult,
    identities,
    run,
)

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # elements that are summed at a time
# What an adapter that is the sum of others takes over from the first of them
KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "fan_in_fan_out",
    "target_parameters",
)


@dataclass(frozen=True)
class Taken:
    """One tensor of an input, byte for byte."""

    source: TensorSpec
    key: str
    prefix: str = ""  # of its name in the receipt

    @property
    def name(self) -> str:
        return self.prefix + self.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, self.source.dtype, self.source.shape),)

    @property
    def memory(self) -> int:
        return 2 * self.source.nbytes

    def compute(self, inputs: Inputs) -> TaskResult:
        import torch

        data, dtype = inputs.bytes(self.source), dtypes.torch_dtype(self.source.dtype)
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return TaskResult({self.key: tensor.view(self.source.shape)}, {"taken": True})


def taken(source: TensorSpec, prefix: str = "") -> Taken:
    """A tensor of an adapter, under PEFT's own key for it."""
    return Taken(source, canonical(source.key), prefix)


@dataclass(frozen=True)
class Summed:
    """One tensor that is a sum of others: Σ scale · value, in float64, rounded once. Biases of b are, and averages of trained
    values."""

    name: str
    key: str
    terms: tuple[tuple[TensorSpec, float], ...]  # none: zeros
    dtype: str
    shape: tuple[int, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec, _ in self.terms)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, self.dtype, self.shape),)

    @property
    def memory(self) -> int:
        return 12 * sum(math.prod(spec.shape) for spec in self.reads)

    def compute(self, inputs: Inputs) -> TaskResult:
        import torch

        values = [(inputs.tensor(spec).view(-1), scale) for spec, scale in self.terms]
        out = torch.empty(self.shape, dtype=dtypes.torch_dtype(self.dtype))
        for first in range(0, out.numel(), BLOCK):
            here = slice(first, first + BLOCK)
            out.view(-1)[here] = sum(value[here].double() * scale for value, scale in values)
        return TaskResult({self.key: out}, {})


def added_biases(
    joined: Mapping[str, Site],
    weight_of: Callable[[int, str], float],  # (adapter's number, module)
    dtype: str,
    errors: list[AdapterkitError],
    prefix: str = "",
) -> list[Summed]:
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
        Summed(f"{prefix}{name} bias", places[name].bias_key, its, dtype, (places[name].out,))
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
    finalize: Callable[[Sequence[Task]], Any] | None = (
        None  # from the tasks in the file's order to `Computed.settle`
    )
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
            else _one_rank(ordered, self.modules, pairs)
            if pairs
            else None
        )
        return Computed(self.inside(WEIGHTS), tuple(ordered), finalize=finalize)

    def files(self, notes: list[str]) -> dict[str, bytes | CopyFile | FromMetrics]:
        files: dict[str, bytes | CopyFile | FromMetrics] = {}
        for name, copy in tokenizer_files(list(self.adapters), self.tokenizer, notes).items():
            files[self.inside(name)] = copy
        files[self.inside("README.md")] = card(self.base(), self.adapters, self.summary).encode()
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


def _one_rank(
    tasks: Sequence[Task], modules: dict[str, str], pairs: Collection[str]
) -> Callable[[list[dict]], list]:
    """Zeros that bring both projections of a MultiheadAttention to one rank: PEFT has one pattern for them."""
    homes = [target if (target := modules.get(task.name)) in pairs else None for task in tasks]

    def finalize(metrics: list[dict]) -> list[Callable[[TaskResult], TaskResult]]:
        most = {
            home: max(f["rank"] for f, h in zip(metrics, homes, strict=True) if h == home)
            for home in pairs
        }
        return [
            (lambda made: made) if home is None else _grown(task, most[home])
            for task, home in zip(tasks, homes, strict=True)
        ]

    return finalize


def _grown(task: Any, rank: int) -> Callable[[TaskResult], TaskResult]:
    def change(made: TaskResult) -> TaskResult:
        import torch

        a, b = (cast("Tensor", made.tensors[key]) for key in (task.place.a_key, task.place.b_key))
        more = rank - len(a)
        if not more:
            return made
        tensors = {
            task.place.a_key: torch.cat([a, a.new_zeros(more, *a.shape[1:])]),
            task.place.b_key: torch.cat([b, b.new_zeros(len(b), more)], 1),
        }
        return TaskResult(tensors, made.metrics | {"rank": rank})

    return change


def adapter_plan(
    verb: str,
    options: dict[str, Any],
    inputs: Sequence[Adapter],
    outputs: Sequence[Output],
    notes: list[str],
    metrics: dict[str, Any],
    base: Checkpoint | None = None,
) -> Plan:
    """A plan that writes adapters, made from the adapters `inputs`, numbered from 0, and a base behind them."""
    _one_base(inputs, notes)
    folders, headers, count = tuple(a.folder for a in inputs), headers_of(inputs), len(inputs)
    if base is None:
        return output_plan(verb, options, folders, headers, outputs, notes, metrics)
    headers |= model_headers(base, count)
    return output_plan(
        verb, options, (*folders, base.folder), headers, outputs, notes, metrics, (count,)
    )


def output_plan(
    verb: str,
    options: dict[str, Any],
    folders: tuple[Folder, ...],
    headers: dict[tuple[int, str], str],
    outputs: Sequence[Output],
    notes: list[str],
    metrics: dict[str, Any],
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
        metrics,
        tuple(notes),
        models,
    )


def headers_of(adapters: Sequence[Adapter]) -> dict[tuple[int, str], str]:
    """The hashes of the adapters' headers and configs, by which a plan knows its inputs."""
    headers = {}
    for adapter in adapters:
        headers[adapter.number, WEIGHTS] = adapter.header_sha256
        headers[adapter.number, CONFIG] = sha256_of_small_file(adapter.folder, CONFIG)
    return headers


def model_headers(model: Checkpoint, number: int) -> dict[tuple[int, str], str]:
    """The hashes of the headers of the model that is input `number`."""
    return {(number, name): header.sha256 for name, header in model.shards.items()}


def plain_settings() -> dict[str, Any]:
    """The config of a LoRA of scale 1, as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def targets(adapters: Sequence[Adapter], modules: list[str]) -> dict[str, Any]:
    """target_modules that mean the written modules and no others: the inputs' own list where all have the same modules and list,
    else their full names. Parameters are named as the inputs name them (`target_parameters`)."""
    named = {target for a in adapters for target in a.config.get("target_parameters") or []}
    if named:
        version = (
            {"peft_version": adapters[0].config["peft_version"]}
            if "peft_version" in adapters[0].config
            else {}
        )
        return {
            "target_modules": modules,
            "target_parameters": sorted(named),
            **version,
        }  # the layout of stacks goes by the version
    lists = [a.config.get("target_modules") for a in adapters]
    more = (
        "layers_to_transform",
        "exclude_modules",
        "ensure_weight_tying",
    )  # what else decides which modules a list means
    narrowed = any(a.config.get(key) for a in adapters for key in more)
    same = bool(adapters) and all(
        {a.attention(lora) or lora.module for lora in a.loras} == set(modules) for a in adapters
    )
    if (
        same
        and not narrowed
        and all(isinstance(t, list) and set(t) == set(lists[0] or ()) for t in lists)
    ):
        return {"target_modules": sorted(lists[0] or ())}
    return {"target_modules": modules}


def ranks(
    found: dict[str, int], alpha: float | None = None, unnamed: Collection[str] = ()
) -> dict[str, Any]:
    """r, lora_alpha and the patterns for each target's rank: the commonest is r, the others are anchored patterns.

    A pattern is held against a parameter's own name where that is the target; `unnamed` are modules of such parameters."""
    common = Counter(found.values()).most_common(1)[0][0] if found else 8
    name = lambda target: f"^{target}" + r"(\.\w+)?" * (target in unnamed)
    pattern = {name(target): rank for target, rank in found.items() if rank != common}
    alphas = (
        {"lora_alpha": common, "alpha_pattern": dict(pattern)}
        if alpha is None
        else {"lora_alpha": alpha, "alpha_pattern": {}}
    )
    return {"r": common, "rank_pattern": pattern, **alphas}


def bounds(place: Place, rank: int, dtype: str) -> tuple[Stored, ...]:
    """What a module's factors take at most."""
    a, b = place.shapes(rank)
    return Stored(place.a_key, dtype, a), Stored(place.b_key, dtype, b)


def task_type(config: dict, saved: Collection[str] = ()) -> str | None:
    """PEFT's task type for a model of this config; for classifiers only where the head is among the `saved` modules: by their type
    PEFT takes it for one, and looks for its weights."""
    names = " ".join(map(str, config.get("architectures") or ()))
    if "ForCausalLM" in names:
        return "CAUSAL_LM"
    known = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    heads = {"classifier", "score"} & {module.rpartition(".")[2] for module in saved}
    return next((task for word, task in known.items() if word in names and heads), None)


def hub_id(folder: Folder) -> str | None:
    """The Hub's id of a folder, where it has one."""
    found = folder.origin.get("repo")
    return str(found) if found else None


def base_id(adapter: Adapter) -> str | None:
    """The base's id that an adapter's config names; a path of the machine it was trained on is of no use to others."""
    base = adapter.config.get("base_model_name_or_path")
    return (
        base
        if isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and base[0] != "."
        else None
    )


def _one_base(adapters: Iterable[Adapter], notes: list[str]) -> None:
    bases = {str(base_id(a)) for a in adapters}
    if len(bases) > 1:
        notes.append(f"the adapters name {len(bases)} bases: {', '.join(sorted(map(cell, bases)))}")


def card(base: str | None, adapters: Sequence[Adapter], summary: str) -> str:
    """A README.md with the Hub's metadata for an adapter; names of inputs are quoted, nothing of them is interpreted."""
    header = ["---", *([f"base_model: {json.dumps(base)}"] if base else [])]
    header += ["library_name: peft", "tags:", "- lora", "- adapterkit", "---", ""]
    body = [
        "# Adapter",
        "",
        f"Made by adapterkit {__version__} from the files: {cell(summary)}.",
        "",
    ]
    body += ["From:", ""] if adapters else []
    body += [f"- {cell(hub_or_name(a.folder))}" for a in adapters]
    body += [
        "",
        f"What was done to each module, and the hash of every file, stands in `{RECEIPT}`.",
        "",
    ]
    return "\n".join(header + body)


def extras(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the config must say of values taken over whole: trained modules, token rows, biases."""
    heads = {m for a in adapters for m in a.saved if any(inside(name, m) for name in a.replaced)}
    saved = sorted(heads.union(*(a.config.get("modules_to_save") or [] for a in adapters)))
    tokens = next((a.config["trainable_token_indices"] for a in adapters if a.tokens), None)
    biases = {a.config.get("bias", "none") for a in adapters} - {"none", None}
    found: dict[str, Any] = {
        "modules_to_save": saved or None,
        "bias": "all" if len(biases) > 1 else next(iter(biases), "none"),
    }
    return found | ({"trainable_token_indices": tokens} if tokens else {})


def carry_out(
    plan: Plan,
    out: str | os.PathLike,
    *,
    engine: str,
    device: str,
    memory: str | int | None,
    dry_run: bool,
    **how: Any,
) -> Receipt | Plan:
    """Run a plan on the engine of that name, into an output apart from its inputs; with `dry_run` give it back."""
    check_output_apart(Path(out), plan.folders)
    plan = replace(plan, memory=parse_size("memory", memory) if memory else None)
    if dry_run:
        return plan
    if engine != "local":
        raise Refused(
            f"engine {engine!r}", expected="local", where="--engine", hint="leave --engine out"
        )
    from adapterkit.engines.local import local

    return run(plan, Path(out), local(device), **how)


def flags(adapter: Adapter) -> dict[str, Any]:
    """The config's flags of what stays as it is beside new factors."""
    return {
        key: bool(adapter.config.get(key))
        for key in ("use_dora", "lora_bias", "ensure_weight_tying")
    }


def beside_factors(adapter: Adapter, dtype: str) -> list[Task]:
    """All that an adapter holds besides its factors: biases of b with the scale folded in, the rest byte for byte."""
    tasks: list[Task] = []
    for lora in adapter.loras:
        if lora.bias is not None:
            terms = ((lora.bias, rank_and_scale(adapter, lora, None)[1]),)
            tasks.append(
                Summed(
                    f"{lora.module} bias", canonical(lora.bias.key), terms, dtype, lora.bias.shape
                )
            )
        if lora.magnitude is not None:
            tasks.append(taken(lora.magnitude))
    whole = [*adapter.replaced.values(), *(tokens.values for tokens in adapter.tokens)]
    return [*tasks, *map(taken, whole)]


def check_refit(rank: int | None, energy: float | None) -> None:
    """`Refused` for a rank and a share of the energy together."""
    if rank is not None and energy is not None:
        raise Refused(
            "--rank and --energy", expected="one of them", where="options", hint="leave one out"
        )
