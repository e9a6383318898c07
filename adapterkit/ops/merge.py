"""merge: adapters into a base, W' = round(W + Σ weight·scale·b@a), streamed from files to files.

The planner asks the names which parameter each adapted module is, cuts the edit onto the stored tensors, and refuses all that does
not fit before anything is written.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterkit import dtypes
from adapterkit.adapter import Adapter, Lora, read_adapter
from adapterkit.checkpoint import layout
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import ShardLayout, Stored
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.edits import AddLikePeft, AddLowRank, AddVector, Decompose, Edit
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.ops import packaging
from adapterkit.ops.replication import replicated
from adapterkit.ops.sources import open_source, weighted
from adapterkit.patterns import matcher
from adapterkit.placement import (
    Product,
    grid_rows,
    place_magnitude,
    place_product,
    place_rows,
    place_value,
    place_vector,
)
from adapterkit.plan import Plan, Progress, Receipt, Shard, Step, identities, run
from adapterkit.weights.names import Names, Parameter
from adapterkit.weights.quantised import check_not_quantised

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LAYOUTS = ("peft-0.18", "peft-0.19")


@dataclass(frozen=True)
class Options:
    """What a merge can be told. Fields are the command's options."""

    dtype: str | None = None
    max_shard_size: str | None = None
    include: str | None = None
    exclude: str | None = None
    tied: str = "untie"
    base_is_residual: bool = False
    compat: str | None = None
    expert_layout: str | None = None
    tokenizer: str | None = None


