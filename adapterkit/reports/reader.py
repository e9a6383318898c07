"""Stored values for comparisons and statistics: by blocks, in the stored dtype, finite or not."""

import math
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources
from adapterkit.errors import Interrupted
from adapterkit.weights.codec import QuantizedWeight, read_parts


@dataclass
class StoredReader:
    """A `TensorReader` that several threads may use, of values in the stored dtype.

    An engine's reader converts to one dtype and refuses NaN and infinity, which are what is
    compared and reported here. Quantized weights are decoded to float32. `Interrupted` once `stop`
    is set.
    """

    sources: Sources
    stop: threading.Event = field(default_factory=threading.Event)
    cache: threading.local = field(default_factory=threading.local)  # last decoded weight

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.part(spec, spec.shape, 0)

    def part(self, spec: TensorSpec, shape: tuple[int, ...], start: int) -> Tensor:
        """A tensor of that shape from byte `start` of the stored (or decoded) one."""
        if isinstance(spec, QuantizedWeight):
            first = start // 4  # float32
            return self._decoded(spec).view(-1)[first : first + math.prod(shape)].view(shape)
        dtype = dtypes.torch_dtype(spec.dtype)
        stop = start + math.prod(shape) * dtype.itemsize
        return self.bytes(spec, start, stop).view(dtype).view(shape)

    def _decoded(self, spec: QuantizedWeight) -> Tensor:
        if getattr(self.cache, "spec", None) is not spec:
            self.cache.weight = None  # freed before the next one is decoded
            self.cache.weight = spec.decode(read_parts(spec, self.tensor)).contiguous()
            self.cache.spec = spec
        return self.cache.weight

    def bytes(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        """Stored bytes [start, stop), uint8."""
        if self.stop.is_set():
            raise Interrupted("stopped")
        data = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            self.sources.read_into(spec, start, data.numpy().data)
        return data
