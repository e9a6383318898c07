"""Read stored tensors while a job is planned; from files on the Hub, only their ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, belonging_to, place_of
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import read_small
from adapterkit.core.errors import Damaged, Unrecoverable, shown
from adapterkit.core.lazy import Tensor

READ_ALONG = 4 << 20  # bytes of one request for factors, because the next reads are adjacent


class PlanReader:
    """A reader of stored tensors for planning a conversion: alphas, and factors whose values
    determine the output's shapes. From files on the Hub it reads only these ranges."""

    def __init__(self, folders: Sequence[Folder]):
        self.folders = folders
        self._data: dict[TensorSpec, bytes] = {}
        self._range: tuple[tuple[int, str], int, bytes] | None = None  # the last: file, start, data

    def prefetch(self, specs: Iterable[TensorSpec]) -> None:
        """Read small tensors of one folder together."""
        ordered = list(specs)
        if ordered:
            folder = self.folders[ordered[0].folder]
            with belonging_to(folder):
                self._data |= {spec: bytes(data) for spec, data in read_small(folder, ordered)}

    def _read(self, spec: TensorSpec) -> bytes:
        folder, file = self.folders[spec.folder], (spec.folder, spec.file)
        if isinstance(folder, LocalFolder):
            return folder.read(spec.file, spec.start, spec.stop)
        known, first, data = self._range or (None, 0, b"")
        if known != file or spec.start < first or spec.stop > first + len(data):
            first = spec.start
            data = folder.read(spec.file, first, max(spec.stop, first + READ_ALONG))
            self._range = file, first, data
        return data[spec.start - first : spec.stop - first]

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The tensor in its own dtype. `Damaged` if the file ends early, `Unrecoverable` if a value
        is not finite."""
        value = dtypes.tensor_of(bytearray(self._stored(spec)), spec.dtype, spec.shape)
        self._check_finite(spec, spec.dtype not in dtypes.FLOATS or bool(value.isfinite().all()))
        return value

    def number(self, spec: TensorSpec) -> float:
        """The single number of a tensor, of a dtype in `dtypes.NUMBERS`; errors as for `tensor`."""
        value = dtypes.number_of(bytes(self._stored(spec)), spec.dtype)
        self._check_finite(spec, math.isfinite(value))
        return value

    def _stored(self, spec: TensorSpec) -> bytes | bytearray:
        folder, data = self.folders[spec.folder], self._data.get(spec)
        if data is None:
            data = self._read(spec)
        if len(data) != spec.nbytes:
            raise Damaged(
                f"{shown(spec.key)} has {len(data)} bytes",
                expected=f"{spec.nbytes} bytes",
                where=place_of(folder, spec.file),
                hint="copy the file again",
                code="AK208",
            )
        return data

    def _check_finite(self, spec: TensorSpec, is_finite: bool) -> None:
        if not is_finite:
            raise Unrecoverable(
                f"{shown(spec.key)} is not finite",
                expected="finite values",
                where=place_of(self.folders[spec.folder], spec.file),
                hint="the training went wrong: take an earlier checkpoint",
                code="AK208",
            )
