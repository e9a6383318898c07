"""Tell adapters of language models from those of image models."""

import re
from collections.abc import Sequence
from typing import Literal

from adapterkit.adapters.formats.library import architectures, described
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.errors import Refused, listed

OF_A_LANGUAGE_MODEL = re.compile(r"(model|model\.language_model|transformer)\.(layers|h)\.\d+\.")


def check_images(contents: Contents, format: Format, fits: Sequence[str]) -> None:
    """`Refused` for modules of a language model. `fits`: image models with such modules inside."""
    if all(OF_A_LANGUAGE_MODEL.match(m.path) for m in contents.modules):
        raise Refused(
            f"{format.title} is for image models, and these are modules of a language model: "
            f"{listed([m.path for m in contents.modules])}",
            expected="an adapter of an image model",
            where=contents.folders[0].label,
            hint="give --to peft, vllm, mlx or gguf, which are for language models"
            + "".join(f", or --architecture {name}" for name in fits),
            code="AK502",
        )


def models_of(format: str, architecture: str | None = None) -> Literal["language", "image"]:
    """The models that the adapters of a format, or of an architecture, are for: those of images
    have named components."""
    of_format = described().get(format)
    names = [] if of_format is None else [*of_format.names.components]
    if architecture is not None and not any(names):
        names += architectures()[architecture].components
    return "image" if any(names) else "language"
