"""Rewrite weights in a pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) as a safetensors file.

A pickle is a program. It is loaded only with the user's permission, and then by torch's restricted
loader, which runs none of its functions. Its values are checked before use.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.disk import storage_errors
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, SingleFile
from adapterkit.core.checkpoint.header import build_header
from adapterkit.core.checkpoint.overlay import Copied, Overlay, identities_of
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.checkpoint.shards import PICKLES, TRAINER
from adapterkit.core.commands import command
from adapterkit.core.errors import Damaged, Problems, Refused, listed, shown
from adapterkit.core.lazy import Tensor, torch

# keys of the weights in trainers' files that also contain the optimizer's state, counters, ...
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "adapter")
# litgpt adds .lora
_NAME = re.compile(rf"(.+?)({'|'.join(map(re.escape, PICKLES))})(\.lora)?", re.IGNORECASE)
STATES = "_states.pt"  # ends of the names of DeepSpeed's shards
MAX_DEPTH = 4  # of wrappers inside each other
MAX_GROWTH = 16  # times the file's size: tensors may share a storage, but not without end
# torch's loader has no error of its own; damaged files raised these
LOADER_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, MemoryError, ImportError, OSError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def pickles_of(folder: Folder) -> list[str]:
    """The folder's own pickles that may hold an adapter; empty if it has a safetensors file."""
    names = [name for name in folder.files() if "/" not in name]
    if any(name.endswith(".safetensors") for name in names):
        return []
    pickled = [name for name in names if is_pickle(name) and not name.endswith(STATES)]
    return sorted(name for name in pickled if not name.startswith(TRAINER))


def is_pickle(name: str) -> bool:
    """True for a file name that stands for weights in a pickle."""
    return _NAME.fullmatch(name) is not None


def rewritten_name(name: str) -> str:
    """The name of the safetensors file with a pickle's tensors."""
    match = _NAME.fullmatch(name)
    return f"{match[1] if match else name}.safetensors"


def unsafe(name: str, where: str) -> Refused:
    """The refusal of a pickle that the user has not allowed."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file(torch.load({name!r}, weights_only=True), {rewritten_name(name)!r})"
    )
    return Refused(
        f"{shown(name)} is a pickle: loading it may run the code in it",
        expected="a safetensors file",
        where=where,
        hint="where you trust it, --allow-pickle reads it with torch's weights_only loader, or "
        f"rewrite it\n{command('python -c', code)}",
        code="AK205",
    )


def rewrite(source: Path, out: Path) -> list[str]:
    """Write the tensors of a pickle to the safetensors file `out`, in their order.

    Returns the names of the entries left out next to a wrapped state dict. Raises `Damaged` if
    torch's restricted loader cannot read the file, `Refused` for values other than tensors.
    """
    where = source.name
    tensors, left_out = _weights(_load(source), where)
    _check(tensors, source.stat().st_size, where)
    header, starts = build_header(
        [(key, dtypes.name_of(t.dtype), tuple(t.shape)) for key, t in tensors.items()], {}
    )
    with storage_errors(out), out.open("xb") as file:
        file.write(header)
        for tensor, start in zip(tensors.values(), starts, strict=True):
            file.seek(start)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return left_out


def _load(source: Path) -> Any:
    """The value in a pickle, its tensors mapped from the file if it is an archive."""
    try:
        archive = zipfile.is_zipfile(source)
        if archive:
            with zipfile.ZipFile(source) as members:
                packed = [m.filename for m in members.infolist() if m.compress_type]
            if packed:
                raise ValueError(f"compressed members: {listed(packed)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that the loader reads or refuses anyway
            return torch.load(source, map_location="cpu", weights_only=True, mmap=archive)
    except LOADER_ERRORS as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Damaged(
            f"torch's weights_only loader does not read it: {shown(reason[0])}",
            expected="a file of torch.save with tensors only",
            where=source.name,
            hint="save the state dict alone, or better a safetensors file, where it was trained",
            code="AK205",
        ) from error


def _weights(value: object, where: str, depth: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a loaded value, and the names of its other entries."""
    if not isinstance(value, Mapping):
        raise _no_state_dict(f"a {type(value).__name__}", where)
    if value and all(isinstance(one, Tensor) for one in value.values()):
        return dict(value), []
    inner = [key for key in WRAPPERS if isinstance(value.get(key), Mapping) and value[key]]
    loose = [key for key, one in value.items() if isinstance(one, Tensor)]
    if len(inner) != 1 or loose or depth == MAX_DEPTH:
        others = [key for key in value if key not in loose]
        problem = f"tensors next to {listed(others)}" if loose else listed(others) or "nothing"
        raise _no_state_dict(problem, where)
    tensors, left_out = _weights(value[inner[0]], where, depth + 1)
    return tensors, [shown(key) for key in value if key != inner[0]] + left_out


