"""GGUF files of image and video models, as ComfyUI-GGUF and stable-diffusion.cpp write them: the
publisher's names, shapes turned around, no metadata of a model.

Facts: https://github.com/city96/ComfyUI-GGUF (loader.py, tools/convert.py),
https://github.com/leejet/stable-diffusion.cpp (src/model_io/gguf_io.cpp).
"""

import math

from adapterkit.bases.gguf.file import check_types, gguf_package
from adapterkit.bases.gguf.header import MAX_ERRORS, GgufFiles, GgufHeader, read_model
from adapterkit.bases.gguf.model import GgufCheckpoint
from adapterkit.bases.gguf.tensors import as_stored
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Problems, shown

SHAPE = "comfy.gguf.orig_shape."  # of a tensor that is kept in rows of 256 values


def open_image_gguf(files: GgufFiles, number: int = 0) -> GgufCheckpoint | None:
    """A file's tensors under their own names, as input `number` of the job; None for a model of
    llama.cpp's, whose metadata has its number of blocks. `Refused` for types that nothing
    decodes, and for shapes of another size."""
    header, headers = read_model(files)
    if not is_of_images(header):
        return None
    kinds = {entry.type for entry in header.tensors}
    check_types(gguf_package(), kinds)
    errors = Problems(where=files.names[0], hint="make the file again", code="AK207")
    tensors: dict[str, TensorSpec] = {}
    for entry in header.tensors:
        shape = header.arrays.get(SHAPE + entry.name, entry.shape)
        if math.prod(shape) != math.prod(entry.shape) or min(shape, default=0) < 1:
            errors.add(f"{shown(entry.name)} {entry.shape} is said to be {shape}", "as many values")
        tensors[entry.name] = as_stored(entry, shape=shape, number=number)
    Problems(errors[:MAX_ERRORS]).raise_all()
    shards = {name: one.header for name, one in headers.items()}
    return GgufCheckpoint(files.folder, shards, tensors, None, None, {}, {}, headers=headers)


def is_of_images(header: GgufHeader) -> bool:
    """Whether a file may be of an image model: llama.cpp's have their number of blocks."""
    return f"{header.architecture}.block_count" not in header.metadata
