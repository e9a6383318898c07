"""Read statistics for inits from a file, or from a mapping such as that of `runtime.collect`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import Header, TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Refused, Unrecoverable, listed, shown
from adapterkit.core.inputs.input_identity import header_hashes, identities
from adapterkit.core.inputs.sources import open_statistics as open_file
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import StrPath
from adapterkit.verbs.shared.statistics_file import Statistics

Stats = StrPath | Mapping[str, Tensor]
Read = Callable[[TensorSpec], Tensor]  # a value, float32 on the CPU


@dataclass(frozen=True)
class Mapped:
    """A mapping's tensors in the form of a file's headers."""

    name: str
    tensors: dict[str, TensorSpec]
    shards: dict[str, Header] = field(default_factory=dict)


@contextmanager
def open_statistics(stats: Stats) -> Iterator[tuple[Statistics, Read]]:
    """The statistics of a safetensors file, or of a mapping, and the function that reads their
    values; `Refused` for other sources."""
    if isinstance(stats, Mapping):
        yield _mapped(stats), lambda spec: _value(stats[spec.key], spec)
        return
    checkpoint = open_checkpoint(open_file(stats))
    folders = (checkpoint.folder,)
    expected = identities(folders, header_hashes([checkpoint]))
    with Sources(folders, expected) as sources:
        yield checkpoint, LocalReader(sources, torch.device("cpu")).tensor


def _mapped(stats: Mapping[str, Tensor]) -> Mapped:
    wrong = [k for k, v in stats.items() if not (isinstance(v, Tensor) and v.is_floating_point())]
    if wrong:
        raise Refused(
            f"{listed(wrong)} are no tensors of floats",
            expected="tensors, as runtime.collect returns them",
            where="stats",
            hint="give a file of statistics, or the result of collect",
            code="AK106",
        )
    return Mapped(
        "stats",
        {
            key: TensorSpec(key, dtypes.name_of(value.dtype), tuple(value.shape), "", 0, 0)
            for key, value in stats.items()
        },
    )


def _value(value: Tensor, spec: TensorSpec) -> Tensor:
    if not bool(value.isfinite().all()):
        raise Unrecoverable(
            f"{shown(spec.key)} has values that are not finite",
            where="stats",
            hint="collect them again, in float32 or bfloat16",
            code="AK208",
        )
    return value.detach().to("cpu", torch.float32)
