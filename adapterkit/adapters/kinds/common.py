"""What the types of adapters share: a module as file and base show it, checks of configs, and the ways from a delta to its singular
values."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from adapterkit.adapters.config import check_known, check_types, is_number, unfit
from adapterkit.adapters.peft import read_other_type
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.dtypes import FLOATS
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Product, Svd
from adapterkit.weights.parameters import StoredParameter
from adapterkit.weights.reader import TensorReader

ROWS = 1 << 20  # elements of a weight computed in float64 at a time
Test = tuple[str, Callable[[Any], bool]]  # what a setting must be, in words and as a test
WHOLE: Test = ("a whole number above 0", lambda value: is_number(value, whole=True))
COUNT: Test = ("a whole number", lambda value: value == 0 or is_number(value, whole=True))
NUMBER: Test = ("a finite number", lambda value: is_number(value, whole=False))
FLAG: Test = ("true or false", lambda value: type(value) is bool)
# Settings of every type that change nothing of a delta
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights",
    "layers_pattern", "layers_to_transform", "module_dropout", "modules_to_save", "peft_type", "peft_version", "rank_dropout",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip


class Delta(Protocol):
    """What one adapted module adds to its weight; a frozen record."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), a kernel's axes flattened."""
        ...

    @property
    def tail(self) -> tuple[int, ...] | None:
        """The axes behind out that a LoRA of it has, as far as the file tells; None where it leaves open which they are."""
        ...

    @property
    def rank(self) -> int:
        """At most; 0 where the module was pruned away."""
        ...

    @property
    def reads(self) -> tuple[TensorSpec, ...]: ...

    @property
    def memory(self) -> int:
        """Bytes that its singular values take at most."""
        ...

    def leading(self, inputs: TensorReader, most: int, energy: float | None) -> tuple[Svd, float]:
        """Its leading triplets, at least as many as asked for, and Σ s² of all: `most`, or with `energy` those that keep that
        share and are no more than `most`."""
        ...


@dataclass(frozen=True)
class Adapted:
    """One adapted module, as the file and the base show it."""

    adapter: Adapter
    module: str
    parts: dict[str, TensorSpec]  # by the type's name for it
    shared: dict[str, TensorSpec]  # what belongs to all modules
    weight: StoredParameter | None

    def part(self, *names: str) -> list[TensorSpec]:
        """The tensors of these names; `Refused` where one is missing."""
        lacking = [name for name in names if name not in self.parts]
        if lacking:
            found = f"{shown(self.module)} has {', '.join(sorted(self.parts))}"
            raise Refused(
                found,
                expected=f"also {', '.join(lacking)}",
                where=self.adapter.label,
                hint="save the adapter again, with its config",
            )
        return [self.parts[name] for name in names]

    def check(self, fits: bool, expected: str) -> None:
        """`Refused` with the shapes of all parts unless they fit."""
        if not fits:
            found = ", ".join(f"{name} {spec.shape}" for name, spec in sorted(self.parts.items()))
            hint = "restore the config that was saved with the file, and check the base"
            raise Refused(
                f"{shown(self.module)}: {found}",
                expected=expected,
                where=self.adapter.label,
                hint=hint,
            )

    def refused(self, why: str, expected: str, hint: str) -> Refused:
        return Refused(
            f"{shown(self.module)}: {why}", expected=expected, where=self.adapter.label, hint=hint
        )


class Kind(Protocol):
    """A type of adapters: the record of one module's delta. Its class says what the type's files and configs hold."""

    name: ClassVar[str]  # PEFT's peft_type, in lower case
    keys: ClassVar[tuple[str, ...]]  # its tensors
    shared: ClassVar[tuple[str, ...]]  # those that belong to all modules
    settings: ClassVar[dict[str, Test]]  # what its arithmetic depends on
    harmless: ClassVar[frozenset[str]]  # what it does not depend on, besides HARMLESS
    base: ClassVar[str]  # why it needs the base, if it does

    @staticmethod
    def check(config: dict, where: str) -> list[AdapterkitError]:
        """What else is wrong with the config."""
        ...

    @staticmethod
    def of(adapted: Adapted) -> Delta:
        """The module's delta; `Refused` where the file's shapes do not fit."""
        ...


def read_kind(
    kind: type[Kind], folder: Folder, number: int
) -> tuple[Adapter, dict[str, dict[str, TensorSpec]]]:
    """An adapter of that type: what is no delta, and each module's tensors; those of all modules stand under ""."""
    adapter, roles = read_other_type(
        folder,
        number,
        lambda config, where: _check(kind, config, where),
        (*kind.keys, *kind.shared),
    )
    errors: list[AdapterkitError] = []
    modules: dict[str, dict[str, TensorSpec]] = {"": {}}
    for (module, depth), parts in sorted(roles.items()):
        for key, spec in parts.items():
            if spec.dtype not in FLOATS or depth:
                found = f"{shown(spec.key)} is {spec.dtype}" + (
                    " and lies inside another adapter's layer" if depth else ""
                )
                hint = "save the adapter again, alone and as floats"
                errors.append(
                    Refused(
                        found,
                        expected="F32, F16, BF16 or F64 on the model's own layer",
                        where=folder.name,
                        hint=hint,
                    )
                )
            modules.setdefault("" if key in kind.shared else module, {})[key] = spec
    refuse_all(errors)
    return adapter, modules


def _check(kind: type[Kind], config: dict, where: str) -> list[AdapterkitError]:
    errors = check_known(
        config, HARMLESS | kind.harmless | set(kind.settings), where
    ) + check_types(config, where)
    for key, (expected, good) in kind.settings.items():
        if not good(config.get(key)):
            errors.append(unfit(config, key, expected, where))
    return errors or kind.check(config, where)


class OnWeight:
    """What records share whose delta depends on the base's weight: dense, of any rank."""

    weight: StoredParameter

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.weight_shape[0], math.prod(self.weight.weight_shape[1:])

    @property
    def tail(self) -> tuple[int, ...]:
        return self.weight.weight_shape[1:]

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def memory(self) -> int:
        return 28 * math.prod(self.shape)


def of_product(product: Product) -> tuple[Svd, float]:
    """All singular values of left @ right, from its factors."""
    svd = lowrank.svd(product)
    return svd, float(svd.s.square().sum())


def of_weight(weight: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """change(rows, which) for all rows of a weight, some at a time in float64, as float32."""
    delta = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    step = max(ROWS // max(weight.shape[1], 1), 1)
    for first in range(0, len(weight), step):
        here = slice(first, first + step)
        delta[here] = change(weight[here].double(), here)
    return delta


def kernel_tail(inputs: int, kernel: Sequence[int]) -> tuple[int, ...] | None:
    """Axes of a convolution's input; PEFT stores a kernel of one axis as (k, 1), so that one may be either."""
    if not kernel:
        return (inputs,)
    return None if kernel[-1] == 1 else (inputs, *kernel)


def doubles(inputs: TensorReader, *specs: TensorSpec) -> Iterator[Tensor]:
    """Tensors in float64."""
    return (inputs.tensor(spec).double() for spec in specs)
