"""What an adapter's file holds besides factors, joined with a live model: copies of modules,
trained biases, weights of the base that it was trained on, rows of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.core.adapter.config import TASK_HEADS
from adapterkit.core.adapter.record import Adapter, Tokens
from adapterkit.core.adapter.targets import has_end
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Problems, shown
from adapterkit.core.patterns import similar_names
from adapterkit.runtime.load.placing import AdapterValues
from adapterkit.runtime.parts.copies import outermost, parameter_of
from adapterkit.runtime.state import State
from adapterkit.runtime.targets import own_modules
from adapterkit.runtime.targets import unread as why_unread
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.targets.resolve import embeddings_of, input_embedding, tied_modules


@dataclass(frozen=True)
class StoredValues:
    """Tensors of a file by what they are for."""

    copies: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)  # path -> name in it
    biases: dict[str, TensorSpec] = field(default_factory=dict)  # by parameter
    weights: dict[str, TensorSpec] = field(default_factory=dict)  # by parameter; not trained
    rows: tuple[Tokens, ...] = ()

    def read(
        self,
        state: State,
        read: Callable[[TensorSpec], Tensor],
        read_trained: Callable[[TensorSpec], Tensor],  # biases and rows
    ) -> AdapterValues:
        """These values; copies and weights have the base's dtypes."""
        weights = {
            name: read(spec).to(_own(state, name).dtype) for name, spec in self.weights.items()
        }
        return AdapterValues(
            factors=(),
            copies={
                path: {name: read(spec) for name, spec in specs.items()}
                for path, specs in self.copies.items()
            },
            biases={name: read_trained(spec) for name, spec in self.biases.items()},
            weights=_different(state, weights),
            rows={one.module: (one.indices, read_trained(one.values)) for one in self.rows},
        )


def join_values(
    state: State, adapter: Adapter, config: LoraConfig, errors: Problems
) -> StoredValues:
    """Find the place of each tensor that is no factor; what does not fit joins the errors."""
    stored = StoredValues(rows=adapter.tokens)
    tied = _tied_together(state, config)
    # PEFT's config names the embedding alone
    entries = [
        *adapter.saved,
        *(tied if any(adapter.saves(f"{path}.weight") for path in tied) else ()),
    ]
    for name, spec in adapter.replaced.items():
        path = outermost(name, entries)
        if path is not None:
            stored.copies.setdefault(path, {})[name.removeprefix(f"{path}.")] = spec
        elif config.bias != "none" and name.rpartition(".")[2] == "bias":
            stored.biases[name] = spec
        else:
            stored.weights[name] = spec
    for path, specs in stored.copies.items():
        _check_copy(state, path, specs, errors)
    for name, spec in {**stored.biases, **stored.weights}.items():
        _check_value(state, name, spec, errors)
    for tokens in stored.rows:
        _check_rows(state, tokens, errors)
    heads = TASK_HEADS.get(config.task_type or "", ())
    for path in own_modules(state.model):
        if any(has_end(path, head) for head in heads) and path not in stored.copies:
            problem = f"no values of {shown(path)}, the head of a {config.task_type} model"
            hint = "save the adapter again, with the head in modules_to_save"
            errors.add(problem, "its trained values", hint, code="AK803")
    return stored


def _tied_together(state: State, config: LoraConfig) -> list[str]:
    """With `config.tie`, the embedding and its heads."""
    modules = own_modules(state.model)
    embedding = input_embedding(state.model, modules) if config.tie else None
    return [] if embedding is None else [embedding, *tied_modules(modules, embedding)]


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


def _check_value(state: State, name: str, spec: TensorSpec, errors: Problems) -> None:
    own = parameter_of(state.modules, name)
    if own is None:
        _add_unknown(state, name, errors)
    elif tuple(own.shape) != spec.shape:
        _add_wrong_shape(state, name, spec, own, errors)


def _check_rows(state: State, tokens: Tokens, errors: Problems) -> None:
    name = f"{tokens.module}.weight"
    own = parameter_of(state.modules, name)
    if own is None:
        _add_unknown(state, tokens.module, errors)
        return
    if unread := why_unread(state.model, state.modules, tokens.module):
        problem = f"trained rows that do nothing: {unread.problem}"
        errors.add(problem, unread.expected, "take them out of the file", code="AK803")
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
    problem = f"values of {shown(name)}, which the model has not"
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


def _own(state: State, name: str) -> nn.Parameter:
    parameter = parameter_of(state.modules, name)
    assert parameter is not None
    return parameter


def _different(state: State, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are not the base's own, on its device."""
    different = {}
    for name, value in weights.items():
        own = _own(state, name)
        if own.is_meta or not torch.equal(value := value.to(own.device), own):
            different[name] = value
    return different
