"""A merge while it is planned: what was asked, the inputs, and what happens to each parameter of the base."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from adapterkit.adapters.record import Adapter, Lora
from adapterkit.checkpoint.compare import same_bytes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.patterns import matcher
from adapterkit.planning.history import Held
from adapterkit.planning.merge.placement import Product
from adapterkit.planning.merge.replication import replicated
from adapterkit.weights.decoded import decoded_view
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import Parameter


@dataclass(frozen=True)
class Options:
    """The options of the command; fields have their names."""

    dtype: str | None = None
    max_shard_size: str | int | None = None
    include: str | None = None
    exclude: str | None = None
    tied: str = "untie"
    base_is_residual: bool = False
    compat: str | None = None
    expert_layout: str | None = None
    tokenizer: str | None = None
    dequantize: bool = False
    rounding: str = "nearest"
    seed: int = 0
    base_copies: str | None = None


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
        return len(self.parameter.shape) == 3 and all(
            product.experts is not None for product in products
        )


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


class Job:
    """One merge while it is planned: its inputs, and what the adapters do to the base's parameters."""

    def __init__(
        self, base: Checkpoint, adapters: list[Adapter], weights: list[float], options: Options
    ):
        self.adapters, self.weights, self.options = adapters, weights, options
        self.errors: list[AdapterkitError] = []
        self.notes: list[str] = []
        self.held: list[Held] = []  # adapters in the base already
        self.left_out: list[str] = []
        self.changes: dict[str, Change] = {}
        self.new: dict[str, Change] = {}  # parameters that the base does not store: heads
        self.original = base
        self.base = replicated(decoded_view(base), adapters, self.errors)
        self.config: dict[str, Any] = json.loads(json.dumps(self.base.config))
        self.included = matcher(options.include, "--include") if options.include else None
        self.excluded = matcher(options.exclude, "--exclude") if options.exclude else None
        self.names = self._names()

    def _names(self) -> Names:
        wanted: dict[str, None] = {}
        build_model = False
        vocabulary = {v for v in (nested(self.base.config, "vocab_size")) if isinstance(v, int)}
        for adapter in self.adapters:
            for lora in adapter.loras:
                if lora.kind == "embedding" or (vocabulary & {lora.b.shape[0], lora.a.shape[-1]}):
                    build_model = True
                if len(lora.a.shape) > 2 or adapter.config.get("target_parameters"):
                    build_model = True
                if self.taken(lora.module) and not adapter.config.get("target_parameters"):
                    wanted[lora.module + ".weight"] = None
            build_model = (
                build_model
                or bool(adapter.tokens)
                or any(len(s.shape) > 1 for s in adapter.replaced.values())
            )
            wanted |= {name: None for name in adapter.replaced if self.takes(name)}
            wanted |= {
                tokens.module + ".weight": None
                for tokens in adapter.tokens
                if self.taken(tokens.module)
            }
        config = self.adapters[0].config
        trained = config.get("auto_mapping") or {}
        trained_class = trained.get("base_model_class") if isinstance(trained, dict) else None
        return Names(
            self.base,
            tuple(wanted),
            config.get("task_type"),
            trained_class,
            build_model,
            self.notes,
        )

    @cached_property
    def leaves(self) -> dict[str, list[str]]:
        """The last names of a module's stored tensors, by module."""
        found: dict[str, list[str]] = {}
        for key in self.base.tensors:
            module, _, leaf = key.rpartition(".")
            found.setdefault(module, []).append(leaf)
        return found

    def taken(self, module: str) -> bool:
        if self.included is not None and not self.included(module):
            return False
        return not (self.excluded is not None and self.excluded(module))

    def takes(self, parameter: str) -> bool:
        """Whether a replaced parameter is among those asked for: by its module's name or its own."""
        names = (parameter.rpartition(".")[0], parameter)
        if self.included is not None and not any(map(self.included, names)):
            return False
        return not (self.excluded is not None and any(map(self.excluded, names)))

    def leave_out(self, adapter: Adapter, name: str) -> None:
        self.left_out.append(f"{adapter.name}: {name}")

    def change(self, parameter: Parameter) -> Change:
        return self.changes.setdefault(parameter.name, Change(parameter))

    def bytes_of(self, spec: TensorSpec) -> bytes:
        """All bytes of an adapter's tensor."""
        return self.adapters[spec.folder - 1].folder.read(spec.file, spec.start, spec.stop)

    def equal_bytes(self, a: TensorSpec | None, b: TensorSpec | None) -> bool:
        """Whether two tensors of adapters are the same, bit for bit."""
        if a is None or b is None or a == b:
            return a == b
        return same_bytes(*((self.adapters[spec.folder - 1].folder, spec) for spec in (a, b)))

    def unknown(self, adapter: Adapter, key: str, name: str) -> Refused:
        return Refused(
            f"{shown(key)}: the base has no {shown(name)}",
            expected="only parameters of the base",
            where=adapter.label,
            hint="check that the adapter was trained on this base" + self._hint(),
        )

    def _hint(self) -> str:
        return f" ({self.notes[-1].splitlines()[0]})" if self.notes else ""

    def misshaped(
        self, adapter: Adapter, key: str, found: Any, expected: tuple[int, ...]
    ) -> Refused:
        return Refused(
            f"{shown(key)}: shape {found}",
            expected=f"one that fits the base's {expected}",
            where=adapter.label,
            hint="check that the adapter was trained on this base",
        )


def nested(config: dict, key: str) -> list:
    """The key's values in the config and in its sub-configs."""
    found = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, dict):
            found += nested(value, key)
    return found
