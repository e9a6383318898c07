"""Make the patches of an adapter at the modules of a model from new or stored values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from adapterkit.core.adapter.config import TASK_HEADS
from adapterkit.core.adapter.record import Adapter, Tokens
from adapterkit.core.adapter.targets import has_end
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Problems, shown
from adapterkit.core.patterns import similar_names
from adapterkit.runtime.layers import patch_class
from adapterkit.runtime.layers.parameter import ParameterPatch, is_transposed
from adapterkit.runtime.layers.tied import share, shared_heads
from adapterkit.runtime.patches.copies import (
    CopyPatch,
    bare_copy,
    known_parameter,
    mirrors,
    outermost,
    parameter_of,
    value_patches,
)
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.tokens import token_patches
from adapterkit.runtime.site import Patch, owner
from adapterkit.runtime.state import State
from adapterkit.runtime.targets import own_modules
from adapterkit.runtime.targets import unread as why_unread
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.targets import embeddings_of, input_embedding, tied_modules

T = TypeVar("T")


@dataclass(frozen=True)
class OtherValues(Generic[T]):
    """An adapter's values other than factors, by the model's names: tensors, or their specs."""

    copies: Mapping[str, Mapping[str, T]]  # path -> name in it; {}: present values
    biases: Mapping[str, T]  # trained
    weights: Mapping[str, T]  # not trained
    rows: Mapping[str, tuple[Sequence[int], T]]  # by embedding or head: indices of tokens, values


@dataclass(frozen=True)
class PatchMaker:
    """Makes the patches of an adapter, on the devices of their modules' weights."""

    state: State
    name: str
    config: LoraConfig
    dtype: torch.dtype | None  # of factors, biases and rows; None: as they are
    ephemeral_gpu_offload: bool = False

    def on_layer(
        self,
        path: str,
        kind: type[FactorsPatch],
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        base_lacks: bool = False,  # the product of these first factors, which is subtracted
    ) -> FactorsPatch:
        where = factor_device(self.state.modules[path])
        a, b = a.to(where, self.dtype), b.to(where, self.dtype)
        return patch_class(kind, self.config)(
            self.name,
            a,
            b,
            scale,
            dropout=self.config.dropout,
            bias=None if bias is None else bias.to(where, self.dtype),
            magnitude=None if magnitude is None else magnitude.to(where, self.dtype),
            initial=(a.clone(), b.clone()) if base_lacks else None,
            ephemeral_gpu_offload=self.ephemeral_gpu_offload,
        )

    def on_parameter(
        self, path: str, leaf: str, a: Tensor, b: Tensor, scale: float, depth: int
    ) -> ParameterPatch:
        host = self.state.modules[path]
        a, b = (value.to(factor_device(host), self.dtype) for value in (a, b))
        transposed = is_transposed(host, leaf)
        return ParameterPatch(self.name, a, b, scale, leaf=leaf, transposed=transposed, depth=depth)

    def all_patches(
        self,
        factors: Sequence[tuple[str, FactorsPatch]],
        values: OtherValues[Tensor],
        heads: Mapping[str, str] | None = None,
    ) -> list[tuple[str, Patch]]:
        """All patches by their modules, factors first. `heads`: the embedding that each head shares
        factors with; None: those with equal factors."""
        model, modules, whole = self.state.model, self.state.modules, own_modules(self.state.model)
        patches: list[tuple[str, Patch]] = [*factors]
        if self.config.tie:
            heads = shared_heads(patches, modules) if heads is None else heads
            patches = share(patches, heads, self.config.dropout)
        copied: list[tuple[str, CopyPatch]] = []
        shared: dict[int, Any] = {}  # weights of tied modules, of which the copies have one, too
        for path, own in values.copies.items():
            twin = bare_copy(modules[path], shared if self.config.tie else {})
            for leaf, value in own.items():
                _fill(twin, leaf, value)
            copied.append((path, CopyPatch(self.name, twin)))
        biases = {name: self._moved(value, modules, name) for name, value in values.biases.items()}
        rows = {
            path: (indices, self._moved(value, whole, f"{path}.weight"))
            for path, (indices, value) in values.rows.items()
        }
        patches += [*copied, *mirrors(modules, copied)]
        for own, trained in ((biases, True), (values.weights, False)):
            patches += value_patches(modules, self.name, own, trained=trained, copied=values.copies)
        embedding = input_embedding(model, whole) if rows else None
        return patches + token_patches(model, whole, self.name, rows, embedding)

    def _moved(self, value: Tensor, modules: Mapping[str, nn.Module], name: str) -> Tensor:
        """A value on the device of a parameter; on the CPU while that is on meta."""
        own = known_parameter(modules, name)
        return value.to("cpu" if own.is_meta else own.device, self.dtype)


