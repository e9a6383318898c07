"""The neutral form of an adapter between two formats: its modules, in the names of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from adapterkit.adapters.formats.modules.kinds import KINDS
from adapterkit.adapters.formats.modules.tensors import Expression
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.records import Settings

BASE = "base_model_name_or_path"  # of a source's config
LANGUAGE = ""  # the component of an adapter for a single model


@dataclass(frozen=True)
class StoredAlpha:
    """An alpha as the source stores it; it is written unchanged if the number is the same."""

    expression: Expression
    number: float


@dataclass(frozen=True)
class AdapterModule:
    """The change of one module by an adapter: expressions by role.

    kind lora: delta = scale · b @ a, with a (r, in, *kernel), b (out, r, *1), mid (r, r, *kernel),
    magnitude (out,) of DoRA and bias (out,), times scale; of an embedding (b @ a)ᵀ. kind experts:
    delta[e] = scale · b[e] @ a[e] of a stack, with a (E, r, in), b (E, out, r).
    """

    component: str  # of a pipeline: unet, transformer, text_encoder, ...; "" of a single model
    name: str  # dotted path in the model as transformers or diffusers loads it
    kind: str
    parts: Mapping[str, Expression]
    alpha: float
    rank: int
    embedding: bool = False
    depth: int = 0  # wrappers of the module's other parameters around this one's factors
    inward: bool | None = None  # of a stack: the model keeps its matrices (in, out)
    stored_alpha: StoredAlpha | None = None  # of the source's module
    whole: tuple[str, ...] = ()  # the modules that share its norms of inputs

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def path(self) -> str:
        """The name with the component in front, for messages and receipts."""
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def out(self) -> int:
        """Rows of the delta."""
        return self.parts["b"].shape[KINDS[self.kind].rank["b"] - 1]


Modules = Sequence[AdapterModule]


@dataclass(frozen=True)
class Contents:
    """The contents of a source; its tensors are expressions over the job's inputs."""

    format: str
    folders: tuple[Folder, ...]  # the inputs, by the numbers in the specs
    modules: Modules
    architectures: tuple[str, ...] = ()  # those with fitting names; empty: not searched
    # architecture -> component -> the column of its rules that the source's names are in
    namings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Settings = field(default_factory=dict)  # of the source, by component or plain
    facts: Settings = field(default_factory=dict)  # base (a Hub id), invocation (tokens)
    headers: Mapping[tuple[int, str], str] = field(default_factory=dict)  # sha256 of the inputs'
    notes: Sequence[str] = ()
    refitted: bool = False  # ranks and scales are no longer the source's

    @cached_property
    def common_roles(self) -> dict[tuple[str, str], set[str]]:
        """The roles that all modules of a component and kind have."""
        roles: dict[tuple[str, str], set[str]] = {}
        for module in self.modules:
            roles.setdefault(
                (module.component, module.kind), set(module.parts)
            ).intersection_update(module.parts)
        return roles

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module.component for module in self.modules))
