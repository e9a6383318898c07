"""Load adapters from disk onto a live model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.core.adapter.adapter_config import base_id
from adapterkit.core.adapter.config import check_live_config
from adapterkit.core.adapter.factors import Factors, rank_and_scale
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.adapter.record import Adapter, Lora, rank_mismatch
from adapterkit.core.checkpoint.fingerprint import difference
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.commands import WITHOUT_INITIAL
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.inputs.input_identity import header_hashes, identities
from adapterkit.core.inputs.sources import initial_of, open_adapter
from adapterkit.core.options import StrPath
from adapterkit.core.outputs.changed_base import changes_of, unmarked
from adapterkit.core.patterns import similar_names
from adapterkit.core.registry import members
from adapterkit.runtime.layers import kind_of
from adapterkit.runtime.layers.parameter import of_parameter, split_parameters
from adapterkit.runtime.layers.tied import both_sides
from adapterkit.runtime.load.placing import OtherValues, PatchMaker, find_values, read_values
from adapterkit.runtime.patches import dora
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.replication import replicate, replicating
from adapterkit.runtime.site import Patch
from adapterkit.runtime.state import Attached, State
from adapterkit.runtime.targets import unread
from adapterkit.verbs.init.methods import created_init
from adapterkit.verbs.init.methods.protocol import ComputedInit
from adapterkit.verbs.shared.lora_config import LoraConfig


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's files, matched with the model: the kind and tensors of each patch."""

    adapter: Adapter
    config: LoraConfig
    factors: tuple[tuple[type[FactorsPatch], Factors], ...]
    parameters: tuple[Factors, ...]
    values: OtherValues[TensorSpec]


def load(
    state: State,
    source: StrPath,
    name: str,
    *,
    trainable: bool,
    dtype: torch.dtype | None,
    ephemeral_gpu_offload: bool = False,
    pad_rank: int | None = None,
    strict: bool = False,
) -> None:
    """Add an adapter from disk; `Refused` with every mismatch, before anything changes."""
    state.unused(name)
    with replicating(state):
        stored, patches = read(
            state, source, name, dtype, ephemeral_gpu_offload=ephemeral_gpu_offload
        )
        factors = [(path, patch) for path, patch in patches if isinstance(patch, FactorsPatch)]
        if pad_rank is not None:
            _pad(factors, pad_rank)
        if trainable and stored.config.tie and stored.config.dora:
            for head, *_ in both_sides(factors, state.modules):
                raise Refused(
                    f"dora with tie on {shown(head)}, to be trained",
                    expected="a linear head without dora",
                    where=stored.adapter.label,
                    hint="load it without trainable, because PEFT trains both sides as one",
                    code="AK803",
                )
    adapter = Attached(name, stored.config, trainable, strict=strict)
    take_base(state, adapter, stored.adapter)
    state.put(adapter, patches)


def read(
    state: State,
    source: StrPath,
    name: str,
    dtype: torch.dtype | None,
    *,
    ephemeral_gpu_offload: bool = False,
) -> tuple[StoredAdapter, list[tuple[str, Patch]]]:
    """A stored adapter, and its patches for the base as it is."""
    stored = join_folder(state, open_adapter(source))
    patches = read_patches(
        PatchMaker(state, name, stored.config, dtype, ephemeral_gpu_offload), stored
    )
    _subtract_initial(state, stored, patches)
    return stored, patches


def take_base(state: State, adapter: Attached, stored: Adapter) -> None:
    """Record the base that a stored adapter is for; warn if the model is another one."""
    adapter.base, adapter.base_fingerprint = base_id(stored), stored.base_fingerprint
    made_for, adapter.base_change = stored.base_fingerprint, stored.base_change
    adapter.rescaled = 1.0
    for error in unmarked(stored, state.of_base(changes_of), state.base_name or "the model"):
        warnings.warn(error.problem, stacklevel=4)
    if made_for and difference(made_for, state.base_fingerprint or made_for) == "values":
        warnings.warn(
            f"{stored.name} was made for a base with other values than {shown(state.base_name)} "
            f"(fingerprint {made_for}, not {state.base_fingerprint})",
            stacklevel=4,
        )


