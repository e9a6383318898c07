"""Modules of language models, which the formats of image models do not name."""

import re
from collections.abc import Sequence

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
