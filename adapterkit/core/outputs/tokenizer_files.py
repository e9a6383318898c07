"""The tokenizer that goes into an output: the base's, or the one saved beside an adapter."""

import contextlib

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.shards import TOKENIZER
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.plan import CopyFile
from adapterkit.core.records import Json


def tokenizer_files(
    adapters: list[Adapter], choice: str | None, notes: list[str]
) -> dict[str, CopyFile]:
    """The tokenizer saved beside an adapter, if there is one: training may have added tokens to
    it."""
    if choice == "base":
        return {}
    files_of = {
        a.number: {n for n in a.folder.files() if "/" not in n and TOKENIZER.fullmatch(n)}
        for a in adapters
    }
    files_of = {number: names for number, names in files_of.items() if names}
    if choice == "adapter" and not files_of:
        raise Refused(
            "no tokenizer beside any adapter",
            expected="tokenizer files in an adapter's folder",
            where="--tokenizer adapter",
            hint="remove --tokenizer",
            code="AK305",
        )
    if not files_of:
        return {}
    by_number = {a.number: a for a in adapters}
    first = next(iter(files_of))
    one, noted = _tokenizer(by_number[first], files_of[first]), set()
    for number, files in files_of.items():
        other = _tokenizer(by_number[number], files)
        fast = "tokenizer.json" in one and "tokenizer.json" in other
        names = (one.keys() | other.keys()) - (
            {*REPEATED} - (one.keys() & other.keys()) if fast else set()
        )
        differing = sorted(name for name in names if one.get(name) != other.get(name))
        noted |= {name for name in differing if name in SIDES}
        if set(differing) - SIDES:
            names = f"{by_number[first].name} and {by_number[number].name}"
            raise Refused(
                f"{names} have different tokenizers: {', '.join(map(shown, differing))}",
                expected="one tokenizer",
                where="adapters",
                hint="give --tokenizer base, and copy the one you want afterwards",
                code="AK305",
            )
    notes.append(
        f"tokenizer: from {by_number[first].name}"
        + (f" (they differ in {', '.join(sorted(noted))})" if noted else "")
    )
    return {name: CopyFile(first, name) for name in sorted(files_of[first])}


# Settings of a saved tokenizer that change no token: where it came from, and what the training's
# calls had set
CALLS = ("model_max_length", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
PLACES = (
    "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "is_local",
    "local_files_only",
)  # fmt: skip
# of batches and long texts: what training set is no other tokenizer, but is noted
SIDES = {"padding_side", "truncation_side"}
# repeat what a fast tokenizer's other files say
REPEATED = ("special_tokens_map.json", "added_tokens.json")


def _without(settings: Json, *keys: str) -> Json:
    return {key: value for key, value in settings.items() if key not in keys}


def _tokenizer(adapter: Adapter, names: set[str]) -> Json:
    """The contents of a tokenizer's files that decide its tokens: by file, and by setting where the
    file is JSON."""
    contents: Json = {}
    for name in names:
        settings: Json | None = None
        if name in ("tokenizer.json", "tokenizer_config.json"):
            with contextlib.suppress(AdapterkitError):  # not ours to judge: compared as it stands
                settings = read_json(adapter.folder, name)
        if settings is None:
            contents[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
        elif name == "tokenizer.json":
            contents[name] = _without(settings, "truncation", "padding")
        else:
            contents |= _without(settings, *CALLS, *PLACES, "chat_template")
            template = settings.get("chat_template")
            if isinstance(template, str) and "chat_template.jinja" not in names:
                contents["chat_template.jinja"] = template.encode()
            elif not isinstance(template, str | None):
                contents["chat_template"] = template
    return contents
