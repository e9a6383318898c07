"""Records, config checks and singular values of deltas for all types of adapters."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol

from adapterkit.core.adapter.config import SHARED_SETTINGS, check_settings, check_unknown_settings
from adapterkit.core.adapter.peft import read_other_type
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.dtypes import FLOATS
from adapterkit.core.errors import AdapterkitError, Problems, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Check
from adapterkit.core.registry import STABLE, Tier
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank import algebra, truncated
from adapterkit.kernels.lowrank.algebra import Product, Svd

BLOCK = 1 << 20  # elements of a weight converted to float64 at a time
# Settings of all types that do not affect a delta
UNUSED_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "module_dropout",
    "modules_to_save", "peft_type", "peft_version", "rank_dropout", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip


class Delta(Protocol):
    """The delta of one adapted module; a frozen record."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), a kernel's axes flattened."""
        ...

    @property
    def trailing_shape(self) -> tuple[int, ...] | None:
        """The axes after `out` of a LoRA of it; None if the file does not determine them."""
        ...

    @property
    def rank(self) -> int:
        """Upper bound of the rank; 0 if the module was pruned."""
        ...

    @property
    def reads(self) -> tuple[TensorSpec, ...]: ...

    @property
    def memory(self) -> int:
        """Bytes that `leading_triplets` uses at most."""
        ...

    def value(self, reader: TensorReader) -> Product | Tensor:
        """The delta: a product in float64 if its rank is low, else (out, in) float32."""
        ...

    def leading_triplets(
        self, reader: TensorReader, most: int, energy: float | None
    ) -> tuple[Svd, float]:
        """Leading singular triplets, and Σ s² of all.

        At least `most`, or with `energy` those that keep this share of Σ s², at most `most`.
        """
        ...


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its tensors in the file, and its weight in the base."""

    adapter: Adapter
    module: str
    parts: dict[str, TensorSpec]  # by the names in `Kind.keys`
    shared: dict[str, TensorSpec]  # by the names in `Kind.shared`
    weight: StoredParameter | None
    has_bias: bool = False  # that LoRA factors would leave as it is

    def require(self, *names: str) -> list[TensorSpec]:
        """The tensors of these names; `Refused` if one is missing."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            problem = f"{shown(self.module)} has {', '.join(sorted(self.parts))}"
            hint = "save the adapter again, with its config"
            Problems(where=self.adapter.label, code="AK302").fail(
                problem, f"also {', '.join(missing)}", hint
            )
        return [self.parts[name] for name in names]

    def check(self, fits: bool, expected: str) -> None:
        """Raise `Refused` with the shapes of all parts unless `fits`."""
        if not fits:
            shapes = ", ".join(f"{name} {spec.shape}" for name, spec in sorted(self.parts.items()))
            hint = "restore the config that was saved with the file, and check the base"
            self.fail(shapes, expected, hint)

    def fail(self, reason: str, expected: str, hint: str) -> NoReturn:
        """Raise `Refused` for this module."""
        errors = Problems(where=self.adapter.label, code="AK302")
        errors.fail(f"{shown(self.module)}: {reason}", expected, hint)


class Kind(Protocol):
    """A type of adapter: the class of its deltas, and the keys and settings of the type."""

    name: ClassVar[str]  # PEFT's peft_type, in lower case
    keys: ClassVar[tuple[str, ...]]  # tensors of a module
    shared: ClassVar[tuple[str, ...]]  # tensors that belong to all modules
    settings: ClassVar[dict[str, Check]]  # settings that its arithmetic depends on
    unused_settings: ClassVar[frozenset[str]]  # others, besides UNUSED_SETTINGS
    needs_base: ClassVar[str]  # the reason, or "" if it does not

    @staticmethod
    def check(config: dict, where: str) -> list[AdapterkitError]:
        """Errors of a config whose settings are valid one by one."""
        ...

    @staticmethod
    def from_module(adapted: AdaptedModule) -> Delta:
        """The module's delta; `Refused` if the shapes do not fit."""
        ...


def read_kind(
    kind: type[Kind], folder: Folder, number: int
) -> tuple[Adapter, dict[str, dict[str, TensorSpec]]]:
    """An adapter of that type, and the tensors of each module; shared tensors are under ""."""
    adapter, roles = read_other_type(
        folder,
        number,
        lambda config, where: _check_settings(kind, config, where),
        (*kind.keys, *kind.shared),
    )
    errors = Problems(where=folder.name, code="AK302")
    modules: dict[str, dict[str, TensorSpec]] = {"": {}}
    for (module, depth), parts in sorted(roles.items()):
        for key, spec in parts.items():
            if spec.dtype not in FLOATS or depth:
                problem = f"{shown(spec.key)} is {spec.dtype}" + (
                    " and is inside another adapter's layer" if depth else ""
                )
                hint = "save the adapter again, alone and as floats"
                errors.add(problem, "F32, F16, BF16 or F64 on the model's own layer", hint)
            modules.setdefault("" if key in kind.shared else module, {})[key] = spec
    errors.raise_all()
    return adapter, modules


def _check_settings(kind: type[Kind], config: dict, where: str) -> list[AdapterkitError]:
    known = UNUSED_SETTINGS | kind.unused_settings | set(kind.settings)
    errors = check_unknown_settings(config, known, where)
    errors += check_settings(SHARED_SETTINGS | kind.settings, config, where)
    return errors or kind.check(config, where)


def no_errors(config: dict, where: str) -> list[AdapterkitError]:
    """The `Kind.check` of a type without rules across settings."""
    return []


class ComputedDelta(ABC):
    """Base of deltas whose triplets are computed from their value."""

    tier: ClassVar[Tier] = STABLE

    @abstractmethod
    def value(self, reader: TensorReader) -> Product | Tensor:
        """A product in float64, its scale folded in, or the dense delta."""

    def leading_triplets(
        self, reader: TensorReader, most: int, energy: float | None
    ) -> tuple[Svd, float]:
        """Singular triplets from the value; for a product all of them."""
        delta = self.value(reader)
        if not isinstance(delta, Product):
            return truncated.leading_svd(delta, most, energy)
        svd = algebra.svd(delta)
        return svd, float(svd.s.square().sum())


class WeightDelta(ComputedDelta):
    """Base of deltas that depend on the base's weight: dense, of any rank."""

    weight: StoredParameter

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.weight_shape[0], math.prod(self.weight.weight_shape[1:])

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        return self.weight.weight_shape[1:]

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def memory(self) -> int:
        return 28 * math.prod(self.shape)


class ProductDelta(ComputedDelta):
    """Base of the deltas of linear layers that are a product of two matrices, made from stored
    factors a (rank, in) and b (out, rank)."""

    a: TensorSpec
    b: TensorSpec

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def memory(self) -> int:
        return 12 * (self.a.nbytes + self.b.nbytes)


def map_rows(weight: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """change(rows in float64, their slice) for all rows of a weight by blocks, as float32."""
    delta = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    step = max(BLOCK // max(weight.shape[1], 1), 1)
    for first in range(0, len(weight), step):
        here = slice(first, first + step)
        delta[here] = change(weight[here].double(), here)
    return delta


def kernel_tail(inputs: int, kernel: Sequence[int]) -> tuple[int, ...] | None:
    """Axes after `out`; None for a kernel (k, 1), because PEFT stores a Conv1d's the same way."""
    if not kernel:
        return (inputs,)
    return None if kernel[-1] == 1 else (inputs, *kernel)


def read_float64(reader: TensorReader, *specs: TensorSpec) -> Iterator[Tensor]:
    """Tensors in float64."""
    return (reader.tensor(spec).double() for spec in specs)
