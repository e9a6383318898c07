"""Store finished sums as files of the work folder, from which the statistics are made.

The batches are always divided into the same blocks, whose sums are added in their order. Therefore
the statistics have the same bits whether one process adds them up, or several compute some blocks
each."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.disk import check_folder, storage_errors
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import Header, read_header
from adapterkit.core.checkpoint.layout import TensorPlan, laid_out
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import Damaged, Failed, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.records import Json
from adapterkit.core.tasks.rows import byte_view
from adapterkit.verbs.stats.job import CollectionPlan
from adapterkit.verbs.stats.model.layers import OffloadedLayer, is_within
from adapterkit.verbs.stats.sums import Sum, Sums

OUTSIDE, WHOLE = "outside.safetensors", "whole.safetensors"
SUMS = "sums"  # metadata of a file: the modules of each of its sums
OWN = re.compile(r"([0-9]{1,9}/)?([0-9]{1,9}@)?[a-z0-9]+(\.(sums|gradients))?\.safetensors")
VISITS = "visits"  # how many times the batches had gone through the part when it was written


@dataclass
class Collected:
    """Results of batches: sums over inputs, and Σ dLoss/dW by module, as the model has W, in
    float32 on the CPU."""

    sums: Sums
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add_gradient(self, module: str, value: Tensor) -> None:
        value = value.detach().float().cpu()
        if module in self.gradients:
            self.gradients[module] += value
        else:
            self.gradients[module] = value.clone()

    def add(self, other: "Collected") -> None:
        """Add the results of more batches."""
        self.sums.merge(other.sums.groups)
        for module, value in other.gradients.items():
            self.add_gradient(module, value)

    def check(self) -> None:
        """`Failed` for values that are not finite."""
        self.sums.settle()
        for one in self.sums.groups:
            one.check()
        for module, value in self.gradients.items():
            if not bool(torch.isfinite(value).all()):
                raise Failed(
                    f"gradients of {shown(module)} are not finite",
                    expected="numbers",
                    where="collect",
                    hint="run the model in float32 or bfloat16",
                    code="AK903",
                )


@dataclass(frozen=True)
class SumsFile:
    """Sums of one unit of the model, or gradients (out, in), in a file of the work folder."""

    folder: Path
    name: str
    header: Header

    @classmethod
    def write(
        cls,
        path: Path,
        sums: list[Sum],
        gradients: Mapping[str, Tensor],
        visits: int = 1,
        attempt: str = "",
    ) -> None:
        """Write sums in float64, gradients in float32; the file appears completely or not at all.
        `attempt`: as in `ShardFile`."""
        tensors: dict[str, Tensor] = {}
        for number, one in enumerate(sums):
            tensors |= {f"{number}.{key}": value for key, value in one.tensors().items()}
        tensors |= {f"gradient.{module}": value for module, value in gradients.items()}
        stored = [
            TensorPlan(key, dtypes.name_of(value.dtype), tuple(value.shape))
            for key, value in tensors.items()
        ]
        about = {SUMS: json.dumps([one.record() for one in sums]), VISITS: str(visits)}
        layout = laid_out(path.name, stored, about)
        shard = ShardFile(path.parent, path.name, layout.size, attempt)
        try:
            shard.write(layout.header, 0)
            for one, start in zip(layout.tensors, layout.starts, strict=True):
                shard.write(byte_view(tensors[one.key].cpu()), start)
            shard.sync()
        except BaseException:
            shard.abandon()
            shard.path.unlink(missing_ok=True)
            raise
        shard.publish()

    @classmethod
    def read(cls, path: Path) -> "SumsFile":
        return cls(path.parent, path.name, read_header(LocalFolder(path.parent), path.name))

    @property
    def visits(self) -> int:
        with self._of_its_form():
            return int(self.header.metadata[VISITS])

    @cached_property
    def records(self) -> list[Json]:
        """The metadata of each sum."""
        with self._of_its_form():
            records = nested_json(self.header.metadata[SUMS])
            if not isinstance(records, list):
                raise TypeError("no list of sums")
            for record in records:
                record["modules"] = list(map(str, record["modules"]))
            return records

    @contextmanager
    def _of_its_form(self) -> Iterator[None]:
        """`Damaged` for metadata that no file of sums would have."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Damaged(
                f"the metadata on sums are wrong: {shown(error)}",
                expected="a file that this job wrote",
                where=str(self.folder / self.name),
                hint="run again with --overwrite, without --resume",
                code="AK607",
            ) from error

    def sum(self, number: int) -> Sum:
        prefix = f"{number}."
        keys = [spec.key for spec in self.header.tensors if spec.key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): self._tensor(key) for key in keys}
        with self._of_its_form():
            return Sum.of(self.records[number], tensors)

    @property
    def gradients(self) -> dict[str, tuple[int, ...]]:
        """Modules with gradients, and their shapes."""
        return {
            spec.key.removeprefix("gradient."): spec.shape
            for spec in self.header.tensors
            if spec.key.startswith("gradient.")
        }

    def gradient(self, module: str) -> Tensor:
        """The sum over the backward passes."""
        return self._tensor(f"gradient.{module}")

    def _tensor(self, key: str) -> Tensor:
        spec = next(spec for spec in self.header.tensors if spec.key == key)
        with Sources((LocalFolder(self.folder),), {}) as sources:
            data = sources.read(spec)
        return dtypes.tensor_of(data, spec.dtype, spec.shape)


