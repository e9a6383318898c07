"""Identities and header hashes of the inputs, by which a plan knows its files again."""

import os
from collections.abc import Iterable, Sequence

from adapterkit.adapters.keys import CONFIG, WEIGHTS
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.hashes import sha256_of_small_file
from adapterkit.checkpoint.reader import Identity, identity
from adapterkit.checkpoint.spec import Checkpoint


def headers_of(adapters: Sequence[Adapter]) -> dict[tuple[int, str], str]:
    """The hashes of the adapters' headers and configs, by which a plan knows its inputs."""
    headers = {}
    for adapter in adapters:
        headers[adapter.number, WEIGHTS] = adapter.header_sha256
        headers[adapter.number, CONFIG] = sha256_of_small_file(adapter.folder, CONFIG)
    return headers


def model_headers(model: Checkpoint, number: int) -> dict[tuple[int, str], str]:
    """The hashes of the headers of the model that is input `number`."""
    return {(number, name): header.sha256 for name, header in model.shards.items()}


def identities(
    folders: tuple[Folder, ...], names: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], Identity]:
    """Device, inode, size and times of the inputs' local files, to be taken when their headers are read."""
    local = [(folder, name) for folder, name in names if isinstance(folders[folder], LocalFolder)]
    return {(folder, name): identity(os.stat(folders[folder].path(name))) for folder, name in local}


def base_headers(base: Checkpoint) -> dict[tuple[int, str], str]:
    """The hashes of a base's headers and config, by which a plan knows its input."""
    headers = model_headers(base, 0)
    return headers | (
        {(0, "config.json"): sha256_of_small_file(base.folder, "config.json")}
        if "config.json" in base.files
        else {}
    )
