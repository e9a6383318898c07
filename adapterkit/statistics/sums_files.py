"""The work folder: sums of what is done, as files from which the statistics are made in the end."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.header import Header, read_header
from adapterkit.checkpoint.layout import ShardLayout, TensorPlan, laid_out
from adapterkit.checkpoint.output.writer import ShardFile
from adapterkit.checkpoint.reader import Sources
from adapterkit.statistics.sums import Sum
from adapterkit.tasks.rows import byte_view

SUMS = "sums"  # metadata of a file of sums: what each of them is of
VISITS = "visits"  # how many times the batches had gone through the part when it was written
PASSES = "passes"  # backward passes whose gradients are summed


@dataclass(frozen=True)
class SumsFile:
    """Sums of one part of the model, or gradients, in a file of the work folder."""

    folder: Path
    name: str
    header: Header

    @classmethod
    def write(
        cls,
        folder: Path,
        name: str,
        sums: list[Sum],
        gradients: Mapping[str, Tensor],
        visits: int = 1,
        passes: int = 1,
        attempt: str = "",
    ) -> "SumsFile":
        """Sums in float64, sums of gradients (out, in) in float32; the file appears whole or not at
        all. `attempt`: as of `ShardFile`."""
        tensors: dict[str, Tensor] = {}
        records = []
        for number, one in enumerate(sums):
            tensors |= {f"{number}.{key}": value for key, value in one.tensors().items()}
            records.append(one.record())
        tensors |= {f"gradient.{module}": value for module, value in gradients.items()}
        stored = [
            TensorPlan(key, dtypes.name_of(value.dtype), tuple(value.shape))
            for key, value in tensors.items()
        ]
        about = {SUMS: json.dumps(records), VISITS: str(visits), PASSES: str(passes)}
        layout = laid_out(name, stored, about)
        values = ((stored.key, tensors[stored.key]) for stored in layout.tensors)
        write_file(folder, layout, values, attempt)
        return cls.read(folder, name)

    @classmethod
    def read(cls, folder: Path, name: str) -> "SumsFile":
        return cls(folder, name, read_header(LocalFolder(folder), name))

    def sums(self) -> Iterator[Sum]:
        """One after the other."""
        for number, record in enumerate(json.loads(self.header.metadata[SUMS])):
            prefix = f"{number}."
            tensors = {
                spec.key.removeprefix(prefix): self._tensor(spec.key)
                for spec in self.header.tensors
                if spec.key.startswith(prefix)
            }
            yield Sum.of(record, tensors)

    @property
    def visits(self) -> int:
        return int(self.header.metadata[VISITS])

    @property
    def records(self) -> list[dict[str, Any]]:
        return json.loads(self.header.metadata[SUMS])

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

    def mean_gradient(self, module: str) -> Tensor:
        return self.gradient(module).div_(int(self.header.metadata[PASSES]))

    def _tensor(self, key: str) -> Tensor:
        spec = next(spec for spec in self.header.tensors if spec.key == key)
        with Sources((LocalFolder(self.folder),), {}) as sources:
            data = sources.read(spec)
        return dtypes.tensor_of(data, spec.dtype, spec.shape)


def write_file(
    folder: Path, layout: ShardLayout, tensors: Iterator[tuple[str, Tensor]], attempt: str = ""
) -> None:
    """Write a file of tensors that come in its order, one at a time; it appears whole or not at
    all."""
    shard = ShardFile(folder, layout.file, layout.size, attempt)
    try:
        shard.write(layout.header, 0)
        for stored, start, (key, value) in zip(layout.tensors, layout.starts, tensors, strict=True):
            assert key == stored.key and tuple(value.shape) == stored.shape
            shard.write(byte_view(value), start)
            shard.start_writeback(start, stored.nbytes)
        shard.sync()
    except BaseException:
        shard.abandon()
        shard.path.unlink(missing_ok=True)
        raise
    shard.publish()


def remove(folder: Path) -> None:
    """Remove a work folder."""
    shutil.rmtree(folder, ignore_errors=True)