def sums_files(work: Path) -> list[SumsFile]:
    """The files of one process, or of several in folders of their blocks, in the order of adding:
    by unit of the model, visit, block."""

    def order(path: Path) -> tuple[str, int, int]:
        visit, _, name = path.name.rpartition("@")
        block = 0 if path.parent == work else int(path.parent.name)
        return name, int(visit or 1), block

    paths = [path for path in work.rglob("*.safetensors") if path.is_file()]
    own = [path for path in paths if OWN.fullmatch(path.relative_to(work).as_posix())]
    return [SumsFile.read(path) for path in sorted(own, key=order)]


class Tally:
    """The results for one file while batches go through a unit of the model."""

    def __init__(self, ledger: "Ledger", name: str, *, in_order: bool = True):
        self.ledger, self.name, self.in_order = ledger, name, in_order
        ledger.visits[name] += 1
        self.visit = ledger.visits[name]
        self._blocks: dict[int, Collected | None] = {}
        self.total = None if ledger.is_apart or self.is_done(0) else ledger.found(name)

    def is_done(self, block: int) -> bool:
        """True if the sums of this visit exist."""
        path = self.ledger.path(self.name, self.visit, block)
        return path.exists() and (self.ledger.is_apart or SumsFile.read(path).visits >= self.visit)

    def of(self, block: int) -> Collected | None:
        """The results of a block; None if it is done. If blocks come in order, earlier ones are
        closed first."""
        if block not in self._blocks:
            if self.in_order:
                self._close_blocks()
            self._blocks[block] = None if self.is_done(block) else self.ledger.nothing()
        return self._blocks[block]

    def _close_blocks(self) -> None:
        """Add or write the blocks; `Failed` for values that are not finite."""
        for block in sorted(self._blocks):
            collected = self._blocks.pop(block)
            if collected is None:
                continue
            collected.check()
            if self.total is not None:
                self.total.add(collected)
            else:
                self.ledger.write(self.name, self.visit, block, collected)

    def close(self) -> None:
        """Write the remaining sums after the last batch."""
        self._close_blocks()
        if self.total is not None:
            self.ledger.write(self.name, self.visit, 0, self.total)


class Ledger:
    """The files of the sums of a model's units, in the work folder; existing sums are not computed
    again.

    One process adds up all blocks. A file then has the sums so far and their number of visits,
    because a layer that the model uses several times is visited several times. Several processes,
    each an `attempt`, keep their blocks separate: each has a folder, and each visit a file of its
    own."""

    def __init__(self, job: CollectionPlan, work: Path, attempt: str = ""):
        self.job, self.work, self.attempt = job, work, attempt
        self.is_apart = bool(attempt)
        self.visits = Counter[str]()
        folders = [work, *(work / str(block) for block, _ in job.runs if attempt)]
        with storage_errors(work):  # if it is gone, other processes have finished the output
            for folder in dict.fromkeys(folders):
                check_folder(work.parent, folder)
                folder.mkdir(exist_ok=True)

    def path(self, name: str, visit: int, block: int) -> Path:
        if not self.is_apart:
            return self.work / name
        return self.work / str(block) / (name if visit == 1 else f"{visit}@{name}")

    def nothing(self) -> Collected:
        return Collected(self.job.sums())

    def found(self, name: str) -> Collected:
        """The sums of earlier visits."""
        collected, path = self.nothing(), self.path(name, 1, 0)
        if path.exists():
            file = SumsFile.read(path)
            collected.sums.merge(map(file.sum, range(len(file.records))))
            for module in file.gradients:
                collected.add_gradient(module, self._oriented(module, file.gradient(module)))
        return collected

    def write(self, name: str, visit: int, block: int, collected: Collected) -> None:
        oriented = {m: self._oriented(m, value) for m, value in collected.gradients.items()}
        path = self.path(name, visit, block)
        SumsFile.write(path, collected.sums.groups, oriented, visit, self.attempt)

    def _oriented(self, module: str, gradient: Tensor) -> Tensor:
        """(out, in) of a gradient as the model has it, and the reverse."""
        return gradient.T if self.job.is_transposed(module) else gradient

    def of_unit(self, unit: OffloadedLayer, is_backward: bool) -> Tally | None:
        """The tally of the inputs of a unit's layers, or of their gradients; None for a unit
        without such layers."""
        wanted = self.job.gradients if is_backward else self.job.inputs
        if not wanted or not any(is_within(name, [unit.name]) for name in self.job.targets):
            return None
        kind = "gradients" if is_backward else "sums"
        return Tally(self, f"{unit.order:06}.{kind}.safetensors")

    def outside(self) -> Tally | None:
        """The tally of layers outside the units, whose batches do not come block after block."""
        units = self.job.units
        if all(units.unit_of(name) is not None for name in self.job.targets):
            return None
        return Tally(self, OUTSIDE, in_order=False)


def groups_of(files: list[SumsFile]) -> Iterator[tuple[list[str], list[tuple[SumsFile, int]]]]:
    """Yield modules that have seen the same inputs, and their sums in order."""
    sums: dict[str, list[tuple[int, int]]] = {}
    for number, file in enumerate(files):
        for index, record in enumerate(file.records):
            for module in record["modules"]:
                sums.setdefault(module, []).append((number, index))
    groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for module, places in sums.items():
        groups.setdefault(tuple(places), []).append(module)
    for places, modules in groups.items():
        yield modules, [(files[number], index) for number, index in places]