@torch.no_grad()
def _fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer of a copy, in its dtype; a new one if it is on meta."""
    inner, leaf = owner(module, name)
    own = getattr(inner, leaf)
    if not own.is_meta:
        own.copy_(value)
    elif isinstance(own, nn.Parameter):
        inner._parameters[leaf] = nn.Parameter(value.to(own.dtype), requires_grad=False)
    else:
        inner._buffers[leaf] = value.to(own.dtype)


def factor_device(host: nn.Module) -> torch.device:
    """The device for a host's factors: its weight's device; the execution device if accelerate
    offloads it; otherwise the CPU."""
    tensor: Tensor | None = next(host.parameters(), None)
    if tensor is None:
        tensor = next(host.buffers(), None)
    if tensor is not None and not tensor.is_meta:
        return tensor.device
    hook = vars(host).get("_hf_hook")
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def find_values(
    state: State, adapter: Adapter, config: LoraConfig, errors: Problems
) -> OtherValues[TensorSpec]:
    """Find the values other than factors in a file, and add those that do not fit to the errors."""
    copied: dict[str, dict[str, TensorSpec]] = {}
    biases: dict[str, TensorSpec] = {}
    weights: dict[str, TensorSpec] = {}
    modules, entries = own_modules(state.model), list(adapter.saved)
    embedding = input_embedding(state.model, modules) if config.tie else None
    if embedding is not None:  # PEFT's config names the embedding alone
        tied = [embedding, *tied_modules(modules, embedding)]
        entries += tied if any(adapter.saves(f"{path}.weight") for path in tied) else ()
    for name, spec in adapter.replaced.items():
        path = outermost(name, entries)
        if path is not None:
            copied.setdefault(path, {})[name.removeprefix(f"{path}.")] = spec
        elif config.bias != "none" and name.rpartition(".")[2] == "bias":
            biases[name] = spec
        else:
            weights[name] = spec
    for path, specs in copied.items():
        _check_copy(state, path, specs, errors)
    for name, spec in {**biases, **weights}.items():
        own = parameter_of(state.modules, name)
        if own is None:
            _add_unknown(state, name, errors)
        elif tuple(own.shape) != spec.shape:
            _add_wrong_shape(state, name, spec, own, errors)
    for tokens in adapter.tokens:
        _check_rows(state, tokens, errors)
    heads = TASK_HEADS.get(config.task_type or "", ())
    for path in modules:
        if any(has_end(path, head) for head in heads) and path not in copied:
            problem = f"no values of {shown(path)}, the head of a {config.task_type} model"
            hint = "save the adapter again, with the head in modules_to_save"
            errors.add(problem, "its trained values", hint, code="AK803")
    rows = {one.module: (one.indices, one.values) for one in adapter.tokens}
    return OtherValues(copied, biases, weights, rows)


def read_values(
    state: State,
    values: OtherValues[TensorSpec],
    read: Callable[[TensorSpec], Tensor],
    read_trained: Callable[[TensorSpec], Tensor],  # biases and rows
) -> OtherValues[Tensor]:
    """Read the values of a file; copies and weights get the base's dtypes. Weights equal to the
    base's own are left out."""
    weights = {}
    for name, spec in values.weights.items():
        own = known_parameter(state.modules, name)
        value = read(spec).to(own.dtype)
        if own.is_meta or not torch.equal(value := value.to(own.device), own):
            weights[name] = value
    return OtherValues(
        {p: {name: read(spec) for name, spec in own.items()} for p, own in values.copies.items()},
        {name: read_trained(spec) for name, spec in values.biases.items()},
        weights,
        {path: (indices, read_trained(spec)) for path, (indices, spec) in values.rows.items()},
    )


def _check_copy(state: State, path: str, specs: Mapping[str, TensorSpec], errors: Problems) -> None:
    if path not in state.modules:
        _add_unknown(state, path, errors)
        return
    own = state.modules[path].state_dict()
    expected = f"the values of the model's {shown(path)}"
    for problem, names in (
        ("no values of", own.keys() - specs.keys()),
        ("values of", specs.keys() - own.keys()),
    ):
        if names:
            listed = ", ".join(shown(f"{path}.{name}") for name in sorted(names))
            errors.add(f"{problem} {listed}", expected, code="AK803")
    for name in own.keys() & specs.keys():
        if tuple(own[name].shape) != specs[name].shape:
            _add_wrong_shape(state, f"{path}.{name}", specs[name], own[name], errors)


def _check_rows(state: State, tokens: Tokens, errors: Problems) -> None:
    name = f"{tokens.module}.weight"
    own = parameter_of(state.modules, name)
    if own is None:
        _add_unknown(state, tokens.module, errors)
        return
    if unread := why_unread(state.model, state.modules, tokens.module):
        problem = f"trained rows that do nothing: {unread.problem}"
        errors.add(problem, unread.expected, "remove them from the file", code="AK803")
    outside = [index for index in tokens.indices if index >= len(own)]
    if outside:
        problem = f"trained rows {outside} of {shown(name)}, which has {len(own)}"
        call = f"model.resize_token_embeddings({max(outside) + 1})"
        errors.add(
            problem,
            "rows that the model has",
            f"{call} or more first, as in training",
            code="AK803",
        )
    if tokens.values.shape[1:] != own.shape[1:]:
        _add_wrong_shape(state, tokens.values.key, tokens.values, own, errors)


def _add_unknown(state: State, name: str, errors: Problems) -> None:
    hint = similar_names(name, list(state.modules))
    if any(has_end(name, head) for heads in TASK_HEADS.values() for head in heads):
        hint = "load the model in the class with this head"
    problem = f"values of {shown(name)}, which the model does not have"
    errors.add(problem, "modules of the model", hint, code="AK803")


def _add_wrong_shape(
    state: State, name: str, spec: TensorSpec, own: Tensor, errors: Problems
) -> None:
    hint = ""
    if spec.shape[1:] == own.shape[1:] and any(
        getattr(module, "weight", None) is own for module in embeddings_of(state.model)
    ):
        hint = f"model.resize_token_embeddings({spec.shape[0]}) first, as in training"
    expected = f"{tuple(own.shape)}, as the model has it"
    errors.add(f"{shown(name)} with shape {spec.shape}", expected, hint, code="AK803")
