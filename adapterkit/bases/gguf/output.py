"""Write a model as GGUF files: the base's files with new values of some tensors. The layout stays
the same unless tensors change type or are added."""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from adapterkit.bases.gguf.file import has_head
from adapterkit.bases.gguf.header import (
    EMBEDDING,
    HEAD,
    TENSOR_COUNT,
    TYPES,
    GgufHeader,
    aligned,
    info_bytes,
)
from adapterkit.bases.gguf.imatrix import Importance
from adapterkit.bases.gguf.model import GgufCheckpoint
from adapterkit.bases.gguf.weight import GgufWeight
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.plan import OutputFile, Step, Task
from adapterkit.core.records import Json
from adapterkit.core.tasks.common import CopiedTensor, SomeOutputs
from adapterkit.core.tasks.quantize import CompensatedStep, EncodedStep
from adapterkit.core.tasks.rows import RequantizedWeight

HEADS = {"lm_head.weight": HEAD}  # that a tied model's file gets
WAY_OUT = "give --changed-type q8_0, or merge into the original checkpoint"


class NewTensor(NamedTuple):
    """A tensor that is added to a file."""

    name: str
    shape: tuple[int, ...]
    type: str


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type."""
    _, values, width = TYPES[kind]
    return math.prod(shape) // values * width


@dataclass(frozen=True)
class FileLayout:
    """The layout of an output file: the offset of each tensor."""

    header: bytes = field(repr=False)  # up to the first tensor
    starts: Mapping[str, int]
    size: int

    def __call__(
        self, file: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, Json]
    ) -> ShardLayout:
        ordered = sorted(tensors, key=lambda tensor: self.starts[tensor.key])
        starts = tuple(self.starts[tensor.key] for tensor in ordered)
        end = starts[-1] + ordered[-1].nbytes if ordered else len(self.header)
        return ShardLayout(file, self.header, tuple(ordered), starts, self.size - end)


def plan_gguf_files(
    base: GgufCheckpoint,
    steps: Iterable[Step],
    *,
    changed_type: str | None,
    keep_scales: bool,
    importance: Importance,
    name: str | None,
) -> tuple[OutputFile, ...]:
    """The files of a model after these steps. `changed_type`: the type of changed tensors in
    blocks, if not their own; `keep_scales` of blocks whose values fit; `importance` of columns,
    by tensor; `name`: of a single file, if not the base's."""

    def encoded_so(step: Step) -> Step:
        if not isinstance(step.source, GgufWeight):
            return step
        weight = replace(step.source, keep_scales=keep_scales)
        return replace(step, source=weighed(weight, importance))

    own = lambda step: not (step.edits or step.source.folder or step.key not in base.tensors)
    changed = [encoded_so(step) for step in steps if not own(step)]
    formats = {step.key: _format(base, step, changed_type) for step in changed}
    _check_formats(base, formats.values())
    tasks = [_task(step, formats[step.key]) for step in changed]
    return gguf_files(base, tasks, [*formats.values()], name)


def gguf_files(
    base: GgufCheckpoint, tasks: Sequence[Task], formats: Sequence[GgufWeight], name: str | None
) -> tuple[OutputFile, ...]:
    """The files of a model whose weights these tasks write in these formats."""
    files, written = [], {part.key for weight in formats for part in weight.parts}
    for file, header in base.headers.items():
        layout = _layout(base, header, formats, is_last=file == [*base.headers][-1])
        own = _tasks_in(layout, tasks)
        for entry in header.tensors:
            if entry.name not in written:
                own.append(CopiedTensor(entry.name, entry.stored(), entry.name))
        own.sort(key=lambda task: layout.starts[task.max_outputs[0].key])
        out = name if name is not None and len(base.headers) == 1 else file
        files.append(OutputFile.computed(out, own, {}, lay_out=layout))
    return tuple(files)


def weighed(weight: GgufWeight, importance: Importance) -> GgufWeight:
    """The weight with its columns' importance; `Refused` if the matrix is of another model."""
    sums = tuple(importance.get(part.key) for part in weight.parts)
    misfits = [
        f"{shown(part.key)} {tuple(found.shape)}"
        for part, found, shape in zip(weight.parts, sums, weight.shapes, strict=True)
        if found is not None and found.shape != (math.prod(shape[:-2]), shape[-1])
    ]
    if misfits:
        raise Refused(
            f"the importance matrix has {listed(misfits)}",
            expected=f"{weight.shapes}: a number for each column of each matrix",
            where="--imatrix",
            hint="make it of this model",
            code="AK106",
        )
    return replace(weight, importance=sums)


def _format(base: GgufCheckpoint, step: Step, changed_type: str | None) -> GgufWeight:
    """The storage format of a step's result."""
    source, weights = step.source, base.tensors.values()
    tied = (w for w in weights if isinstance(w, GgufWeight) and w.parts[0].key == EMBEDDING)
    weight = source if isinstance(source, GgufWeight) else base.tensors.get(step.key)
    weight = weight or next(tied, None)
    if not isinstance(weight, GgufWeight) or weight.key != step.key:
        weight = _renamed(weight, step.key, base)
    types = weight.types_written(changed_type)
    return weight if types == weight.types else retyped(weight, types)