def join_folder(
    state: State, folder: Folder, number: int = 0, *, is_second: bool = False
) -> StoredAdapter:
    """Read an adapter's headers and find the module of each tensor. `number`: its index among
    several adapters. `is_second`: match initial factors to their adapter's layers."""
    adapter = read_adapter(folder, number, check_live_config)
    config = LoraConfig.from_peft(adapter.config, adapter.where)
    if not is_second:
        replicate(state, config.layer_replication, adapter.where)
    hint = "the adapter was trained on another model"
    errors = Problems(where=adapter.label, hint=hint, code="AK803")
    factors: list[tuple[type[FactorsPatch], Factors]] = []
    loras, parameters = split_parameters(adapter, state.model, state.modules, errors)
    hosts: dict[int, str] = {}
    for lora in loras:
        host = state.modules.get(lora.module)
        kind = None if host is None else kind_of(host)
        if host is None or kind is None:
            _add_no_module(state, lora, host, errors)
            continue
        leaf = "weight" if adapter.leaves(lora.module, ["weight"]) else None
        rank, scale = rank_and_scale(adapter, lora, leaf)
        if lora.a.shape[0] != rank:
            errors.append(rank_mismatch(adapter, lora, lora.a.shape[0], rank))
            continue
        if not _fits(lora, host, kind, errors):
            continue
        other = hosts.setdefault(id(host), lora.module)
        if other != lora.module:
            errors.add(
                f"factors of {shown(other)} and {shown(lora.module)}: the same module",
                "factors by one of the names",
                "remove those by the other name",
            )
        if lora.magnitude is not None:
            _check_magnitude(lora, host, kind, errors)
        factors.append((kind, Factors.of(lora, scale, rank)))
    values = find_values(state, adapter, config, errors)
    errors.raise_all()
    return StoredAdapter(adapter, config, tuple(factors), tuple(parameters), values)


def read_patches(maker: PatchMaker, stored: StoredAdapter) -> list[tuple[str, Patch]]:
    """The patches of an adapter with their values; the default dtype is at least float32."""
    folders = (stored.adapter.folder,)
    with Sources(folders, identities(folders, header_hashes([stored.adapter]))) as sources:
        read = LocalReader(sources, torch.device("cpu"), dtype=None).tensor

        def read_wide(spec: TensorSpec) -> Tensor:
            tensor = read(spec)
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

        read_trained = read if maker.dtype else read_wide
        factors = list(_read_factors(maker, stored, read_trained))
        values = read_values(maker.state, stored.values, read, read_trained)
        patches = maker.all_patches(factors, values)
    Problems(list(_ignored(maker.state, stored.adapter, patches))).raise_all()
    return patches


def _read_factors(
    maker: PatchMaker, stored: StoredAdapter, read: Callable[[TensorSpec], Tensor]
) -> Iterator[tuple[str, FactorsPatch]]:
    for kind, own in stored.factors:
        a, b = read(own.a), read(own.b)
        bias = None if own.bias is None else read(own.bias)
        magnitude = None if own.magnitude is None else read(own.magnitude)
        patch = maker.on_layer(own.module, kind, a, b, own.scale, bias=bias, magnitude=magnitude)
        yield own.module, patch
    for own in stored.parameters:
        host, leaf = maker.state.modules[own.module], own.leaf or ""
        a, b = of_parameter(own, host, read(own.a), read(own.b))
        yield own.module, maker.on_parameter(own.module, leaf, a, b, own.scale, own.depth)


def _ignored(
    state: State, adapter: Adapter, patches: Sequence[tuple[str, Patch]]
) -> Iterator[AdapterkitError]:
    """Refusals of factors that would not act, except zeros, which PEFT's training leaves there."""
    for path, patch in patches:
        problem = unread(state.model, state.modules, path)
        if problem is None or not isinstance(patch, FactorsPatch) or patch.place(path) != path:
            continue
        patch.called = False
        if patch.a.any() and patch.b.any():
            yield Refused(
                f"factors that do nothing: {problem.problem}",
                expected="factors of layers that are called",
                where=adapter.label,
                hint="remove them from the file; `adapterkit merge` has --exclude",
                code="AK803",
            )


def _pad(patches: Sequence[tuple[str, FactorsPatch]], rank: int) -> None:
    """Pad factors to a rank; `Refused` for higher ones, and for layers that cannot be padded."""
    errors = Problems(where="pad_rank", code="AK108")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise Refused(
            f"pad_rank {rank!r}", expected="a positive whole number", where="pad_rank", code="AK108"
        )
    for path, patch in patches:
        if not patch.can_be_padded:
            problem, expected = f"{type(patch).__name__} at {shown(path)}", "factors of layers"
        elif patch.rank > rank:
            problem, expected = f"rank {patch.rank} at {shown(path)}", f"at most {rank}"
        else:
            continue
        hint = "give pad_rank the highest rank that you will swap in"
        errors.add(problem, expected, hint)
    errors.raise_all()
    for _, patch in patches:
        patch.pad(rank)


