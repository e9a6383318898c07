"""A model's checkpoint, of a folder of safetensors, of one file or of a GGUF file."""

from functools import lru_cache
from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import AdapterkitError
from adapterkit.gguf.header import ENDING, GgufFiles, find_gguf

if TYPE_CHECKING:
    from adapterkit.formats.one_file import OneFileModel

CONFIG = "config.json"


def read_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """The headers of a model, its parameters under transformers' names; raises `Refused` or
    `Damaged` with all that is wrong with it. `number`: which input of the job it is."""
    is_first_file = number == 0 and getattr(folder, "single", None) is not None
    known = one_file_of(folder) if is_first_file else None  # read before, for the output's name
    return known or _read(folder, number)


def _read(folder: Folder, number: int = 0) -> Checkpoint:
    files = find_gguf(folder)
    if files is None:
        checkpoint = open_checkpoint(folder, number)
        return checkpoint if "model_type" in checkpoint.config else _of_images(checkpoint)
    images = _images_in(files, number)
    if images is not None:
        return images
    from adapterkit.gguf.model import open_gguf
    from adapterkit.planning.inputs.gguf_tables import table_of

    return open_gguf(files, number, table_of=table_of).checkpoint


def read_plain_gguf(folder: Folder) -> Checkpoint | None:
    """A model in GGUF whose parameters are known without transformers; None for others."""
    files = find_gguf(folder)
    if files is None:
        return None
    from adapterkit.gguf.plain import open_plain_gguf
    from adapterkit.planning.inputs.gguf_tables import table_of

    return open_plain_gguf(files, table_of)


@lru_cache(maxsize=4)  # what writes the output and what reads adapters ask for it
def one_file_of(base: Folder | None) -> "OneFileModel | None":
    """The image or video model in its publisher's names that a folder or file is; None for other
    bases, and for what cannot be read, which is refused where it is opened."""
    files = () if base is None else base.files()
    if base is None or not any(name.endswith((".safetensors", ENDING)) for name in files):
        return None
    try:
        if CONFIG in files and "model_type" in read_json(base, CONFIG):
            return None
        gguf = find_gguf(base)
        model = _images_in(gguf) if gguf else _read(base)
    except AdapterkitError:
        return None
    from adapterkit.formats.one_file import OneFileModel

    return model if isinstance(model, OneFileModel) else None


def _images_in(files: GgufFiles, number: int = 0) -> "OneFileModel | None":
    """The image or video model in a GGUF file; None for a language model."""
    from adapterkit.formats.one_file import OneFileModel
    from adapterkit.gguf.images import open_image_gguf

    checkpoint = open_image_gguf(files, number)
    model = None if checkpoint is None else _of_images(checkpoint)
    return model if isinstance(model, OneFileModel) else None


def _of_images(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of an image or video model in its publisher's names as such."""
    # here, so that headers of other models are read without torch
    from adapterkit.formats.one_file import OneFileModel, with_parts
    from adapterkit.formats.schema import MODEL

    model = with_parts(checkpoint)
    if not isinstance(model, OneFileModel):
        return checkpoint
    # of a pipeline's folder the names are the model's
    is_plain = bool(checkpoint.config) and {*model.namings.values()} == {MODEL}
    return checkpoint if is_plain else model
