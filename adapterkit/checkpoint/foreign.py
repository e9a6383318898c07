"""LoRAs in other layouts than PEFT's, recognized to say so."""

import re
from collections.abc import Iterable

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import read_header
from adapterkit.checkpoint.shards import weight_files
from adapterkit.errors import Damaged, Refused, shown

# Keys in other layouts than PEFT's: with a pipeline's part in front, or with underscores for dots
OTHER_LAYOUTS = {
    "diffusers": re.compile(
        r"^(unet|transformer(_2)?|text_encoder(_\d)?|prior|controlnet)\."
        r"(.+\.)?(lora|lora_\w+|\w+_lora)\."
    ),
    "kohya": re.compile(
        r"^lora_(unet|te\d?|transformer|prior)_\w+\.(lora_(down|up)\.weight|alpha)$"
    ),
}
MAX_FILES = 8  # of a folder that are opened to look for them


def other_layout(keys: Iterable[str]) -> str | None:
    """The layout of a LoRA's keys if it is not PEFT's, else None."""
    known = list(OTHER_LAYOUTS.items())
    return next((layout for key in keys for layout, pattern in known if pattern.match(key)), None)


def other_lora(folder: Folder) -> tuple[str, str] | None:
    """A file of the folder that holds a LoRA in another layout than PEFT's, and the layout."""
    names = weight_files(folder) if "config.json" not in folder.files() else []
    for name in names if len(names) <= MAX_FILES else ():
        try:
            header = read_header(folder, name)
        except (Refused, Damaged):
            continue
        layout = other_layout(spec.key for spec in header.tensors)
        if layout is not None:
            return name, layout
    return None


def no_model(file: str, layout: str, where: str) -> Refused:
    """The refusal of a LoRA in another layout."""
    hint = (
        "use it with diffusers (load_lora_weights); PEFT's layout is what save_pretrained of the "
        "trained part writes"
    )
    expected = "a model, or an adapter in PEFT's layout with adapter_config.json"
    return Refused(
        f"{shown(file)} is a LoRA in the layout of {layout}",
        expected=expected,
        where=where,
        hint=hint,
    )
