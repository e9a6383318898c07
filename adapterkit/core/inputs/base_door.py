"""Open bases: names of files and the config's `model_type` determine the kind of base. The usual
kind is a model in safetensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.options import StrPath, flag_of
from adapterkit.core.registry import load
from adapterkit.doors import BASES

if TYPE_CHECKING:
    from adapterkit.adapters.formats.image_model import SingleFileModel
    from adapterkit.core.merge.verb import MergeOptions

CONFIG, INDEX = "config.json", "model_index.json"
SAFETENSORS, GGUF = ".safetensors", ".gguf"


@dataclass(frozen=True)
class Base:
    """A base with the operations that verbs need. This class is for a model in safetensors;
    subclasses are for other kinds."""

    folder: Folder
    part: str = ""  # its name, if it is a component of a pipeline
    parts_of: Folder | None = None  # the pipeline's folder

    noun: ClassVar[str] = "model"
    in_safetensors: ClassVar[bool] = True
    does: ClassVar[Mapping[str, str]] = {}  # entries MODULE:FUNCTION by task
    # options of a merge that do not apply, by the kind of base that they are for
    inapplicable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a base in a GGUF file": ("imatrix", "changed_type", "gguf_scales", "modelfile")
    }
    inapplicable_to_files: ClassVar[tuple[str, ...]] = ()  # likewise, for a single-file output

    def own(self, work: str) -> Callable[..., Any] | None:
        """The function that does a task for this kind of base; None if it is done as for a
        model."""
        entry = self.does.get(work)
        return None if entry is None else load(entry)

    @cached_property
    def images(self) -> "SingleFileModel | None":
        """The image or video model in its publisher's names; None for other bases and unreadable
        ones, which are refused when they are opened."""
        return None

    @property
    def ending(self) -> str | None:
        """The ending of a single-file output's name; None if the output is a folder."""
        return None

    def read(self, number: int = 0) -> Checkpoint:
        """Its headers, with parameters under transformers' names; raises `Refused` or `Damaged`
        with all problems. `number`: its number among the job's inputs."""
        return open_checkpoint(self.folder, number)

    def read_for(self, is_enough: Callable[[Checkpoint], bool]) -> Checkpoint:
        """`read`, or a smaller view if `is_enough` accepts it."""
        return self.read()

    def check_options(self, options: "MergeOptions", imatrix: object, file: str | None) -> None:
        """Refuse options of a merge that do not apply to this base; `file`: the name of a
        single-file output."""
        errors, given = Problems(where="options", hint="remove it", code="AK102"), vars(options)
        files = () if file is None else self.inapplicable_to_files
        for expected, names in {**self.inapplicable, "a folder": files}.items():
            for name in names:
                if imatrix if name == "imatrix" else given[name]:
                    errors.add(f"{flag_of(name)} with this base", expected)
        errors.raise_all()
        if options.variant and not self.part:
            errors.add("--variant with this base", "a pipeline of diffusers", "remove --variant")
            errors.raise_all()

    def output_file(self, out: StrPath) -> str | None:
        """The name of a single-file output, or None for a folder; `Refused` if the name does not
        fit the base."""
        ending, name = self.ending, re.split(r"[/\\:]", str(out))[-1]
        if ending is not None and name.lower().endswith(ending):
            return name
        if ending is None and not name.lower().endswith(GGUF):
            return None
        raise Refused(
            f"{shown(out)} for a base that is {'one' if ending else 'no single'} file",
            expected=f"a name that ends in {ending}" if ending else "a folder",
            where="--out",
            hint=f"give --out {shown(out)}{ending}" if ending else "give the name of a folder",
            code="AK601",
        )


def is_pipeline(folder: Folder) -> bool:
    files = folder.files()
    return INDEX in files and CONFIG not in files


def is_gguf(folder: Folder) -> bool:
    """Return whether a folder is a GGUF model. A GGUF file next to safetensors is not the model;
    one file of a split model represents it."""
    here = [name for name in folder.files() if "/" not in name]
    has_file = any(name.lower().endswith(GGUF) for name in here)
    is_file = (getattr(folder, "single", None) or "").lower().endswith(GGUF)
    return is_file or (has_file and not any(name.endswith(SAFETENSORS) for name in here))


def may_be_images(folder: Folder) -> bool:
    return any(n.endswith(SAFETENSORS) for n in folder.files()) and not has_type(folder)


@lru_cache(maxsize=4)  # the output's writer and the adapters' reader both need it
def kind_of(folder: Folder) -> Base:
    """The base in a folder or file. Its class is loaded only if there are files of its kind."""
    record = next((record for finds, record in BASES.items() if load(finds)(folder)), None)
    return Base(folder) if record is None else load(record)(folder)


def has_type(folder: Folder) -> bool:
    """Return whether its config names a model of transformers, or cannot be read, which is refused
    when it is opened."""
    try:
        return CONFIG in folder.files() and "model_type" in read_json(folder, CONFIG)
    except AdapterkitError:
        return True


def read_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """The headers of the base in a folder, as input `number` of the job."""
    return kind_of(folder).read(number)
