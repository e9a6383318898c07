"""An adapter of another format as a folder in PEFT's layout, for every verb that takes one."""

import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterkit.adapters.keys import CONFIG, WEIGHTS
from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import AdapterkitError
from adapterkit.formats.detect import detect
from adapterkit.formats.library import formats
from adapterkit.planning.convert import ADAPTER_LAYOUT, Options, plan_convert


def in_adapter_layout(folder: Folder) -> Folder:
    """The folder itself where it is in PEFT's layout, or in no format that is known (its reader
    refuses it); else one that stands for it."""
    if CONFIG in folder.files() or not any(name.endswith(FILES) for name in folder.files()):
        return folder
    try:
        detection = detect(folder)
    except AdapterkitError:
        return folder
    if detection.form.layout == ADAPTER_LAYOUT:
        return folder
    return ConvertedFolder(folder, detection.form.name)


FILES = (".safetensors", ".gguf")


@dataclass
class ConvertedFolder:
    """A conversion into PEFT's layout, carried out in a temporary folder when its weights are first
    asked for."""

    source: Folder
    form: str
    name: str = field(init=False)
    label: str = field(init=False)
    origin: dict[str, Any] = field(init=False)  # the source's, with the format that it was in
    hashes: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.label = self.source.name, self.source.label
        self.origin = {**self.source.origin, "format": self.form}

    def __reduce__(self) -> tuple:
        return ConvertedFolder, (self.source, self.form)

    @cached_property
    def _folder(self) -> "_Temporary":
        from adapterkit.engines.local import local
        from adapterkit.execute import run

        layout = next(f.name for f in formats().values() if f.layout == ADAPTER_LAYOUT)
        place = _Temporary()
        run(plan_convert(self.source, Options(layout)), place.path, local("cpu"), hash="none")
        return place

    def files(self) -> dict[str, int]:
        return {name: os.stat(self.path(name)).st_size for name in (CONFIG, WEIGHTS)}

    def read(self, name: str, start: int, stop: int) -> bytes:
        with self.path(name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def path(self, name: str) -> Path:
        return self._folder.path / name

    def prefetch(self, names: list[str]) -> None:
        pass


class _Temporary:
    """A folder that is removed with its owner."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="adapterkit-")
        self.path = Path(self._home.name, "adapter")
