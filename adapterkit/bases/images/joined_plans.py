"""Join plans of a pipeline's components into one plan whose base is the whole pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from adapterkit.bases.images.pipeline import Pipeline, PipelineComponent
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_small_file
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan, like_base
from adapterkit.core.checkpoint.shards import weight_files
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import WARNING, listed
from adapterkit.core.inputs.base_door import INDEX
from adapterkit.core.inputs.input_identity import identities
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.outputs.folder_files import is_weights
from adapterkit.core.plan import CopyFile, Files, FromMetrics, OutputFile, Plan, Step

CARD = "README.md"


def joined(pipeline: Pipeline, plans: Mapping[str, Plan], card: str) -> Plan:
    """One plan from plans of components, by name: their files in the components' folders, and all
    other files of the pipeline unchanged. The caller gives its options, notes and decisions."""
    joint = _Joint([pipeline.folder])
    for name, part in pipeline.parts.items():
        if name in plans:
            joint.add(name, plans[name])
            joint.leave(part, plans[name])
        else:
            with part.named():
                joint.copy(part)
    joint.copy_rest(pipeline)
    if joint.left_out:
        joint.notes.append(f"not copied: weights of other variants: {listed(joint.left_out)}")
    if pipeline.absent:
        joint.notes.append(f"{WARNING}{INDEX} names missing models: {listed(pipeline.absent)}")
    joint.headers[0, INDEX] = sha256_of_small_file(pipeline.folder, INDEX)
    return joint.plan(plans, {CARD: card.encode(), INDEX: CopyFile(0, INDEX)})


def in_folders(pipelines: Sequence[Pipeline], plans: Mapping[str, Plan], card: str) -> Plan:
    """One plan from plans of components of these pipelines, each of which writes into a folder."""
    joint = _Joint([pipeline.folder for pipeline in pipelines])
    for name, plan in plans.items():
        joint.add(name, plan)
    return joint.plan(plans, {CARD: card.encode()})


@dataclass
class _Joint:
    """The plan that components are added to; its first folders are their pipelines."""

    folders: list[Folder]
    shards: list[OutputFile] = field(default_factory=list)
    files: Files = field(default_factory=dict)
    headers: dict[tuple[int, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipelines = len(self.folders)

    def plan(self, plans: Mapping[str, Plan], files: Files) -> Plan:
        """The joint plan, with these last files."""
        folders = tuple(self.folders)
        return replace(
            next(iter(plans.values())),
            folders=folders,
            headers=self.headers,
            identities=identities(folders, self.headers),
            shards=tuple(self.shards),
            files=self.files | files,
            notes=tuple(self.notes),
            warnings=(),
            models=tuple(range(self.pipelines)),
            parts=tuple(plans),
        )

    def add(self, name: str, plan: Plan) -> None:
        """Add the plan of a component: its models get the folders of that name, and its other
        inputs follow the existing ones."""
        move = _Move(name, self.pipelines, len(self.folders) - self.pipelines)
        self.folders += plan.folders[self.pipelines :]
        self.headers |= {move.file(*file): sha256 for file, sha256 in plan.headers.items()}
        for shard in plan.shards:
            layout = replace(shard.layout, file=f"{name}/{shard.file}")
            self.shards.append(replace(move.value(shard), layout=layout))
        for file, content in plan.files.items():
            if isinstance(content, CopyFile):
                content = CopyFile(*move.file(content.folder, content.name))
            elif isinstance(content, FromMetrics):
                content = replace(content, folder=f"{name}/")
            if file != CARD:
                self.files[f"{name}/{file}"] = content
        self.notes += plan.notes_of(name)

    def leave(self, part: PipelineComponent, plan: Plan) -> None:
        """Note the weights of a component that its plan does not read."""
        used = {*plan.files, *(file for number, file in plan.headers if number == 0)}
        self.left_out += [
            f"{part.name}/{name}"
            for name in self._files_of(part)
            if is_weights(name) and name not in used
        ]

    def _files_of(self, part: PipelineComponent) -> list[str]:
        """All files of a component, of all variants."""
        start, files = f"{part.name}/", part.pipeline.files()
        return [name.removeprefix(start) for name in files if name.startswith(start)]

    def copy(self, part: PipelineComponent) -> None:
        """Copy a component without change; of several weight variants only those that are read, and
        pickles only if there is nothing else."""
        files = part.folder.files()
        names = {*files}
        if weight_files(part.folder):
            base = open_checkpoint(part.folder)
            names = {name for name in files if not is_weights(name)} | {str(base.index_name)}
            known = names | {*base.shards}
            self.left_out += [f"{part.name}/{n}" for n in self._files_of(part) if n not in known]
            for name, header in base.shards.items():
                file = f"{part.name}/{name}"
                steps = [
                    Step(spec.key, spec.dtype, spec.shape, replace(spec, file=file))
                    for spec in header.tensors
                ]
                layout = like_base(file, [step.planned for step in steps], header)
                self.shards.append(OutputFile(layout, tuple(steps)))
                self.headers[0, file] = header.sha256
        for name in files:
            if name in names:
                self.files[f"{part.name}/{name}"] = CopyFile(0, f"{part.name}/{name}")

    def copy_rest(self, pipeline: Pipeline) -> None:
        """Copy files outside the components, except other weights, such as single-file models."""
        parts = tuple(f"{name}/" for name in pipeline.parts)
        for name in pipeline.folder.files():
            if name.startswith(parts) or name in (RECEIPT, CARD, INDEX):
                continue
            if is_weights(name):
                self.left_out.append(name)
            else:
                self.files[name] = CopyFile(0, name)


@dataclass(frozen=True)
class _Move:
    """A move of a plan's inputs to the numbers of the joint plan."""

    part: str
    pipelines: int  # whose folders come first
    by: int  # the offset of other inputs' numbers
    done: dict[int, tuple[object, object]] = field(default_factory=dict)  # by id, with the value

    def file(self, folder: int, name: str) -> tuple[int, str]:
        """An input's number and file."""
        if folder >= self.pipelines:
            return folder + self.by, name
        return folder, name if folder < 0 else f"{self.part}/{name}"

    def value(self, value: Any) -> Any:
        """A record of a plan with all tensors that it names; shared objects stay shared."""
        if isinstance(value, (str, int, float, bool, bytes, TensorPlan)) or value is None:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value, self._moved(value)
        return self.done[id(value)][1]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.value(one) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self.value(one) for one in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, partial):
            words = {key: self.value(one) for key, one in value.keywords.items()}
            return partial(value.func, *map(self.value, value.args), **words)
        if not is_dataclass(value) or isinstance(value, type):
            return value
        changed = {}
        for one in fields(value):
            old = getattr(value, one.name)
            if one.init and (new := self.value(old)) is not old:
                changed[one.name] = new
        if isinstance(value, TensorSpec):
            folder, file = self.file(value.folder, value.file)
            changed |= {"folder": folder, "file": file}
        return replace(value, **changed) if changed else value
