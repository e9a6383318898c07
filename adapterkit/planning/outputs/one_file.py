"""Outputs that are one file, as their base is: a GGUF file, an image or video model."""

import re

from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import Refused, shown
from adapterkit.gguf.header import ENDING, find_gguf
from adapterkit.options import StrPath
from adapterkit.planning.inputs.model_checkpoint import one_file_of

SAFETENSORS = ".safetensors"


def output_file(base: Folder, out: StrPath) -> str | None:
    """The name of an output that is one file, as the base is; `Refused` for other names."""
    ending, name = _ending(base), re.split(r"[/\\:]", str(out))[-1]
    if ending is not None and name.lower().endswith(ending):
        return name
    if ending is None and not name.lower().endswith(ENDING):
        return None
    raise Refused(
        f"--out {shown(out)} for a base that is {'one' if ending else 'no single'} file",
        expected=f"a name that ends in {ending}" if ending else "a folder",
        where="--out",
        hint=f"give --out {shown(out)}{ending}" if ending else "give the name of a folder",
    )


def one_safetensors_file(out: StrPath) -> str:
    """The name of an output that is one file of safetensors; `Refused` for other names."""
    name = re.split(r"[/\\:]", str(out))[-1]
    if not name.lower().endswith(SAFETENSORS):
        raise Refused(
            f"--out {shown(out)} for an image model in GGUF",
            expected=f"a name that ends in {SAFETENSORS}",
            where="--out",
            hint=f"give --out {shown(out)}{SAFETENSORS}",
        )
    return name


def _ending(base: Folder) -> str | None:
    """How the name of an output ends that is one file; None for a folder."""
    files = find_gguf(base)
    if files is not None:
        return ENDING if len(files.names) == 1 else None
    is_file = getattr(base, "single", None) is not None
    return SAFETENSORS if is_file and one_file_of(base) is not None else None
