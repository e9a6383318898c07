"""Statistics as they were collected, and the file that they are written to."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.checkpoint.layout import TensorPlan, laid_out
from adapterkit.statistics.sums import Sums
from adapterkit.statistics.sums_files import SumsFile, remove, write_file
from adapterkit.tasks.statistics import INPUTS, METADATA, key_of


@dataclass(frozen=True)
class Results:
    """Statistics of a model's modules, on disk until they are asked for. A context that removes
    the work folder at its end; where it is left by an error, the folder stays for a resumption."""

    work: Path
    files: tuple[SumsFile, ...]
    what: tuple[str, ...]
    components: int  # of each module, at most
    tokens: int  # that count
    samples: int
    settings: dict[str, Any] = field(default_factory=dict)  # further entries of the metadata
    notes: tuple[str, ...] = ()

    @property
    def shared(self) -> dict[str, str]:
        """Modules whose statistics of inputs have another's name, and that name."""
        records = [record for file in self.files for record in file.records]
        return {
            module: record["modules"][0] for record in records for module in record["modules"][1:]
        }

    @property
    def modules(self) -> list[str]:
        """Modules that have statistics of their inputs, or a gradient."""
        seen = [m for f in self.files for r in f.records if r["vectors"] for m in r["modules"]]
        return list(dict.fromkeys([*seen, *(m for file in self.files for m in file.gradients)]))

    def tensors(self) -> list[TensorPlan]:
        """What the file will hold, in its order; all float32."""
        result = []
        for file in self.files:
            for record in file.records:
                width = record["width"]
                k = min(self.components, width)
                shapes = {
                    "covariance": (width, width),
                    "mean": (width,),
                    "components": (k, width),
                    "variances": (k,),
                    "variance": (1,),
                }
                kinds = [kind for name in INPUTS if name in self.what for kind in INPUTS[name]]
                result += [
                    TensorPlan(key_of(record["modules"][0], kind), "F32", shapes[kind])
                    for kind in kinds
                    if record["vectors"]
                ]
            result += [
                TensorPlan(key_of(module, "gradient"), "F32", shape)
                for module, shape in file.gradients.items()
            ]
        return result

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(`<module>.<kind>`, float32) in the order of `tensors`, one module in memory at a time;
        `Failed` for inputs that are not finite."""
        sums = Sums([name for name in self.what if name in INPUTS], self.components)
        for file in self.files:
            for one in file.sums():
                values = sums.of(one)
                yield from ((key_of(one.owner, kind), value) for kind, value in values.items())
            for module in file.gradients:
                yield key_of(module, "gradient"), file.mean_gradient(module)

    @property
    def metadata(self) -> dict[str, str]:
        """Of the file's header."""
        value = {
            "shared": self.shared,
            "tokens": self.tokens,
            "samples": self.samples,
            "what": list(self.what),
            **self.settings,
        }
        return {"format": "pt", METADATA: json.dumps(value)}

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            remove(self.work)


def write_statistics(path: Path, results: Results) -> None:
    """Write the file of statistics, one tensor in memory at a time: it appears whole, or not at
    all.

    Raises `Failed` for inputs that are not finite, and for errors of the disk.
    """
    layout = laid_out(path.name, results.tensors(), results.metadata, ordered=True)
    write_file(path.parent, layout, iter(results))
