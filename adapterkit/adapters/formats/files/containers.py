"""The file of a format: its stored tensors and metadata, whatever its container."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapterkit.adapters.variants.eight_bits import decoded
from adapterkit.core.checkpoint.folder import Folder, belonging_to
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.records import Settings
from adapterkit.core.registry import load
from adapterkit.doors import CONTAINERS


@dataclass(frozen=True)
class Container:
    """A file's tensors by key, its metadata, and the hash of what was read of it."""

    file: str
    tensors: Mapping[str, TensorSpec]
    metadata: Settings
    header_sha256: str


def open_container(folder: Folder, file: str, number: int) -> Container:
    """The tensors of a safetensors or GGUF file. Raises `Damaged` or `Refused`."""
    with belonging_to(folder):
        for ending, container in CONTAINERS.items():
            if file.endswith(ending):
                adapter = load(container["adapter"])(folder, file, number)
                return Container(file, adapter.tensors, adapter.metadata, adapter.header.sha256)
        header = read_header(folder, file, number)
    tensors = decoded({spec.key: spec for spec in header.tensors})
    return Container(file, tensors, header.metadata, header.sha256)
