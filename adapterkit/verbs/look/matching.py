"""Read the two sides of a diff from headers, and match them by key or by module."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.checkpoint.shards import NOT_A_MODEL
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.merge.sites import join
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.detect import is_of_comfyui, quantization_evidence
from adapterkit.verbs.look import configs
from adapterkit.verbs.look.pairs import Bias, Pair, make_pair, stored_specs, summary_of

Parts = dict[tuple[str, str], Any]  # values of one side, by kind and name


@dataclass
class Matches:
    """Pairs in A's file order, and the rows that only one side has."""

    pairs: list[Pair]
    added: list[dict]
    removed: list[dict]
    config: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    are_adapters: bool = False


def are_adapters(folders: tuple[Folder, Folder]) -> bool:
    """True if both sources are adapters; `Refused` if only one of them is."""
    adapters = [CONFIG in folder.files() for folder in folders]
    models = [any(_is_model(name) for name in folder.files()) for folder in folders]
    if all(adapters):
        return True
    if any(adapters) and not all(models):
        which = adapters.index(True)
        raise Refused(
            f"{folders[which].name} is an adapter, {folders[1 - which].name} is not",
            expected="two adapters, two checkpoints or two files",
            where="A and B",
            hint=f"merge the adapter first, or name its file {WEIGHTS} to compare bare tensors",
            code="AK408",
        )
    return False