def _no_state_dict(problem: str, where: str) -> Refused:
    return Refused(
        problem,
        expected=f"a state dict, or one under {', '.join(WRAPPERS)}",
        where=where,
        hint="save the state dict of the adapter alone",
        code="AK205",
    )


def _check(tensors: Mapping[str, Tensor], size: int, where: str) -> None:
    """Refuse keys and tensors that a safetensors file of about this size cannot hold."""
    errors = Problems(where=where, hint="save the state dict of the adapter alone", code="AK205")
    for problem in _problems(tensors):
        errors.add(problem, "tensors of numbers, each under a name")
    errors.raise_all()
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    if total > MAX_GROWTH * size:
        raise Damaged(
            f"a file of {size} bytes has {total} bytes of tensors",
            expected=f"at most {MAX_GROWTH} times the file",
            where=where,
            hint="save clones of the tensors",
            code="AK205",
        )


def _problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(key, str):
            yield f"the key {shown(key)!r}, a {type(key).__name__}"
        elif not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            yield f"{shown(key)!r} is not a plain tensor"
        elif not dtypes.has_name(tensor.dtype):
            yield f"{shown(key)!r} is {tensor.dtype}"


def without_pickles(folder: Folder) -> Folder:
    """The folder itself if it has safetensors files or no pickle; otherwise one whose pickle is
    rewritten, a single file with its configs. `Refused` if there are several."""
    names = pickles_of(folder)
    if not names:
        return folder
    if single := getattr(folder, "single", None):
        folder = cast(SingleFile, folder).as_weights(single)
    if len(names) > 1:
        raise Refused(
            f"{len(names)} pickles: {listed(names)}",
            expected="one that holds the adapter",
            where=folder.label,
            hint="give the file instead of the folder",
            code="AK205",
        )
    origin, maker = {**folder.origin, "pickle": names[0]}, Unpickling(folder, names[0])
    return Overlay(folder.name, folder.label, origin, None, maker, folder, folder.hashes)


@dataclass(frozen=True)
class Unpickling:
    """Writes the tensors of a folder's pickle into a safetensors file next to its other files."""

    source: Folder
    pickle: str
    left_out: list[str] = field(default_factory=list)  # its entries other than the state dict

    @property
    def weights(self) -> str:
        return rewritten_name(self.pickle)

    def make(self, place: Path) -> Mapping[str, Copied]:
        self.left_out[:] = rewrite(self.source.path(self.pickle), place / self.weights)
        others = (name for name in self.source.files() if name != self.pickle)
        files = {name: Copied(self.source, name) for name in others}
        own = LocalFolder(place / self.weights)
        return files | {self.weights: Copied(own, self.weights)}

    def identities(self, name: str) -> dict[str, Identity]:
        if name != self.weights:
            return identities_of(self.source, name)
        found = identities_of(self.source, self.pickle)
        return {f"source/{name}": one for name, one in found.items()}