def merge(
    base: str | os.PathLike,
    adapters: Iterable[str | os.PathLike],
    *,
    out: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    tied: str = "untie",
    base_is_residual: bool = False,
    compat: str | None = None,
    expert_layout: str | None = None,
    tokenizer: str | None = None,
    hash: str = "sha256",
    verify: bool = False,
    push: str | None = None,
    device: str = "auto",
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a), each weight rounded once.

    `base` and each adapter are a folder or a Hub id; an adapter may carry a weight, `PATH=0.7`. Writes the folder `out`: a complete
    checkpoint in the base's own layout with a receipt (`adapterkit.json`). Arithmetic is float32. Returns the receipt, or with
    `dry_run` the plan. Raises `Refused` before anything is written and `Failed` after; see the errors' texts for the way out.

    Unlike PEFT's `merge_and_unload` several adapters are added before the one rounding, tied embeddings that only one side changes
    are untied, attention's `out_proj` gets its delta once, and anything unknown is an error; `compat="peft"` keeps PEFT's roundings
    and order.
    """
    options = Options(dtype, max_shard_size, include, exclude, tied, base_is_residual, compat, expert_layout, tokenizer)
    sources = [(open_source(source), weight) for source, weight in map(weighted, adapters)]
    plan = plan_merge(open_source(base), sources, options)
    packaging.check_output_apart(Path(out), plan.folders)
    if dry_run:
        return plan
    if engine != "local":
        raise Refused(f"engine {engine!r}", expected="local", where="--engine", do="leave --engine out")
    from adapterkit.engines.local import local

    check = None
    if verify:
        from adapterkit.ops.verify import verify_against

        check = lambda folder: verify_against(folder, plan)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite}
    receipt = run(plan, Path(out), local(device), **how, check=check, progress=progress)
    if push is not None:
        from adapterkit import hub

        receipt.data["pushed"] = hub.push(Path(out), push)
    return receipt


def plan_merge(base: Folder, sources: list[tuple[Folder, float]], options: Options) -> Plan:
    """Everything a merge will do, or `Refused` with all that cannot be done. `sources`: the adapters and their weights."""
    _check_options(options)
    if not sources:
        raise Refused("no adapter", expected="one or more", do="name the adapters after the base")
    checkpoint = open_checkpoint(base)
    check_not_quantised(checkpoint)
    errors: list[AdapterkitError] = []
    read: list[Adapter] = []
    for number, (source, _) in enumerate(sources, start=1):
        try:
            read.append(read_adapter(source, number))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return _Merge(checkpoint, read, [weight for _, weight in sources], options).plan()


def _check_options(options: Options) -> None:
    errors: list[AdapterkitError] = []
    for name, value, allowed in [
        ("--tied", options.tied, ("untie", "fold", "refuse")),
        ("--compat", options.compat, (None, "peft")),
        ("--expert-layout", options.expert_layout, (None, *LAYOUTS)),
        ("--tokenizer", options.tokenizer, (None, "base", "adapter")),
        ("--dtype", options.dtype, (None, *dtypes.SHORT)),
    ]:
        if value not in allowed:
            words = " or ".join(a for a in allowed if a)
            errors.append(Refused(f"{name} {value!r}", expected=words, where="options", do="use one of these"))
    refuse_all(errors)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB; KB, MB and GB are powers of 1000."""
    upper = text.strip().upper()
    unit = next((u for u in SIZES if upper.endswith(u)), None)
    number = upper.removesuffix(unit) if unit else upper
    try:
        size = int(float(number) * SIZES.get(unit or "", 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise Refused(f"size {text!r}", expected="a number with KB, MB, GB or TB", where="--max-shard-size", do="e.g. 5GB")
    return size


@dataclass
class Change:
    """What happens to one parameter: a new value to start from, products and vectors added, rows replaced."""

    parameter: Parameter
    value: TensorSpec | None = None
    parts: list["Part"] = field(default_factory=list)
    rows: list[tuple[TensorSpec, tuple[int, ...]]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    number: int = 0  # the adapter that set value, for messages

    @property
    def stack(self) -> bool:
        """Whether the parameter is a stack of matrices (experts); a convolution's kernel may have three axes too."""
        products = [part.product for part in self.parts if part.product is not None]
        return len(self.parameter.shape) == 3 and all(product.experts is not None for product in products)


@dataclass(frozen=True)
class Part:
    """One adapter's addition to one parameter."""

    adapter: Adapter
    lora: Lora
    product: Product | None  # None: a vector
    vector: TensorSpec | None = None
    scale: float = 1.0
    magnitude: TensorSpec | None = None
    outputs: int = 0  # the parameter's axis with one magnitude per position
    delta_first: bool = False  # PEFT rounds this kind of delta before it adds it


class _Merge:
    """One merge being planned."""

    def __init__(self, base: Checkpoint, adapters: list[Adapter], weights: list[float], options: Options):
        self.adapters, self.weights, self.options = adapters, weights, options
        self.errors: list[AdapterkitError] = []
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.changes: dict[str, Change] = {}
        self.new: dict[str, Change] = {}  # parameters that the base does not store: heads
        self.original = base
        self.base, self.layers = replicated(base, adapters, self.errors)
        self.config: dict[str, Any] = json.loads(json.dumps(self.base.config))
        self.included = matcher(options.include, "--include") if options.include else None
        self.excluded = matcher(options.exclude, "--exclude") if options.exclude else None
        self.names = self._names()

    # -- names ---------------------------------------------------------------------------------------------------------------

    def _names(self) -> Names:
        wanted: dict[str, None] = {}
        careful = False
        vocabulary = {v for v in (_nested(self.base.config, "vocab_size")) if isinstance(v, int)}
        for adapter in self.adapters:
            for lora in adapter.loras:
                if lora.kind == "embedding" or (vocabulary & {lora.b.shape[0], lora.a.shape[-1]}):
                    careful = True
                if len(lora.a.shape) > 2 or adapter.config.get("target_parameters"):
                    careful = True
                if self._taken(lora.module) and not adapter.config.get("target_parameters"):
                    wanted[lora.module + ".weight"] = None
            careful = careful or bool(adapter.tokens) or any(len(s.shape) > 1 for s in adapter.replaced.values())
            wanted |= {name: None for name in adapter.replaced if self._taken(name)}
            wanted |= {tokens.module + ".weight": None for tokens in adapter.tokens}
        config = self.adapters[0].config
        trained = config.get("auto_mapping") or {}
        trained_class = trained.get("base_model_class") if isinstance(trained, dict) else None
        return Names(self.base, tuple(wanted), config.get("task_type"), trained_class, careful, self.notes)

    def _taken(self, module: str) -> bool:
        if self.included is not None and not self.included(module):
            return False
        return not (self.excluded is not None and self.excluded(module))

    # -- from the adapters to changes of parameters --------------------------------------------------------------------------

    def plan(self) -> Plan:
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            self._check_adapter(adapter, weight)
            self._replacements(adapter, weight)
            self._products(adapter, weight)
            self._tokens(adapter, weight)
        self._check_together()
        refuse_all(self.errors)
        self._ties()
        self._vocabulary()
        self._head()
        refuse_all(self.errors)
        steps = self._steps()
        refuse_all(self.errors)
        if not any(step.edits or step.source.folder for group in steps.values() for step in group):
            raise Refused(
                "nothing to merge: every module is left out" if self.left_out else "an adapter without weights",
                expected="at least one module",
                where=", ".join(a.name for a in self.adapters),
                do="check --include and --exclude" if self.left_out else "check the adapter",
            )
        return self._plan(steps)

    def _check_adapter(self, adapter: Adapter, weight: float) -> None:
        init = adapter.changed_base()
        if init is not None and not self.options.base_is_residual:
            self.errors.append(
                Refused(
                    f"init_lora_weights {init!r}: this adapter was trained on a base that the init had changed",
                    expected="an adapter of the base as it is",
                    where=adapter.where,
                    do="give --base-is-residual if BASE is that changed base, or turn the adapter into a plain LoRA first "
                    "(adapterkit rebase, or PEFT's path_initial_model_for_weight_conversion)",
                )
            )
        if weight != 1.0:
            whole = {
                "DoRA": any(lora.magnitude is not None for lora in adapter.loras),
                "replaced parameters (modules_to_save, biases, base_layer)": bool(adapter.replaced),
                "trained token rows": bool(adapter.tokens),
            }
            for what in [name for name, there in whole.items() if there]:
                self.errors.append(
                    Refused(
                        f"{what} with weight {weight:g}",
                        expected="weight 1: these are values, not additions",
                        where=adapter.name,
                        do="leave the weight out",
                    )
                )
        if adapter.config.get("use_dora") and not any(lora.magnitude is not None for lora in adapter.loras):
            self.errors.append(Refused("use_dora, but no magnitudes in the file", where=adapter.where, do="save it again"))

    def _replacements(self, adapter: Adapter, weight: float) -> None:
        for name, spec in adapter.replaced.items():
            if not self._taken(name.rpartition(".")[0]):
                self._leave_out(adapter, name)
                continue
            parameter = self.names.parameter(name)
            if parameter is None:
                self._new_parameter(adapter, name, spec)
                continue
            if parameter.shape != spec.shape and not self._resizes(parameter, spec):
                self.errors.append(self._shape(adapter, name, spec.shape, parameter.shape))
                continue
            change = self._change(parameter)
            if change.value is not None:
                other = self.adapters[change.number - 1].name
                self.errors.append(
                    Refused(
                        f"{shown(name)} is replaced by both {other} and {adapter.name}",
                        expected="one adapter for each replaced parameter",
                        where=adapter.name,
                        do="leave one out with --exclude in a run of its own, or merge one adapter",
                    )
                )
            change.value, change.number = spec, adapter.number
            change.parameter = replace(parameter, shape=spec.shape)
            change.adapters.append(adapter.name)

    def _resizes(self, parameter: Parameter, spec: TensorSpec) -> bool:
        """Whether the new value is an embedding (or head) of another vocabulary size, which a checkpoint may hold."""
        sizes = [v for v in _nested(self.base.config, "vocab_size") if isinstance(v, int)]
        rows = parameter.shape[:1]
        same = parameter.shape[1:] == spec.shape[1:] and len(parameter.shape) in (1, 2)
        return same and bool(sizes) and (rows[0] in sizes or self._is_embedding(parameter.name))

    def _is_embedding(self, name: str) -> bool:
        layer = self.names.layer(name.rpartition(".")[0])
        return layer is not None and "Embedding" in layer

    def _new_parameter(self, adapter: Adapter, name: str, spec: TensorSpec) -> None:
        saved = adapter.config.get("modules_to_save") or []
        module = name.rpartition(".")[0]
        known = any(module == m or f".{module}.".find(f".{m}.") >= 0 or module.endswith(m) for m in map(str, saved))
        head = known and self.names.layer(module) is not None
        if not head:
            self.errors.append(self._unknown(adapter, spec.key, name))
            return
        parameter = Parameter(name, spec.shape, ())
        self.new[name] = Change(parameter, spec, adapters=[adapter.name], number=adapter.number)

    def _products(self, adapter: Adapter, weight: float) -> None:
        by_module: dict[str, list[Lora]] = {}
        for lora in adapter.loras:
            if self._taken(lora.module):
                by_module.setdefault(lora.module, []).append(lora)
            else:
                self._leave_out(adapter, lora.module)
        for module, loras in by_module.items():
            try:
                for name, lora in self._targets(adapter, module, loras):
                    self._product(adapter, weight, name, lora)
            except AdapterkitError as error:
                self.errors.append(error)

    def _leave_out(self, adapter: Adapter, name: str) -> None:
        self.left_out.append(f"{adapter.name}: {name}")

    def _targets(self, adapter: Adapter, module: str, loras: list[Lora]) -> list[tuple[str, Lora]]:
        """Which parameter each of a module's LoRAs is on."""
        if len(loras) == 1 and loras[0].depth == 0:
            for leaf in ("weight", "in_proj_weight"):
                if self.names.parameter(f"{module}.{leaf}") is not None:
                    return [(f"{module}.{leaf}", loras[0])]
        targets = adapter.config.get("target_parameters") or []
        children = self.names.children(module)
        ordered = children is not None
        if children is None:
            children = [k.rpartition(".")[2] for k in self.base.tensors if k.rpartition(".")[0] == module]
        if targets:
            full = [f"{module}.{child}" for child in children]
            children = [f.rpartition(".")[2] for f in full if any(f == t or f.endswith("." + str(t)) for t in targets)]
        if not any(self.names.parameter(f"{module}.{child}") for child in children):
            raise self._unknown(adapter, loras[0].a.key, module)
        # the wrapper of the first parameter is the innermost: it has the most base_layer levels around it
        nested = sorted(loras, key=lambda lora: -lora.depth)
        if ordered and len(children) == len(nested):
            return [(f"{module}.{child}", lora) for child, lora in zip(children, nested, strict=True)]
        found = []
        for lora in nested:
            fits = [c for c in children if self._fits_stack(f"{module}.{c}", lora)]
            if len(fits) != 1:
                raise Refused(
                    f"{shown(lora.a.key)} fits {len(fits)} parameters of {shown(module)}: {', '.join(map(shown, fits))}",
                    expected="one parameter (PEFT's file names the nesting, not the parameter)",
                    where=adapter.name,
                    do="give target_parameters in adapter_config.json as they were in training",
                )
            found.append((f"{module}.{fits[0]}", lora))
        return found

    def _fits_stack(self, name: str, lora: Lora) -> bool:
        parameter = self.names.parameter(name)
        if parameter is None or len(parameter.shape) not in (2, 3):
            return False
        sizes = {lora.a.shape[1], lora.b.shape[0]}
        return sizes == set(parameter.shape[-2:])

    def _product(self, adapter: Adapter, weight: float, name: str, lora: Lora) -> None:
        parameter = self.names.parameter(name)
        assert parameter is not None
        shape = self.changes[name].parameter.shape if name in self.changes else parameter.shape
        parameter = replace(parameter, shape=shape)
        pattern_name = name if adapter.config.get("target_parameters") and lora.kind == "module" else lora.module
        if name == lora.module + ".weight" or name.endswith(".in_proj_weight"):
            pattern_name = lora.module
        rank, scale = adapter.resolved(pattern_name)
        product, outputs = self._oriented(adapter, parameter, lora, scale * weight, rank)
        if product.rank != rank:
            raise Refused(
                f"rank {product.rank} in the file for {shown(lora.module)}",
                expected=f"rank {rank}, as r and rank_pattern say",
                where=adapter.where,
                do="restore the config that was saved with the file (a wrong rank means a wrong scale)",
            )
        if lora.magnitude is not None and product.experts is not None:
            raise Refused(f"DoRA on the stack {shown(name)}", expected="a plain LoRA there", where=adapter.name)
        if lora.magnitude is not None and _count(lora.magnitude) != parameter.shape[outputs]:
            raise self._shape(adapter, lora.magnitude.key, lora.magnitude.shape, (parameter.shape[outputs],))
        first = lora.kind == "embedding" or product.experts is not None or name != lora.module + ".weight"
        first = first or self._in_attention(lora.module)
        part = Part(adapter, lora, product, None, scale * weight, lora.magnitude, outputs, first)
        change = self._change(parameter)
        change.parts.append(part)
        change.adapters.append(adapter.name)
        if lora.bias is not None:
            self._bias(adapter, lora, scale * weight)

    def _in_attention(self, module: str) -> bool:
        """Whether a module is the output projection of torch's MultiheadAttention."""
        parent, _, leaf = module.rpartition(".")
        return leaf == "out_proj" and self.names.parameter(f"{parent}.in_proj_weight") is not None

    def _bias(self, adapter: Adapter, lora: Lora, scale: float) -> None:
        assert lora.bias is not None
        parameter = self.names.parameter(f"{lora.module}.bias")
        if parameter is None:
            raise Refused(
                f"{shown(lora.bias.key)}: a bias for {shown(lora.module)}, which has none in the base",
                expected="a module with a bias",
                where=adapter.name,
                do="merge into a model whose module has a bias",
            )
        if parameter.shape != lora.bias.shape:
            raise self._shape(adapter, lora.bias.key, lora.bias.shape, parameter.shape)
        change = self._change(parameter)
        change.parts.append(Part(adapter, lora, None, lora.bias, scale))
        change.adapters.append(adapter.name)

    def _oriented(
        self, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float, rank: int
    ) -> tuple[Product, int]:
        """How b @ a lies on the parameter, decided from shapes and, where they leave it open, from the module's class; and
        the parameter's axis of outputs."""
        shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
        if lora.kind == "embedding":
            if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != shape or a[0] != b[1]:
                raise self._shape(adapter, lora.a.key, (a, b), shape)
            return Product(lora.a, lora.b, scale, a[0], True), 1
        if len(shape) > 3 or (len(shape) == 3 and len(a) == 3):
            return self._convolution(adapter, parameter, lora, scale), 0
        if len(shape) == 3:
            return self._experts(adapter, parameter, lora, scale, rank), 1
        if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise self._shape(adapter, lora.a.key, (a, b), shape)
        straight, turned = shape == (b[0], a[1]), shape == (a[1], b[0])
        if not straight and not turned:
            raise self._shape(adapter, lora.a.key, (a, b), shape)
        flip = turned and not straight
        if straight and turned:
            flip = self._transposed(lora.module)
        return Product(lora.a, lora.b, scale, a[0], flip), 1 if flip else 0

    def _transposed(self, module: str) -> bool:
        """Whether a square weight is stored (in, out): by the module's class, else by the adapter's other modules."""
        layer = self.names.layer(module)
        if layer is not None:
            return layer == "Conv1D"
        if self.names.model is None and self.names.base.config.get("model_type"):
            turned = [lora.module for a in self.adapters for lora in a.loras if self._only_turned(lora)]
            if turned:
                raise Refused(
                    f"the square weight of {shown(module)} may be stored (in, out), as {shown(turned[0])} is",
                    expected="a model that transformers knows, or weights that are not square",
                    where=self.base.name,
                    do="update transformers",
                )
        return False

    def _only_turned(self, lora: Lora) -> bool:
        parameter = self.names.parameter(lora.module + ".weight")
        sides = (lora.b.shape[0], lora.a.shape[-1])
        return parameter is not None and parameter.shape != sides and parameter.shape == sides[::-1]

    def _convolution(self, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float) -> Product:
        shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
        module = parameter.name.rpartition(".")[0]
        groups = self.names.model.groups(module) if self.names.model is not None else 1
        if groups > 1 or (len(b) > 1 and len(a) > 1 and b[1] != a[0]):
            raise Refused(
                f"a grouped convolution: {shown(module)} has {groups} groups",
                expected="groups 1 (PEFT cannot merge these either)",
                where=adapter.name,
                do="leave it out with --exclude",
            )
        if (b[0], *a[1:]) != shape or any(n != 1 for n in b[2:]):
            raise self._shape(adapter, lora.a.key, (a, b), shape)
        return Product(lora.a, lora.b, scale, a[0], False)

    def _experts(self, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float, rank: int) -> Product:
        count, rows, columns = parameter.shape
        inputs, outputs = lora.a.shape[-1], lora.b.shape[0]
        file_rank, rest = divmod(lora.a.shape[0], count)
        if rest or lora.b.shape[1] != lora.a.shape[0]:
            raise self._shape(adapter, lora.a.key, (lora.a.shape, lora.b.shape), parameter.shape)
        straight, turned = (rows, columns) == (outputs, inputs), (rows, columns) == (inputs, outputs)
        if not straight and not turned:
            raise self._shape(adapter, lora.a.key, (lora.a.shape, lora.b.shape), parameter.shape)
        flip = turned if straight != turned else self._flips_squares(adapter, parameter)
        return Product(lora.a, lora.b, scale, file_rank, flip, count)

    def _flips_squares(self, adapter: Adapter, parameter: Parameter) -> bool:
        """Square experts: shapes cannot tell. PEFT up to 0.18 took them as (in, out), later as the module says."""
        chosen = self.options.expert_layout
        version = adapter.config.get("peft_version")
        if chosen is None and isinstance(version, str):
            parts = [int(p) for p in version.split(".")[:2] if p.isdigit()]
            chosen = "peft-0.18" if parts < [0, 19] else "peft-0.19"
        if chosen is None:
            raise Refused(
                f"{shown(parameter.name)} holds square experts {parameter.shape} and the adapter has no peft_version",
                expected="the layout in which PEFT wrote it: it changed in 0.19",
                where=adapter.where,
                do="give --expert-layout peft-0.18 or --expert-layout peft-0.19",
            )
        if chosen == "peft-0.18":
            return True
        model = self.names.model
        module = parameter.name.rpartition(".")[0]
        return bool(getattr(model.model.get_submodule(module), "is_transposed", False)) if model is not None else False

    def _tokens(self, adapter: Adapter, weight: float) -> None:
        for tokens in adapter.tokens:
            name = f"{tokens.module}.weight"
            parameter = self.names.parameter(name)
            if parameter is None:
                self.errors.append(self._unknown(adapter, tokens.values.key, name))
                continue
            shape = self.changes[name].parameter.shape if name in self.changes else parameter.shape
            above = [i for i in tokens.indices if i >= shape[0]]
            if len(tokens.values.shape) != 2 or tokens.values.shape[1] != shape[1] or above:
                self.errors.append(
                    Refused(
                        f"{shown(tokens.values.key)} {tokens.values.shape} for rows {shown(str(above or tokens.indices))}",
                        expected=f"rows of {shown(name)}, which has shape {shape}",
                        where=adapter.name,
                        do="use a base whose vocabulary was resized as in training",
                    )
                )
                continue
            change = self._change(replace(parameter, shape=shape))
            change.rows.append((tokens.values, tokens.indices))
            change.adapters.append(adapter.name)

    def _change(self, parameter: Parameter) -> Change:
        return self.changes.setdefault(parameter.name, Change(parameter))

    def _unknown(self, adapter: Adapter, key: str, name: str) -> Refused:
        return Refused(
            f"{shown(key)}: the base has no {shown(name)}",
            expected="only parameters of the base",
            where=adapter.name,
            do="check that the adapter was trained on this base" + self._hint(),
        )

    def _hint(self) -> str:
        return f" ({self.notes[-1].splitlines()[0]})" if self.notes else ""

    def _shape(self, adapter: Adapter, key: str, found: Any, expected: tuple[int, ...]) -> Refused:
        return Refused(
            f"{shown(key)}: shape {found}",
            expected=f"one that fits the base's {expected}",
            where=adapter.name,
            do="check that the adapter was trained on this base",
        )

    def _check_together(self) -> None:
        for name, change in self.changes.items():
            numbers = {part.adapter.number for part in change.parts}
            decomposed = [part for part in change.parts if part.magnitude is not None]
            if decomposed and len(numbers) > 1 and self.options.compat != "peft":
                self.errors.append(
                    Refused(
                        f"{shown(name)}: DoRA of {decomposed[0].adapter.name} beside another adapter",
                        expected="one adapter on a module that DoRA rescales: the result depends on the order",
                        where="adapters",
                        do="merge one after the other, or give --compat peft for PEFT's order",
                    )
                )
            rows = [i for _, indices in change.rows for i in indices]
            if len(set(rows)) != len(rows):
                self.errors.append(
                    Refused(f"{shown(name)}: a token row trained by two adapters", where="adapters", do="merge one of them")
                )

    # -- ties, vocabularies, heads -------------------------------------------------------------------------------------------

    def _ties(self) -> None:
        """Parameters that are one in memory: untie what only one side changes, unless told otherwise."""
        seen: set[str] = set()
        for name in list(self.changes):
            change = self.changes[name]
            if not change.parameter.tied or name in seen:
                continue
            group = [name, *change.parameter.tied]
            seen.update(group)
            stored = next((g for g in group if g in self.base.tensors or self._stored_apart(g, group)), name)
            changed = [g for g in group if g in self.changes]
            if self._same_change(group):
                kept = self.changes[changed[0]] if stored not in self.changes else self.changes[stored]
                for other in changed:
                    self.changes.pop(other)
                self.changes[stored] = kept
                self._replace_copies(stored, group, kept)
            elif self.options.tied == "refuse":
                self.errors.append(
                    Refused(
                        f"{shown(changed[0])} is tied to {shown(', '.join(g for g in group if g != changed[0]))}",
                        expected="a change of both or of neither (--tied refuse)",
                        where="adapters",
                        do="give --tied untie to make them two, or --tied fold for PEFT's in-memory result",
                    )
                )
            elif self.options.tied == "fold":
                self._fold(stored, group, changed)
            else:
                self._untie(stored, group)

    def _stored_apart(self, name: str, group: list[str]) -> bool:
        parameter = self.names.parameter(name)
        return parameter is not None and any(slot.key not in group for slot in parameter.slots)

    def _same_change(self, group: list[str]) -> bool:
        """Whether the adapters mean one change of the shared weight: token rows (PEFT shares them), ensure_weight_tying."""
        changed = [self.changes[g] for g in group if g in self.changes]
        if all(c.rows and not c.parts and c.value is None for c in changed):
            return len(changed) == 1 or all(
                [i for _, i in c.rows] == [i for _, i in changed[0].rows] for c in changed
            )  # fmt: skip
        numbers = {p.adapter.number for c in changed for p in c.parts} | {c.number for c in changed if c.value is not None}
        return all(self.adapters[n - 1].config.get("ensure_weight_tying") for n in numbers)

    def _replace_copies(self, stored: str, group: list[str], change: Change) -> None:
        """A tied twin that the base stores as well gets the same change, so that the file stays consistent."""
        for other in group:
            if other != stored and other in self.base.tensors:
                parameter = self.names.parameter(other)
                assert parameter is not None
                twin = Parameter(other, change.parameter.shape, _own_slot(other, parameter), ())
                self.changes[other] = replace(change, parameter=twin)

    def _fold(self, stored: str, group: list[str], changed: list[str]) -> None:
        target = self.changes.pop(stored, None) or Change(replace(self.changes[changed[0]].parameter, name=stored))
        for other in changed:
            change = self.changes.pop(other, None)
            if change is not None:
                target.value = target.value or change.value
                target.parts += change.parts
                target.rows += change.rows
                target.adapters += change.adapters
        self.changes[stored] = target
        self._replace_copies(stored, group, target)

    def _untie(self, stored: str, group: list[str]) -> None:
        """Every name of the group that is not stored becomes a tensor of its own."""
        parameter = self.names.parameter(stored)
        assert parameter is not None
        for name in group:
            change = self.changes.get(name)
            if name == stored:
                continue
            if name in self.base.tensors:
                if change is not None:
                    change.parameter = replace(change.parameter, slots=_own_slot(name, change.parameter))
                continue
            change = self.changes.pop(name, None) or Change(replace(parameter, name=name))
            change.parameter = replace(change.parameter, name=name)
            self.new[name] = change
        _set_everywhere(self.config, "tie_word_embeddings", False)
        self.config["tie_word_embeddings"] = False
        self.notes.append(f"untied: {', '.join(sorted(group))}; tie_word_embeddings is now false")

    def _vocabulary(self) -> None:
        """A resized embedding changes vocab_size in the config; every stored embedding and head must agree."""
        resized: dict[int, str] = {}
        for name, change in {**self.changes, **self.new}.items():
            before = self.names.parameter(name)
            if change.value is not None and before is not None and before.shape != change.value.shape:
                resized[change.value.shape[0]] = name
                old = before.shape[0]
        if not resized:
            return
        if len(resized) > 1:
            self.errors.append(
                Refused(
                    f"vocabularies of {', '.join(f'{n} ({shown(name)})' for n, name in resized.items())} rows",
                    expected="one size",
                    where="adapters",
                    do="save the adapter with both embeddings (save_embedding_layers=True)",
                )
            )
            return
        size, name = next(iter(resized.items()))
        others = [
            other
            for other in self.base.tensors
            if other not in self.changes and self.base.tensors[other].shape[:1] == (old,) and self._is_vocabulary(other)
        ]
        if others:
            self.errors.append(
                Refused(
                    f"{shown(name)} has {size} rows, {shown(others[0])} stays at {old}",
                    expected="embedding and head of one size",
                    where="adapters",
                    do="save the adapter with both (save_embedding_layers=True)",
                )
            )
        _set_where(self.config, "vocab_size", old, size)
        self.notes.append(f"vocab_size: {old} -> {size}")

    def _is_vocabulary(self, key: str) -> bool:
        parameter = self.names.parameter(key)
        if parameter is None or len(parameter.shape) != 2:
            return False
        model = self.names.model
        if model is None:
            return False
        ends = [model.model.get_input_embeddings(), model.model.get_output_embeddings()]
        module = parameter.name.rpartition(".")[0]
        return any(end is not None and model.model.get_submodule(module) is end for end in ends)

    def _head(self) -> None:
        """A head that the base lacks comes with the config of the class that has it."""
        heads = [name for name, change in self.new.items() if not change.parameter.slots]
        model = self.names.model
        if not heads or model is None:
            return
        class_name = type(model.model).__name__
        if class_name not in (self.config.get("architectures") or []):
            self.notes.append(f"architectures: {self.config.get('architectures')} -> {class_name}")
            self.config["architectures"] = [class_name]
        if "Classification" in class_name:
            last = next((n for n in reversed(heads) if len(self.new[n].parameter.shape) == 2), None)
            if last is not None:
                count = self.new[last].parameter.shape[0]
                self.config.pop("num_labels", None)
                if len(self.config.get("id2label") or {}) != count:
                    self.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
                    self.config["label2id"] = {f"LABEL_{i}": i for i in range(count)}

    # -- from changes to steps -----------------------------------------------------------------------------------------------

    def _steps(self) -> dict[str, list[Step]]:
        """Steps per output file, in the base's order; new tensors at the end of the last file."""
        touched = self._touched()
        dtype = dtypes.parse(self.options.dtype) if self.options.dtype else None
        groups: dict[str, list[Step]] = {name: [] for name in self.base.shards}
        dropped = self._dropped()
        for key, spec in self.base.tensors.items():
            if key in dropped:
                continue
            step = touched.pop(key, None) or Step(key, spec.dtype, spec.shape, spec)
            groups[spec.file].append(self._cast(step, dtype))
        last = list(groups)[-1]
        for name, change in self.new.items():
            step = self._new_step(name, change)
            groups[last].append(self._cast(step, dtype))
        return {name: steps for name, steps in groups.items() if steps}

    def _dropped(self) -> set[str]:
        """Keys that the class with the new head no longer has (the old head)."""
        model = self.names.model
        if model is None or self.config.get("architectures") == self.base.config.get("architectures"):
            return set()
        used = {slot.key for p in model.parameters.values() for slot in p.slots}
        dropped = set(self.base.tensors) - used - set(self.changes)
        if dropped:
            self.notes.append(f"left out, not part of {self.config['architectures'][0]}: {', '.join(sorted(dropped))}")
        return dropped

    def _cast(self, step: Step, dtype: str | None) -> Step:
        if dtype is None or step.dtype not in dtypes.FLOATS:
            return step
        return replace(step, dtype=dtype)

    def _touched(self) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        for change in self.changes.values():
            for slot in change.parameter.slots:
                try:
                    self._place(steps, change, slot)
                except AdapterkitError as error:
                    self.errors.append(error)
        return steps

    def _place(self, steps: dict[str, Step], change: Change, slot: Any) -> None:
        parameter = change.parameter
        spec = self.base.tensors[slot.key]
        stack = change.stack and len(slot.shape) in (2, 3)
        rows = grid_rows(slot, stack)
        step = steps.get(slot.key) or Step(slot.key, spec.dtype, spec.shape, spec, (), rows)
        edits: list[Edit] = list(step.edits)
        if change.value is not None:
            if slot.whole:
                value = change.value
                step = replace(step, source=value, shape=value.shape if len(value.shape) == len(spec.shape) else spec.shape)
                rows = value.shape[0] if not stack else rows
            else:
                edits += place_value(parameter, slot, change.value)
        if spec.dtype not in dtypes.FLOATS and (edits or change.parts or change.rows):
            raise Refused(
                f"{shown(slot.key)} is {spec.dtype}", expected="a float weight", where=self.base.name, do="dequantise the base"
            )
        resized = replace(slot, shape=step.shape) if slot.whole else slot
        if slot.whole and change.value is not None:
            resized = replace(parameter, slots=()) and _whole_slot(slot.key, change.value.shape)
        edits = self._additions(edits, change, resized, step.dtype)
        edits += [place_rows(parameter, resized, values, indices) for values, indices in change.rows]
        names = tuple(dict.fromkeys((*step.adapters, *change.adapters)))
        steps[slot.key] = replace(step, edits=tuple(edits), rows=rows, adapters=names)

    def _additions(self, edits: list[Edit], change: Change, slot: Any, dtype: str) -> list[Edit]:
        parameter = change.parameter
        if self.options.compat == "peft":
            return self._additions_like_peft(edits, change, slot, dtype)
        terms = [place_product(parameter, slot, part.product) for part in change.parts if part.product is not None]
        for part in change.parts:
            if part.vector is not None:
                edits.append(place_vector(parameter, slot, part.vector, part.scale))
        if terms:
            # neighbours in one stored tensor (q, k, v in a fused projection) share one edit, so one pass
            if edits and isinstance(edits[-1], AddLowRank):
                terms = [*edits.pop().terms, *terms]  # type: ignore[attr-defined]
            edits.append(AddLowRank(tuple(terms)))
        for part in change.parts:
            if part.magnitude is not None:
                edits.append(place_magnitude(parameter, slot, part.magnitude, part.outputs, tuple(edits)))
        return edits

    def _additions_like_peft(self, edits: list[Edit], change: Change, slot: Any, dtype: str) -> list[Edit]:
        parameter = change.parameter
        rounded = dtypes.torch_dtype(dtype)
        for part in change.parts:
            if part.product is None:
                assert part.vector is not None
                edits.append(place_vector(parameter, slot, part.vector, part.scale))
                continue
            term = place_product(parameter, slot, part.product)
            if part.magnitude is None:
                edits.append(AddLikePeft(term, rounded, part.delta_first))
                continue
            # PEFT takes a DoRA norm of the weight before any merge: W' = g ⊙ (W + Δ), rounded before the next adapter
            edits.append(AddLowRank((term,)))
            edits.append(place_magnitude(parameter, slot, part.magnitude, part.outputs, (edits[-1],)))
        return edits

    def _new_step(self, name: str, change: Change) -> Step:
        """A tensor that the base does not store: an untied twin, or a head."""
        parameter = change.parameter
        if not parameter.slots:
            assert change.value is not None
            dtype = self._usual_dtype(change.value.dtype)
            return Step(name, dtype, change.value.shape, change.value, (), change.value.shape[0], tuple(change.adapters))
        slot = parameter.slots[0]
        spec = self.base.tensors[slot.key]
        source = change.value or spec
        step = Step(name, spec.dtype, source.shape, source, (), source.shape[0], tuple(change.adapters))
        slot = _whole_slot(slot.key, source.shape)
        parameter = replace(parameter, shape=source.shape)
        change = replace(change, parameter=parameter)
        edits = self._additions([], change, slot, spec.dtype)
        edits += [place_rows(parameter, slot, values, indices) for values, indices in change.rows]
        return replace(step, edits=tuple(edits))

    def _usual_dtype(self, fallback: str) -> str:
        """The dtype that most of the base's bytes have: a head trained in float32 beside a bf16 model is loaded as bf16."""
        sizes: dict[str, int] = {}
        for spec in self.base.tensors.values():
            if spec.dtype in dtypes.FLOATS:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        return max(sizes, key=lambda d: sizes[d]) if sizes else fallback

    # -- the plan ------------------------------------------------------------------------------------------------------------

    def _plan(self, steps: dict[str, list[Step]]) -> Plan:
        shards = self._shards(steps)
        folders = (self.original.folder, *(a.folder for a in self.adapters))
        headers = {(0, name): header.sha256 for name, header in self.original.shards.items()}
        for adapter in self.adapters:
            headers[adapter.number, "adapter_model.safetensors"] = adapter.header_sha256
            headers[adapter.number, "adapter_config.json"] = _sha256(adapter.folder, "adapter_config.json")
        if "config.json" in self.original.files:
            headers[0, "config.json"] = _sha256(self.original.folder, "config.json")
        if self.options.dtype:
            name = dtypes.CONFIG_NAME[dtypes.parse(self.options.dtype)]
            for key in ("dtype", "torch_dtype"):
                _set_everywhere(self.config, key, name)
        files = packaging.files_of_output(
            self.original, self.adapters, self.weights, self.config, shards, self.options.tokenizer, self.notes
        )
        changed = sum(1 for s in shards for step in s.steps if not step.copied)
        facts = {
            "adapters": [
                {"name": a.name, "weight": w, "modules": len(a.loras)}
                for a, w in zip(self.adapters, self.weights, strict=True)
            ],
            "left_out": self.left_out,
            "tensors_changed": changed,
        }
        options = {k: v for k, v in vars(self.options).items() if v not in (None, False)}
        options["weights"] = self.weights
        return Plan("merge", options, folders, headers, identities(folders, headers), shards, files, facts, tuple(self.notes))

    def _shards(self, steps: dict[str, list[Step]]) -> tuple[Shard, ...]:
        by_key = {step.key: step for group in steps.values() for step in group}
        if self.options.max_shard_size:
            stored = [_stored(step) for group in steps.values() for step in group]
            metadata = next(iter(self.original.shards.values())).metadata or {"format": "pt"}
            layouts = layout.resharded(stored, parse_size(self.options.max_shard_size), metadata)
        else:
            layouts = [
                layout.like_base(name, [_stored(s) for s in group], self.original.shards[name])
                for name, group in steps.items()
            ]
        return tuple(Shard(lay, tuple(by_key[t.key] for t in lay.tensors)) for lay in layouts)


def _stored(step: Step) -> Stored:
    return Stored(step.key, step.dtype, step.shape)


def _sha256(folder: Folder, name: str) -> str:
    return hashlib.sha256(folder.read(name, 0, folder.files()[name])).hexdigest()


def _count(spec: TensorSpec) -> int:
    count = 1
    for n in spec.shape:
        count *= n
    return count


def _whole_slot(key: str, shape: tuple[int, ...]):
    from adapterkit.weights.slots import identity_slot

    return identity_slot(key, shape)


def _own_slot(name: str, parameter: Parameter):
    return (_whole_slot(name, parameter.shape),)


def _nested(config: dict, key: str) -> list:
    """The key's values in the config and in its sub-configs."""
    found = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, dict):
            found += _nested(value, key)
    return found


def _set_everywhere(config: dict, key: str, value: Any) -> None:
    if key in config:
        config[key] = value
    for sub in config.values():
        if isinstance(sub, dict):
            _set_everywhere(sub, key, value)


def _set_where(config: dict, key: str, old: Any, new: Any) -> None:
    if config.get(key) == old:
        config[key] = new
    for sub in config.values():
        if isinstance(sub, dict):
            _set_where(sub, key, old, new)


__all__ = ["Options", "ShardLayout", "merge", "plan_merge"]