def _renamed(tied: TensorSpec | None, key: str, base: GgufCheckpoint) -> GgufWeight:
    """The format of a head that the base does not store, from the embedding it was tied to."""
    if key not in HEADS or not isinstance(tied, GgufWeight):
        raise Refused(
            f"{shown(key)} is not in the file",
            expected="parameters that it has, or a head that was tied",
            where=base.name,
            hint="merge into the original checkpoint, and convert that",
            code="AK401",
        )
    architecture = next(iter(base.headers.values())).architecture
    if not has_head(architecture):
        raise Refused(
            f"one side of a tied embedding changes, and {shown(architecture)} has no {HEADS[key]}: "
            "llama.cpp would not load it",
            expected="a change of both sides or of neither; by the gguf package's tables",
            where=base.name,
            hint="give --tied fold to change both sides, or leave the module out with --exclude",
            code="AK401",
        )
    part, *_ = tied.parts
    return replace(tied, key=key, parts=(replace(part, key=HEADS[key]),))


def retyped(weight: GgufWeight, types: tuple[str, ...]) -> GgufWeight:
    """The same parameter stored in other types."""
    for name, shape in zip(types, weight.shapes, strict=True):
        values = TYPES[name][1]
        if shape[-1] % values:
            raise Refused(
                f"{shown(weight.key)} has rows of {shape[-1]} values",
                expected=f"whole blocks of {values}, as {name} has them",
                where=weight.file,
                hint="give another --changed-type, such as q8_0",
                code="AK404",
            )
    parts = []
    for part, name, shape in zip(weight.parts, types, weight.shapes, strict=True):
        size = nbytes(name, shape)
        rows = part.shape[0]
        parts.append(replace(part, shape=(rows, size // rows), stop=part.start + size))
    return replace(weight, types=types, parts=tuple(parts))


def _check_formats(base: GgufCheckpoint, formats: Iterable[GgufWeight]) -> None:
    """`Refused` for changed tensors whose bytes cannot be written."""
    errors, reasons = Problems(where=base.name, code="AK404"), dict[str, list[str]]()
    for weight in formats:
        if weight.read_only:
            reasons.setdefault(weight.read_only, []).append(weight.key)
    for reason, keys in reasons.items():
        errors.add(
            f"{listed(keys)} cannot be written again: {reason}",
            "types of blocks that are written, and layouts that can be restored",
            WAY_OUT,
        )
    errors.raise_all()


def _task(step: Step, format: GgufWeight) -> Task:
    source = step.source
    if not step.edits and isinstance(source, GgufWeight) and source.types == format.types:
        return CopiedTensor(step.key, source.parts[0], format.parts[0].key)  # a head, untied
    if step.compensation is not None:
        return CompensatedStep(step.key, step, format)
    if format is source:
        return RequantizedWeight(step.key, step)
    return EncodedStep(step.key, step, format)


def _tasks_in(layout: FileLayout, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that write to one file; a stack split over two files contributes to each."""
    found = []
    for task in tasks:
        keys = [one.key for one in task.max_outputs]
        own = tuple(key for key in keys if key in layout.starts)
        if own:
            found.append(task if len(own) == len(keys) else SomeOutputs(task.name, task, own))
    return found


def _layout(
    base: GgufCheckpoint, header: GgufHeader, formats: Iterable[GgufWeight], *, is_last: bool
) -> FileLayout:
    """The output positions of a file's tensors; new ones go into the last file."""
    known = {entry.name for one in base.headers.values() for entry in one.tensors}
    parts = {
        part.key: NewTensor(part.key, shape, name)
        for weight in formats
        for part, shape, name in zip(weight.parts, weight.shapes, weight.types, strict=True)
    }
    types = {key: tensor.type for key, tensor in parts.items()}
    new = [tensor for key, tensor in parts.items() if key not in known]
    header, added = header.counting(len(known) + len(new)), new if is_last else []
    if not added and all(
        types.get(entry.name, entry.type) == entry.type for entry in header.tensors
    ):
        start = min((entry.start for entry in header.tensors), default=header.size)
        between = base.folder.read(header.file, len(header.raw), start)
        starts = {entry.name: entry.start for entry in header.tensors}
        return FileLayout(header.raw + between, starts, header.size)
    return with_types(header, types, added)


def with_types(
    header: GgufHeader, types: Mapping[str, str], added: Sequence[NewTensor]
) -> FileLayout:
    """The layout of the file with other types for some tensors, by name, and new tensors at its
    end; the order of the others stays."""
    raw = bytearray(header.raw)
    raw[TENSOR_COUNT : TENSOR_COUNT + 8] = struct.pack("<Q", len(header.tensors) + len(added))
    offset, offsets = 0, {}
    for entry in sorted(header.tensors, key=lambda entry: entry.start):
        kind = types.get(entry.name, entry.type)
        struct.pack_into("<IQ", raw, entry.at, TYPES[kind][0], offset)
        offsets[entry.name] = offset
        offset = aligned(offset + nbytes(kind, entry.shape), header.alignment)
    for tensor in added:
        raw += info_bytes(tensor.name, tensor.shape, TYPES[tensor.type][0], offset)
        offsets[tensor.name] = offset
        offset = aligned(offset + nbytes(tensor.type, tensor.shape), header.alignment)
    raw += bytes(-len(raw) % header.alignment)
    places = {name: len(raw) + at for name, at in offsets.items()}
    return FileLayout(bytes(raw), places, len(raw) + offset)
