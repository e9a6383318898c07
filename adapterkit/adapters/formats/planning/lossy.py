"""Fit LoRA factors of a given rank to deltas that a format cannot store: other kinds, DoRA.
Convolutions with a core become standard ones without loss; vectors and zeros are left out."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit.adapters.formats.capabilities import (
    depends_on_base,
    is_fitted,
    is_vector,
    lacking,
    roles_by_kind,
)
from adapterkit.adapters.formats.modules.deltas import Fit, ModuleDelta
from adapterkit.adapters.formats.modules.kinds import EXPERTS, FACTORS, PARAMETER, SHAPE
from adapterkit.adapters.formats.modules.names import kernel_of
from adapterkit.adapters.formats.modules.parts import cores, magnitudes, matrix_shape, tail_of
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents, Modules
from adapterkit.adapters.formats.modules.tensors import contracted, scaled
from adapterkit.adapters.formats.peft.layout import KEPT
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.kinds.dora_deltas import BaseWeights, dora_problems
from adapterkit.adapters.kinds.planning import FLATTENED, unknown_kernel
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import CHECK_BASE, command
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.lazy import torch
from adapterkit.core.records import Json
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.plan_reader import PlanReader

DIFFERENCES = ("full", "modulation")
RANKED = (FACTORS, EXPERTS, PARAMETER)
BIAS, DIFFERENCE, FULL = "bias", "diff_b", "full"


def lowered(
    contents: Contents,
    format: Format,
    *,
    rank: int | None,
    lossy: bool = False,
    base: Checkpoint | None = None,
) -> Contents:
    """The contents as far as the format can store them: biases in its layout, and with `rank` LoRA
    factors for other kinds of deltas; with `lossy` without differences of vectors that it cannot
    store. The rest stays, for the writer to refuse.

    `Refused` if the base is needed and not given, or does not fit.
    """
    contents = with_biases(contents, format)  # first, because it decides what the format lacks
    modules = (
        _without_core(m) if "mid" in m.parts and lacking(m, format, contents) == ["mid"] else m
        for m in contents.modules
    )
    contents = replace(contents, modules=tuple(modules))
    if rank is not None:
        contents = with_biases(_fitted(contents, format, rank, base), format)
    return _without_vectors(contents, format) if lossy else contents


def with_biases(contents: Contents, format: Format) -> Contents:
    """The contents with biases in the format's layout: PEFT adds scale · bias along with b, other
    tools keep the difference of the layer's bias by itself."""
    if not any({BIAS, DIFFERENCE} & {*module.parts} for module in contents.modules):
        return contents
    kinds = roles_by_kind(format)
    has_role, has_difference = BIAS in kinds.get(FACTORS, ()), DIFFERENCE in kinds.get(FULL, ())
    if has_role == has_difference:
        return contents
    modules = (_joined_biases if has_role else _separate_biases)(contents.modules)
    return replace(contents, modules=tuple(modules))


def _separate_biases(modules: Modules) -> list[AdapterModule]:
    """diff_b = scale · bias as modules of their own, after those of the factors."""
    differences = {(m.component, m.name): m for m in modules if m.kind == FULL}
    result: list[AdapterModule] = []
    for module in modules:
        bias = module.parts.get(BIAS) if module.kind == FACTORS else None
        if bias is None or (module.component, module.name) in differences:
            result.append(module)
            continue
        result.append(replace(module, parts={r: p for r, p in module.parts.items() if r != BIAS}))
        parts = {DIFFERENCE: scaled(bias, module.scale)}
        result.append(AdapterModule(module.component, module.name, FULL, parts, 1.0, 1))
    return result


def _joined_biases(modules: Modules) -> list[AdapterModule]:
    """bias = diff_b / scale among the factors, if a module has both."""
    factors = {
        (m.component, m.name): m
        for m in modules
        if m.kind == FACTORS and m.scale and BIAS not in m.parts
    }
    biases = {
        (m.component, m.name): m.parts[DIFFERENCE]
        for m in modules
        if m.kind == FULL and set(m.parts) == {DIFFERENCE} and (m.component, m.name) in factors
    }
    result: list[AdapterModule] = []
    for module in modules:
        key = (module.component, module.name)
        if key not in biases:
            result.append(module)
        elif module.kind == FACTORS:
            bias = scaled(biases[key], 1 / module.scale)
            result.append(replace(module, parts={**module.parts, BIAS: bias}))
    return result


