"""edit: change an adapter's description and its strength, but not its factors."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.core.options import (
    FLAG,
    NUMBER,
    SETTINGS,
    SOURCE,
    TEXT,
    TEXTS,
    StrPath,
    argument,
    option,
    record,
)
from adapterkit.core.verb import WritingVerb, function_of


@record
class Edit(WritingVerb):
    """Write an adapter again in its own format, with another description; its tensors keep their
    bytes.

    `base_id` is the id of its base: `base_model_name_or_path` in PEFT's layout,
    `ss_sd_model_name` in other metadata. `title`, `trigger` (words that a prompt needs) and `tag`s
    become `modelspec.*` in the metadata of a file, and fields of the card (README.md) in a folder
    in PEFT's layout. `alpha` sets the alpha of all modules, and so multiplies the delta by new /
    old. With `fold` the delta stays the same: b is multiplied by old / new, rounded once.
    `metadata` sets keys of the file's metadata; `strip_metadata` first removes the card and the
    trainer's metadata. An `out` that ends in .safetensors is a file. Raises `Refused` if the format
    cannot store a field, or cannot be written.
    """

    planner = "adapters.formats.planning.edit:plan_edit"
    command = """Edit an adapter's title, base id, metadata or alpha.

    Also its trigger words and tags. Without --alpha no tensor changes. --alpha multiplies the
    strength by new / old; with --fold, b is scaled instead, so that the delta stays the same.

    \b
    Example:
      adapterkit edit lora.safetensors --trigger "sks dog" --title Dogs --out dogs.safetensors
      adapterkit edit ADAPTER --base-id org/base --out edited
    """

    src: StrPath = argument(kw_only=False, check=SOURCE)
    base_id: str | None = option(
        default=None, check=TEXT, metavar="ID", help="Id of the base model that the adapter names."
    )
    title: str | None = option(
        default=None, check=TEXT, metavar="TEXT", help="Title of the adapter."
    )
    trigger: str | None = option(
        default=None, check=TEXT, metavar="WORDS", help="Trigger words for prompts."
    )
    tag: Sequence[str] = option(
        default=(), check=TEXTS, metavar="TAG", help="Tag to add; repeat for several."
    )
    alpha: float | None = option(
        default=None,
        check=NUMBER,
        metavar="A",
        help="Alpha of all modules, which changes the strength.",
    )
    fold: bool = option(
        default=False, check=FLAG, help="Keep the delta by scaling b.", needs="alpha"
    )
    metadata: Mapping[str, Any] | None = option(
        default=None,
        check=SETTINGS,
        metavar="KEY=VALUE",
        help="Entry of the file's metadata to set; repeat for several.",
    )
    strip_metadata: bool = option(
        default=False, check=FLAG, help="Remove the trainer's metadata and the model card."
    )


edit = function_of(Edit)