def _is_model(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors") and not name.startswith(NOT_A_MODEL)


@dataclass
class Side:
    """Tensors of a checkpoint or of a single file by key; a checkpoint also has its config."""

    tensors: dict[str, TensorSpec]
    checkpoint: Checkpoint | None = None
    config: dict | None = None


def match_checkpoints(folders: tuple[Folder, Folder], number: int = 0, prefix: str = "") -> Matches:
    """Match two checkpoints or files by key; `Refused` or `Damaged` if one cannot be read.
    `number`: of the first of them among the folders; `prefix`: of all names."""
    sides: list[Side] = _read_both(_read_side, folders, number)
    quantized = [
        side.checkpoint is not None
        and quantization_evidence(side.checkpoint.config, side.tensors) is not None
        for side in sides
    ]
    notes = []
    if quantized[0] != quantized[1]:
        which = quantized.index(True)
        sides[which] = _decoded_side(sides[which])
        notes.append(f"{folders[which].name} is quantized: its weights are compared as they decode")
    a, b = (_named(side.tensors, prefix) for side in sides)
    matches = _match(a, b)
    first, second = (side.config for side in sides)
    if first is not None and second is not None:
        matches.config, matches.notes = configs.compare_model_configs(first, second)
    elif first is not second:
        without = folders[0 if first is None else 1].name
        matches.notes.append(f"{without} has no config.json: settings are not compared")
    matches.notes += notes
    if a and b and not matches.pairs:
        matches.notes.append(
            "no key is in both: the same model may store its parameters under other names "
            "(a prefix, fused or per-expert weights)"
        )
    return matches


def match_lone_checkpoint(folder: Folder, number: int, prefix: str, *, is_first: bool) -> Matches:
    """The matches for a checkpoint that only one side has: A if `is_first`, else B."""
    parts = _named(_read_side(folder, number).tensors, prefix)
    return _match(parts, {}) if is_first else _match({}, parts)


def _named(tensors: Mapping[str, TensorSpec], prefix: str) -> Parts:
    return {("tensor", prefix + key): spec for key, spec in tensors.items()}


def _read_both(
    read: Callable[[Folder, int], Any], folders: tuple[Folder, Folder], first: int = 0
) -> list[Any]:
    """`read` of each folder and its number; the problems of both are raised together."""
    sides, errors = [], Problems()
    for number, folder in enumerate(folders, first):
        with errors.collected():
            sides.append(read(folder, number))
    errors.raise_all()
    return sides


def _read_side(folder: Folder, number: int) -> Side:
    files, kind = folder.files(), kind_of(folder)
    if not kind.in_safetensors:
        checkpoint = kind.read(number)
        return Side(checkpoint.tensors, checkpoint, checkpoint.config)
    only = next(iter(files)) if len(files) == 1 else ""
    if only.endswith(".safetensors"):
        header = read_header(folder, only, number)
        tensors = {spec.key: spec for spec in header.tensors}
        if not is_of_comfyui(tensors, header.metadata):
            return Side(tensors)
        return Side(tensors, Checkpoint(folder, {only: header}, tensors, None, None, {}, files))
    checkpoint = open_checkpoint(folder, number)
    config = checkpoint.config if "config.json" in files else None
    return Side(checkpoint.tensors, checkpoint, config)


def _decoded_side(side: Side) -> Side:
    """The decoded floats of a quantized checkpoint."""
    assert side.checkpoint is not None
    plain = decoded_view(side.checkpoint)
    tensors = {
        key: replace(spec, dtype="F32") if isinstance(spec, QuantizedWeight) else spec
        for key, spec in plain.tensors.items()
    }
    return Side(tensors, plain, plain.config)


def match_adapters(folders: tuple[Folder, Folder]) -> Matches:
    """Match two adapters by module; `Refused` or `Damaged` if one cannot be read."""
    (first, a), (second, b) = _read_both(_read_adapter, folders)
    matches = _match_modules(a, b)
    matches.config = configs.compare_adapter_configs(first, second)
    versions = {adapter.config.get("peft_version") for adapter in (first, second)}
    if len(versions) > 1 and first.config.get("target_parameters"):
        matches.notes.append(
            "PEFT 0.19 turned the factors of square experts: two versions' deltas there may be "
            "each other's transpose"
        )
    for adapter in (first, second):
        if adapter.changed_base():
            init = shown(adapter.config["init_lora_weights"])
            matches.notes.append(
                f"{adapter.name}: init_lora_weights {init} had changed the base: its deltas are "
                "relative to that one"
            )
    return matches


def _read_adapter(folder: Folder, number: int) -> tuple[Adapter, Parts]:
    """An adapter, and its deltas, biases, magnitudes, replaced parameters and token rows in file
    order."""
    adapter = read_adapter(folder, number)
    parts: Parts = {("replaced", name): spec for name, spec in adapter.replaced.items()}
    errors = Problems()
    for name, site in join([adapter], errors).items():
        (factors,) = site.members.values()
        parts["delta", name] = factors
        if factors.magnitude is not None:  # (out,) or (1, out, 1, 1), by PEFT's version
            shape = (math.prod(factors.magnitude.shape),)
            parts["magnitude", name] = replace(factors.magnitude, shape=shape)
        if factors.bias is not None:
            parts["bias", name] = Bias(factors.bias, factors.scale)
    errors.raise_all()
    parts |= {("rows", tokens.module): tokens for tokens in adapter.tokens}
    return adapter, dict(sorted(parts.items(), key=lambda item: stored_specs(item[1])[0].start))


def _match_modules(a: Parts, b: Parts) -> Matches:
    matches = _match(a, b)
    matches.are_adapters = True
    if a and b and not matches.pairs:
        matches.notes.append("no module is in both adapters")
    if any(kind == "magnitude" for kind, _ in (*a, *b)):
        matches.notes.append(
            "DoRA rescales by norms of the base: deltas and magnitudes are compared separately"
        )
    return matches


def _match(a: Parts, b: Parts) -> Matches:
    pairs = [make_pair(*key, part, b[key]) for key, part in a.items() if key in b]
    return Matches(pairs, added=_rows_without(b, a), removed=_rows_without(a, b))


def _rows_without(parts: Parts, others: Parts) -> list[Json]:
    """Rows of the values that the other side does not have."""
    return [
        {"name": name, "kind": kind, **summary_of(part)}
        for (kind, name), part in parts.items()
        if (kind, name) not in others
    ]
