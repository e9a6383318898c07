"""Plan an edit: a conversion of an adapter into its own format, with another description."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.edit import Edit
from adapterkit.adapters.formats.files.configs import strict_yaml
from adapterkit.adapters.formats.modules.kinds import KINDS
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.adapters.formats.modules.uniform_rank import with_scale
from adapterkit.adapters.formats.planning.plan import plan_written, written_file
from adapterkit.adapters.formats.planning.source import AdapterConversion, read_contents
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, Format
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.errors import Problems, Refused, as_usage, listed, shown
from adapterkit.core.inputs.sources import open_unconverted
from adapterkit.core.options import flag_of
from adapterkit.core.plan import CopyFile, Files, Plan
from adapterkit.core.records import Json

CARD = "README.md"
# option -> the key of a file's metadata, the field of a card
IN_FILE = {
    "base_id": "ss_sd_model_name",
    "title": "modelspec.title",
    "trigger": "modelspec.trigger_phrase",
    "tag": "modelspec.tags",
}
IN_CARD = {"base_id": "base_model", "title": "title", "trigger": "instance_prompt"}
MOST_CARD = 1 << 20  # bytes of a card that is read


def plan_edit(edit: Edit) -> Plan:
    """The plan of an edit; `Refused` if nothing changes, or the format cannot store a field."""
    target = Path(edit.out)
    name = target.name if target.suffix == ".safetensors" and not is_on_hub(edit.out) else None
    _check_given(edit)
    source = open_unconverted(edit.src)
    detection = detect(source)
    format = detection.format
    is_folder = format.layout == ADAPTER_LAYOUT
    _problems(edit, format, name).raise_all()
    options = ConvertOptions(to=format.name)
    conversion = AdapterConversion(source, detection, options)
    contents = _changed(read_contents(conversion), edit, is_folder)
    before = {} if edit.strip_metadata else contents.metadata
    contents = replace(contents, metadata=before)
    written = written_file(conversion, contents, edit.alpha is not None)
    if edit.alpha is not None:  # hashes are of other tensors, ranks and alphas are written anew
        before = {key: value for key, value in before.items() if "hash" not in key}
    is_kept = before and edit.alpha is None
    metadata = dict(before if is_kept else {**before, **written.metadata})
    metadata |= {} if is_folder else _words(edit, IN_FILE)
    metadata |= {key: str(value) for key, value in (edit.metadata or {}).items()}
    written = replace(written, metadata=metadata)
    plan = plan_written(source, contents, written, options, None, name)
    files = _with_card(plan.files, source, edit) if is_folder else plan.files
    return replace(
        plan,
        verb="edit",
        options=edit.recipe_options(),
        files=files,
        decisions={key: plan.decisions[key] for key in ("modules", "folded")},
        is_file=name is not None,
    )


def _check_given(edit: Edit) -> None:
    options = (*IN_FILE, "alpha", "metadata", "strip_metadata")
    if not any(getattr(edit, option) for option in options):
        with as_usage():
            raise Refused(
                "nothing to change",
                expected=f"some of {', '.join(map(flag_of, options))}",
                where="options",
                hint="give an option for the change, for example --title TITLE",
                code="AK102",
            )


def _problems(edit: Edit, format: Format, name: str | None) -> Problems:
    errors = Problems(where=format.title, code="AK505")
    if not format.writes or format.file.container != "safetensors":
        hint = "convert it first\nadapterkit convert ADAPTER --to peft --out converted"
        errors.add(f"{format.title} is not edited", "a format of safetensors that is written", hint)
    if format.layout == ADAPTER_LAYOUT and name is not None:
        hint = "give --out without an ending"
        errors.add("PEFT's layout in one file", "a folder", hint, where="--out")
    has_alpha = format.layout == ADAPTER_LAYOUT or format.scale.place != "none"
    if edit.alpha is not None and not has_alpha:
        hint = "give the strength when you use it, or convert it to a format with an alpha"
        errors.add(f"{format.title} has no alpha", "a format with one", hint)
    return errors


def _changed(contents: Contents, edit: Edit, is_folder: bool) -> Contents:
    """The contents with the requested alpha, and the base's id in their config."""
    if edit.base_id and is_folder:
        config = {**contents.config, "base_model_name_or_path": edit.base_id}
        contents = replace(contents, config=config)
    if edit.alpha is None:
        return contents
    modules = []
    for module in contents.modules:
        if not KINDS[module.kind].scaled:
            modules.append(module)
        elif edit.fold:
            modules.append(with_scale(module, edit.alpha / module.rank))
        else:
            modules.append(replace(module, alpha=edit.alpha, stored_alpha=None))
    return replace(contents, modules=tuple(modules), refitted=True)


def _words(edit: Edit, places: dict[str, str]) -> dict[str, str]:
    values = {key: getattr(edit, name) for name, key in places.items()}
    joined = lambda value: ", ".join(value) if isinstance(value, tuple) else value
    return {key: joined(value) for key, value in values.items() if value}


def _with_card(files: Files, source: Folder, edit: Edit) -> Files:
    """The files with a card that has the new fields; its text stays."""
    old = files.get(CARD)
    if edit.strip_metadata or not isinstance(old, bytes | CopyFile):
        text = ""
    elif isinstance(old, bytes):
        text = old.decode()
    else:
        text = source.read(CARD, 0, min(source.files()[CARD], MOST_CARD)).decode("utf-8", "replace")
    fields, body = _parts(text, source)
    words: Json = dict(_words(edit, IN_CARD))
    if edit.tag:
        words["tags"] = [*dict.fromkeys([*(fields.get("tags") or []), *edit.tag])]
    others = {name: file for name, file in files.items() if name != CARD}
    if not words:
        return others if edit.strip_metadata else files
    head = yaml.safe_dump(fields | words, sort_keys=False, allow_unicode=True)
    return {CARD: f"---\n{head}---\n{body}".encode(), **others}


def _parts(text: str, source: Folder) -> tuple[dict, str]:
    """A card's fields and its text; `Refused` if its fields cannot be read."""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}, text
    head, _, body = text[4:].partition("\n---")
    fields: Any
    try:
        fields = strict_yaml(head) or {}
    except ValueError:
        fields = None
    tags = (fields.get("tags") or []) if isinstance(fields, dict) else None
    if not isinstance(tags, list) or any(isinstance(tag, list | dict) for tag in tags):
        raise Refused(
            f"{CARD} does not begin with metadata: {listed([shown(head[:80])])}",
            expected="YAML between two lines of ---",
            where=f"{source.label}/{CARD}",
            hint="fix it, or give --strip-metadata",
            code="AK204",
        )
    return fields, body.lstrip("-").removeprefix("\n")
