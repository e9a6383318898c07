"""Folders on local disk that live as long as what they stand for."""

import shutil
import tempfile
import weakref
from pathlib import Path


def temporary_folder(owner: object) -> Path:
    """A new folder, removed with its owner."""
    home = tempfile.mkdtemp(prefix="adapterkit-")
    weakref.finalize(owner, shutil.rmtree, home, ignore_errors=True)
    return Path(home)