def _fits(lora: Lora, host: nn.Module, kind: type[FactorsPatch], errors: Problems) -> bool:
    """Return whether factors have a module's names and shapes; otherwise errors are added."""
    shapes = kind.shapes(host, lora.a.shape[0])
    if lora.kind != kind.stored_as:
        problem = f"{shown(lora.a.key)} for a {type(host).__name__}"
        errors.add(problem, "the keys of such a layer", code="AK803")
    elif (lora.a.shape, lora.b.shape) != shapes:
        problem = f"factors of {shown(lora.module)} with shapes {lora.a.shape}, {lora.b.shape}"
        errors.add(problem, f"{shapes[0]}, {shapes[1]} for this model", code="AK803")
    elif lora.bias is not None and lora.bias.shape != lora.b.shape[:1]:
        problem = f"{shown(lora.bias.key)} with shape {lora.bias.shape}"
        errors.add(problem, f"{lora.b.shape[:1]}, one value for each output", code="AK803")
    else:
        return True
    return False


def _check_magnitude(
    lora: Lora, host: nn.Module, kind: type[FactorsPatch], errors: Problems
) -> None:
    name = shown(lora.module)
    if (problem := dora.problem(host, kind.axis)) is not None:
        errors.add(
            f"magnitudes of {name}: {problem}", "a layer that takes magnitudes", code="AK803"
        )
    expected = dora.magnitude_shape(lora.b.shape)
    if lora.magnitude is not None and lora.magnitude.shape != expected:
        problem = f"magnitudes of {name} with shape {lora.magnitude.shape}"
        errors.add(problem, f"{expected}", "save the adapter again", code="AK803")


def _add_no_module(state: State, lora: Lora, host: object, errors: Problems) -> None:
    name = shown(lora.module)
    if host is None:
        hint = similar_names(lora.module, list(state.modules))
        errors.add(
            f"factors of {name}, which the model does not have",
            "modules of the model",
            hint,
            code="AK803",
        )
    else:
        problem = f"factors of {name}, a {type(host).__name__}"
        errors.add(problem, "a layer that takes factors", code="AK803")


def _subtract_initial(
    state: State, stored: StoredAdapter, patches: list[tuple[str, Patch]]
) -> None:
    """Subtract the changed base's initial factors from patches trained on it: those in the
    adapter's folder, or the method's again; `Refused` if there are neither."""
    init = stored.adapter.changed_base()
    if init is None:
        return
    if (folder := initial_of(stored.adapter.folder)) is not None:
        _subtract_stored(state, stored.adapter, folder, patches)
        return
    name = init.lower()
    method = created_init(name, {}) if name in members("inits") else None
    if (
        not isinstance(method, ComputedInit)
        or method.needs != ("weight",)
        or not all(isinstance(patch, FactorsPatch) and patch.is_matrix for _, patch in patches)
    ):
        raise Refused(
            f"init_lora_weights {shown(init)}: the factors are relative to a changed base",
            expected="an adapter for the original base",
            where=stored.adapter.where,
            hint=WITHOUT_INITIAL,
            code="AK304",
        )
    for path, patch in patches:
        assert isinstance(patch, FactorsPatch)
        a, b = method.factors(patch.matrix(state.modules[path]), patch.rank, patch.scale)
        patch.initial_a, patch.initial_b = a.to(patch.a), b.to(patch.b)


def _subtract_stored(
    state: State, adapter: Adapter, folder: Folder, patches: list[tuple[str, Patch]]
) -> None:
    """Give patches the initial factors in their adapter's folder."""
    stored = join_folder(state, folder, is_second=True)
    initial = read_patches(PatchMaker(state, "initial", stored.config, None), stored)
    own, others = (
        {(path, patch.role): patch for path, patch in each if isinstance(patch, FactorsPatch)}
        for each in (patches, initial)
    )
    if different := sorted({path for path, _ in own.keys() ^ others.keys()}):
        raise Refused(
            f"only one of the adapter and its initial factors has {listed(different)}",
            expected="the same modules in both",
            where=adapter.label,
            hint="keep the folder that `adapterkit init` wrote together",
            code="AK304",
        )
    for key, patch in own.items():
        other = others[key]
        patch.initial_a = other.a.detach().to(patch.a)
        patch.initial_b = (other.b.detach() * (other.scale / patch.scale)).to(patch.b)
