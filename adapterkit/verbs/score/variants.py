"""Models to score: as they are stored, with adapters on them, or as a plan would write them.

A tensor that a plan changes is computed when the model reads it, by the plan's own step, so a
merge is scored without being written."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from adapterkit.core.checkpoint.folder import Folder, LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.shards import TOKENIZER
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.base_door import Base, kind_of
from adapterkit.core.inputs.weights_file import WeightsFile
from adapterkit.core.merge.plan import changed_steps, open_merge
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.plan import CopyFile, Plan, Step, Task
from adapterkit.core.tasks.common import CopiedTensor, SomeOutputs
from adapterkit.core.tasks.rows import EditedTensor, StepTask
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked, stored_parts
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.detect import without_quantization

HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class PlannedTensor(TensorSpec):
    """A tensor that a task of a plan computes; `format`: the quantized weight that it writes."""

    task: Task
    format: QuantizedWeight | None = None

    @classmethod
    def of(cls, task: StepTask) -> "PlannedTensor":
        """The tensor that a step's task writes."""
        step, source = task.step, task.step.source
        written = getattr(task, "format", None) or getattr(task, "packed", None)
        at = {"file": source.file, "start": source.start, "stop": source.stop}
        about = {"key": step.key, "dtype": step.dtype, "shape": step.shape}
        return cls(**about, **at, folder=source.folder, task=task, format=written)

    def value(self, inputs: LocalReader) -> Tensor:
        """The values that a reader of the output would see."""
        made = self.task.compute(inputs).tensors
        stored = inputs.view(None)
        read = lambda one: stored.tensor(one) if isinstance(one, TensorSpec) else one
        tensors = {key: read(one) for key, one in made.items()}
        if self.format is None:
            return tensors[self.key]
        return decode_checked(self.format, tensors)


@dataclass
class PlannedReader(LocalReader):
    """A reader that computes the tensors of a plan."""

    def tensor(self, spec: TensorSpec) -> Tensor:
        if not isinstance(spec, PlannedTensor):
            return super().tensor(spec)
        value = spec.value(LocalReader(self.sources, self.device))
        return value if self.dtype is None else value.to(self.dtype)


@dataclass(frozen=True)
class Variant:
    """A model to score: a checkpoint in floats, some of whose tensors may be `PlannedTensor`s, and
    the folders that they are read from, the model's own first."""

    name: str
    base: Checkpoint
    folders: tuple[Folder, ...]
    adapters: tuple[str, ...] = ()
    texts: dict[str, bytes] = field(default_factory=dict)  # a tokenizer that no file has
    notes: tuple[str, ...] = ()

    def tokenizer(self, work: Path) -> Folder:
        """The folder with the model's tokenizer, in `work` if the model contains it."""
        if not self.texts:
            return self.folders[0]
        place = work / "tokenizer"
        place.mkdir(exist_ok=True)
        for name, text in self.texts.items():
            (place / name).write_bytes(text)
        return LocalFolder(place)


def stored(folder: Folder) -> Variant:
    """A model as it is stored, in safetensors of any codec or in GGUF."""
    base, texts, notes = _opened(kind_of(folder))
    return Variant(folder.name, base, (folder,), texts=texts, notes=notes)


def _opened(kind: Base) -> tuple[Checkpoint, dict[str, bytes], tuple[str, ...]]:
    """A model that can run, in floats; the files of a tokenizer that it contains; notes."""
    if (run := kind.own("run")) and (own := run(kind)):
        return own
    base = decoded_view(kind.read())
    if not base.config.get("model_type"):
        raise Refused(
            f"{kind.folder.name} is no model of texts",
            expected="a model that transformers can build, or a GGUF file of one",
            where=kind.folder.label,
            hint="give the model's folder, with its config.json",
            code="AK405",
        )
    return base, {}, ()


def with_adapters(
    folder: Folder,
    sources: Sequence[tuple[Folder, float]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    how: MergeOptions | None = None,
    weights: WeightsFile | None = None,
) -> Variant:
    """A model with the exact sum of adapters on it, W + Σ weight·scale·b@a in float32, as a merge
    computes it before it rounds; `how`: that merge's options. `Refused` for adapters that a merge
    refuses."""
    kind, variant = kind_of(folder), stored(folder)
    packed = any(isinstance(spec, QuantizedWeight) for spec in variant.base.tensors.values())
    more = {"dequantize": True, "dtype": "fp32"} if kind.in_safetensors and packed else {}
    selected = {} if how else {"include": include, "exclude": exclude}
    options = replace(how or MergeOptions(), **selected, **more)
    state, errors = open_merge(kind, list(sources), options, weights=weights)
    steps = changed_steps(state, errors)
    exact = (_exact(step) for group in steps.values() for step in group)
    config = state.config if kind.in_safetensors else variant.base.config
    base = _changed(variant.base, exact, config)
    folders = (folder, *(adapter.folder for adapter in state.adapters))
    names = tuple(adapter.name for adapter in state.adapters)
    notes = (*variant.notes, *state.notes)
    return replace(variant, base=base, folders=folders, adapters=names, notes=notes)


def _exact(step: Step) -> Step:
    return replace(step, dtype="F32", wide=False, draws=None, compensation=None)


def _changed(base: Checkpoint, steps: Iterator[Step], config: dict) -> Checkpoint:
    """The model after these steps."""
    steps = (
        step for step in steps if step.edits or step.source.folder or step.key not in base.tensors
    )
    changed = {step.key: PlannedTensor.of(EditedTensor(step.key, step)) for step in steps}
    return replace(base, tensors=base.tensors | changed, config=config)


def planned(folder: Folder, plan: Plan, name: str) -> Variant:
    """The model that the plan of a merge into this folder would write."""
    variant, config = stored(folder), plan.files.get("config.json")
    tensors = dict(variant.base.tensors)
    for shard in plan.shards:
        for step in shard.steps:
            if not step.copied:
                tensors[step.key] = PlannedTensor.of(EditedTensor(step.key, step))
            elif step.key != step.source.key:  # a layer that is repeated, or a head
                tensors[step.key] = replace(step.source, key=step.key)
        for one in shard.tasks:
            task = one.task if isinstance(one, SomeOutputs) else one
            if isinstance(task, StepTask):
                tensors[task.step.key] = PlannedTensor.of(task)
            elif isinstance(task, CopiedTensor) and task.key != task.source.key:
                own = variant.base.tensors.values()  # a head, which was tied
                tensors[task.name] = next(w for w in own if task.source in stored_parts(w))
    config = json.loads(config) if isinstance(config, bytes) else variant.base.config
    if HEAD in tensors.keys() - variant.base.tensors.keys():
        config = config | {"tie_word_embeddings": False}
    base = replace(variant.base, tensors=tensors, config=without_quantization(config))
    texts = _tokenizer_of(plan) or variant.texts
    return replace(variant, name=name, base=base, folders=plan.folders, texts=texts)


def _tokenizer_of(plan: Plan) -> dict[str, bytes]:
    """The tokenizer of the output, if some of its files are not the base's."""
    names = [name for name in plan.files if TOKENIZER.fullmatch(name)]
    own = [one for name in names if isinstance(one := plan.files[name], CopyFile)]
    if not any(one.folder for one in own):
        return {}
    texts = {}
    for name in (*names, "config.json"):
        one = plan.files[name]
        if isinstance(one, CopyFile):
            folder = plan.folders[one.folder]
            one = folder.read(one.name, 0, folder.files()[one.name])
        texts[name] = one
    return texts
