"""What a format cannot hold as plain factors of a rank that is asked for: other kinds of deltas,
DoRA; and convolutions with a core as plain ones, which loses nothing."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.formats import kinds
from adapterkit.formats.capabilities import lacking
from adapterkit.formats.deltas import ModuleDelta
from adapterkit.formats.fitted import Fit, Fitted
from adapterkit.formats.names import kernel_of
from adapterkit.formats.record import FACTORS, Contents, Module
from adapterkit.formats.schema import Format
from adapterkit.formats.tensors import Contracted, scaled
from adapterkit.planning.base_weights import CHECK_BASE, BaseWeights
from adapterkit.weights.parameters import StoredParameter

OTHERS = ("loha", "lokr", "oft", "full")


@dataclass(frozen=True)
class _Source:
    """What `BaseWeights` asks of an adapter."""

    config: Mapping[str, Any]
    name: str


def lowered(
    contents: Contents, form: Format, *, rank: int | None, base: Checkpoint | None
) -> Contents:
    """The contents with plain factors for what the format cannot hold, and with `rank` for all
    other kinds of deltas; what cannot be made into them stays, for the writer to refuse.

    `Refused` where the base is needed and not given, or does not fit.
    """
    modules = [_without_core(m) if _lacks_core_only(m, form, contents) else m
               for m in contents.modules]  # fmt: skip
    contents = replace(contents, modules=tuple(modules))
    if rank is None:
        return contents
    chosen = [m for m in modules if _is_to_fit(m, form, contents)]
    if not chosen:
        return contents
    job = _Fitting(contents, rank, base, chosen)
    fitted = {id(m): one for m in chosen if (one := job.fitted(m)) is not None}
    refuse_all(job.errors)
    own = [part for m in modules for part in fitted.get(id(m), [m])]
    return replace(contents, modules=tuple(own), notes=(*contents.notes, *job.all_notes()))


def _lacks_core_only(module: Module, form: Format, contents: Contents) -> bool:
    return "mid" in module.parts and lacking(module, form, contents) == ["mid"]


def _without_core(module: Module) -> Module:
    """A convolution with a core as a plain one: a'[m, i] = Σ_n mid[m, n] a[n, i]."""
    parts = dict(module.parts)
    parts["a"] = Contracted((parts.pop("mid"), parts["a"]))
    rank = parts["a"].shape[0]
    return replace(module, parts=parts, alpha=module.scale * rank, rank=rank)


def _is_to_fit(module: Module, form: Format, contents: Contents) -> bool:
    """Whether plain factors take a delta's place."""
    if module.kind in OTHERS:
        return module.kind != "full" or len(module.parts.get("diff", _NOTHING).shape) > 1
    return module.kind == FACTORS and bool(lacking(module, form, contents))


@dataclass
class _Fitting:
    """Plain factors of modules while they are planned."""

    contents: Contents
    rank: int
    base: Checkpoint | None
    modules: Sequence[Module]
    errors: list[AdapterkitError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)  # modules taken for linear layers

    def __post_init__(self) -> None:
        where = self.contents.folders[0].label
        needy = [m.path for m in self.modules if self._needs_base(m)]
        components = {m.component for m in self.modules if self._needs_base(m)}
        self.weights: BaseWeights | None = None
        if needy and self.base is None:
            self.errors.append(
                Refused(
                    f"{len(needy)} modules whose delta depends on the weight (DoRA, OFT): "
                    f"{listed(needy)}",
                    expected="--base BASE, the model they were trained on",
                    where=where,
                    hint="give --base",
                )
            )
        elif len(components) > 1:
            self.errors.append(
                Refused(
                    f"deltas that depend on the weights of {listed(sorted(components))}",
                    expected="one component at a time, with its --base",
                    where=where,
                    hint="give --prefix-only COMPONENT and the folder of that component as --base",
                )
            )
        elif self.base is not None:
            source = _Source(self.contents.config, where)
            names = [m.name for m in self.modules]
            self.weights = BaseWeights(self.base, source, names, self.notes)

    @staticmethod
    def _needs_base(module: Module) -> bool:
        return module.kind == "oft" or bool(kinds.magnitudes(module.parts))

    def fitted(self, module: Module) -> list[Module] | None:
        """The module as plain factors, and what else it holds; None where it stays as it is."""
        try:
            return self._fitted(module)
        except AdapterkitError as error:
            self.errors.append(error)
            return None

    def _fitted(self, module: Module) -> list[Module] | None:
        if module.embedding or module.depth:
            return None
        needs = self._needs_base(module)
        weight = None
        if self.weights is not None and (needs or self._is_unknown(module)):
            weight = self.weights.of(module.name, False)
        elif needs:
            return None  # refused already
        self._check(module, weight)
        delta = ModuleDelta(module, weight if needs else None)
        tail = self._tail(module, weight)
        fit = Fit(module.path, delta, tail, min(self.rank, delta.rank))
        parts: dict = {"a": Fitted(fit, "a"), "b": Fitted(fit, "b")}
        if "bias" in module.parts:
            parts["bias"] = scaled(module.parts["bias"], module.scale)
        one = replace(
            module, kind=FACTORS, parts=parts, alpha=float(fit.rank), rank=fit.rank,
            stored_alpha=None,
        )  # fmt: skip
        if module.kind == "full" and "diff_b" in module.parts:
            rest = replace(module, parts={"diff_b": module.parts["diff_b"]})
            return [one, rest]
        return [one]

    def _check(self, module: Module, weight: StoredParameter | None) -> None:
        if weight is None:
            return
        out, inputs = kinds.matrix_shape(module.kind, module.parts)
        shape = weight.weight_shape[0], math.prod(weight.weight_shape[1:])
        if out != shape[0] or inputs not in (0, shape[1]):
            raise Refused(
                f"{shown(module.path)}: a delta of {out} rows and {inputs or 'any'} columns",
                expected=f"one for the base's {weight.weight_shape}",
                where=self.contents.folders[0].label,
                hint=CHECK_BASE,
            )

    def _is_unknown(self, module: Module) -> bool:
        return module.kind == "oft" or kinds.tail_of(module.kind, module.parts) is None

    def _tail(self, module: Module, weight: StoredParameter | None) -> tuple[int, ...]:
        """The axes after `out`: of the file, of the base, of the architecture."""
        if weight is not None:
            return weight.weight_shape[1:]
        tail = kinds.tail_of(module.kind, module.parts)
        if tail is not None:
            return tail
        inputs = kinds.matrix_shape(module.kind, module.parts)[1]
        kernel = kernel_of(self.contents.architectures, module.component, module.name)
        if kernel is None:
            self.guessed.append(module.path)
            return (inputs,)
        if inputs % math.prod(kernel):
            raise Refused(
                f"{shown(module.path)}: {inputs} columns, and a kernel of {kernel}",
                expected="a multiple of the kernel's size",
                where=self.contents.folders[0].label,
                hint="give --base, the model it was trained on",
            )
        return (inputs // math.prod(kernel), *kernel)

    def all_notes(self) -> list[str]:
        counts = Counter("DoRA" if m.kind == FACTORS else m.kind for m in self.modules)
        what = ", ".join(f"{count} modules of {kind}" for kind, count in sorted(counts.items()))
        notes = [f"{what} are plain factors of rank {self.rank} at most: the receipt has the error"]
        if self.guessed:
            notes.append(
                "convolutions with flattened kernels look like linear layers here: give --base if "
                "the model has any"
            )
        return [*self.notes, *notes]


class _Nothing:
    shape = ()


_NOTHING = _Nothing()