def without_zeros(contents: Contents, format: Format) -> Contents:
    """The contents without modules of zeros that the format has no keys for; read while planning,
    because the output depends on them."""
    reader = PlanReader(contents.folders)
    homeless = [
        m for m in contents.modules if m.kind in DIFFERENCES and lacking(m, format, contents)
    ]
    empty = {
        id(module)
        for module in homeless
        if not any(part.value(reader).any() for part in module.parts.values())
    }
    if not empty:
        return contents
    names = [module.path for module in homeless if id(module) in empty]
    note = f"{len(names)} differences of zero are left out: {listed(names)}"
    modules = tuple(module for module in contents.modules if id(module) not in empty)
    return replace(contents, modules=modules, notes=(*contents.notes, note))


def _without_vectors(contents: Contents, format: Format) -> Contents:
    """The contents without differences of norms and biases that the format cannot store; a note
    gives their number and size."""
    dropped = [m for m in contents.modules if is_vector(m) and lacking(m, format, contents)]
    if not dropped:
        return contents
    reader = PlanReader(contents.folders)
    parts = [part.value(reader).double() for m in dropped for part in m.parts.values()]
    largest = max(float(torch.linalg.vector_norm(part)) for part in parts)
    note = (
        f"dropped, as {format.title} cannot store them: differences of {len(dropped)} vectors "
        f"(norms and biases), of norm {short(largest)} at most: {listed([m.path for m in dropped])}"
    )
    ids = {id(m) for m in dropped}
    kept = tuple(m for m in contents.modules if id(m) not in ids)
    return replace(contents, modules=kept, notes=(*contents.notes, note))


def _fitted(contents: Contents, format: Format, rank: int, base: Checkpoint | None) -> Contents:
    """The contents with LoRA factors of at most that rank."""
    modules = contents.modules
    large = [m for m in modules if m.kind in RANKED and m.rank > rank]
    _check_large(large, rank, contents.folders[0].label)
    own = {id(m) for m in large}
    chosen = [m for m in modules if id(m) in own or is_fitted(m, format, contents)]
    if not chosen:
        return contents
    job, fitted = _Fitting(contents, rank, base, chosen), dict[int, list[AdapterModule]]()
    for module in chosen:
        with job.errors.collected():
            fitted[id(module)] = job.fitted(module)
    job.errors.raise_all()
    parts = [part for m in modules for part in fitted.get(id(m), [m])]
    config = contents.config
    if "peft_type" in config:
        config = plain_config(config)
    notes = [*contents.notes, *job.notes]
    has_norms = lambda module: magnitudes(module.parts) and module.kind == FACTORS
    notes.append(note_of(Counter("DoRA" if has_norms(m) else m.kind for m in chosen), rank))
    notes += [FLATTENED] if job.guessed else []
    return replace(contents, modules=tuple(parts), config=config, notes=notes, refitted=True)


def _check_large(modules: Modules, rank: int, where: str) -> None:
    """`Refused` for factors of a larger rank that are not of one matrix."""
    stacks = [m.path for m in modules if m.kind != FACTORS or m.depth]
    if stacks:
        raise Refused(
            f"factors of parameters and stacks of experts of a rank above {rank}: {listed(stacks)}",
            expected="their own rank, or a larger one, for --rank",
            where=where,
            hint="shrink them\n" + command("adapterkit resize", where, rank=rank, out="smaller"),
            code="AK402",
        )


def _without_core(module: AdapterModule) -> AdapterModule:
    """A convolution with a core as a standard one: a'[m, i] = Σ_n mid[m, n] a[n, i]."""
    parts = dict(module.parts)
    parts["a"] = contracted(parts.pop("mid"), parts["a"])
    rank = parts["a"].shape[0]
    return replace(module, parts=parts, alpha=module.scale * rank, rank=rank)


def plain_config(config: Mapping[str, Any]) -> Json:
    """The settings of an adapter that still apply to LoRA factors, without ranks."""
    if config["peft_type"] == "LORA":
        return {key: value for key, value in config.items() if key not in ("r", "use_dora")}
    bias = config.get("bias") or "none"
    own = {key: config[key] for key in (*KEPT, "trainable_token_indices") if key in config}
    return own | {"peft_type": "LORA", "bias": "lora_only" if bias.endswith("_only") else bias}


def note_of(counts: Mapping[str, int], rank: int) -> str:
    what = ", ".join(f"{count} modules of {kind}" for kind, count in sorted(counts.items()))
    return f"{what} became LoRA factors of rank {rank} at most: the receipt has the error"


@dataclass
class _Fitting:
    """LoRA factors of modules while they are planned."""

    contents: Contents
    rank: int
    base: Checkpoint | None
    modules: Modules
    errors: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)  # modules taken for linear layers

    def __post_init__(self) -> None:
        where = self.contents.folders[0].label
        needy = [m.path for m in self.modules if depends_on_base(m)]
        components = {m.component for m in self.modules if depends_on_base(m)}
        self.weights: BaseWeights | None = None
        if needy and self.base is None:
            self.errors.add(
                f"{len(needy)} modules whose delta depends on the weight (DoRA, OFT): "
                f"{listed(needy)}",
                "--base BASE, the model they were trained on",
                "give --base",
                where=where,
                code="AK402",
            )
        elif len(components) > 1:
            self.errors.add(
                f"deltas that depend on the weights of {listed(sorted(components))}",
                "one component at a time, with its --base",
                "give --component COMPONENT and the folder of that component as --base",
                where=where,
                code="AK402",
            )
        elif self.base is not None:
            folder, config = self.contents.folders[0], dict(self.contents.config)
            adapter = Adapter(folder, 0, config, (), {}, (), {})
            self.errors += dora_problems(adapter) if needy else []
            names = [m.name for m in self.modules]
            self.weights = BaseWeights(self.base, adapter, names, self.notes)

    def fitted(self, module: AdapterModule) -> list[AdapterModule]:
        """The module as LoRA factors, with its other contents; itself if it stays as it is."""
        if module.depth:
            return [module]
        needs = depends_on_base(module)
        weight, name = None, f"{module.name}.weight"
        # the base may be one component of several
        if self.weights and (needs or self.weights.names.parameter(name) is not None):
            weight = self.weights.of(module.name, module.embedding)
        elif needs:
            return [module]  # refused already
        self._check(module, weight)
        delta = ModuleDelta(module, weight if needs else None, tuple(self._others(module)))
        trailing_shape = self._tail(module, weight)
        fit = Fit(module.path, delta, trailing_shape, min(self.rank, delta.rank))
        parts = dict(fit.parts)
        if SHAPE in module.parts:
            parts[SHAPE] = module.parts[SHAPE]
        if "bias" in module.parts:
            parts["bias"] = scaled(module.parts["bias"], module.scale)
        one = replace(
            module, kind=FACTORS, parts=parts, alpha=float(fit.rank), rank=fit.rank,
            stored_alpha=None, whole=(),
        )  # fmt: skip
        if module.kind == "full" and "diff_b" in module.parts:
            rest = replace(module, parts={"diff_b": module.parts["diff_b"]})
            return [one, rest]
        return [one]

    def _others(self, module: AdapterModule) -> Iterator[ModuleDelta]:
        """The other modules over which its norms of inputs are taken."""
        for other in self.modules:
            if (
                (other.component, other.kind) == (module.component, module.kind)
                and other.name in module.whole
                and other is not module
            ):
                assert self.weights is not None
                weight = self.weights.of(other.name, other.embedding)
                self._check(other, weight)
                yield ModuleDelta(other, weight)

    def _check(self, module: AdapterModule, weight: StoredParameter | None) -> None:
        if weight is None:
            return
        out, inputs = matrix_shape(module.kind, module.parts)
        shape = weight.weight_shape[0], math.prod(weight.weight_shape[1:])
        if out != shape[0] or inputs not in (0, shape[1]):
            raise Refused(
                f"{shown(module.path)}: a delta of {out} rows and {inputs or 'any'} columns",
                expected=f"one for the base's {weight.weight_shape}",
                where=self.contents.folders[0].label,
                hint=CHECK_BASE,
                code="AK401",
            )

    def _tail(self, module: AdapterModule, weight: StoredParameter | None) -> tuple[int, ...]:
        """The axes after `out`: from the file, the base or the architecture."""
        if weight is not None:
            return weight.weight_shape[1:]
        trailing_shape = tail_of(module.kind, module.parts)
        if trailing_shape is not None:
            return trailing_shape
        inputs = matrix_shape(module.kind, module.parts)[1]
        kernel = kernel_of(self.contents.architectures, module.component, module.name)
        if kernel is None and cores(module.parts):
            raise unknown_kernel(module.path)
        if kernel is None:
            self.guessed.append(module.path)
            return (inputs,)
        if inputs % math.prod(kernel):
            raise Refused(
                f"{shown(module.path)}: {inputs} columns, and a kernel of {kernel}",
                expected="a multiple of the kernel's size",
                where=self.contents.folders[0].label,
                hint="give --base, the model it was trained on",
                code="AK402",
            )
        return (inputs // math.prod(kernel), *kernel)
