"""The tokenizer that goes into an output: the base's, or the one saved beside an adapter."""

import re
from typing import Any

from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.plan import CopyFile

TOKENIZER = re.compile(
    r"(tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.(spm|tiktoken)"
    r"|spiece\.model|sentencepiece.*\.model|chat_template.*)"
)


def tokenizer_files(
    adapters: list[Adapter], choice: str | None, notes: list[str]
) -> dict[str, CopyFile]:
    """The tokenizer saved beside an adapter, if there is one: training may have added tokens to it."""
    if choice == "base":
        return {}
    found = {
        a.number: {n for n in a.folder.files() if "/" not in n and TOKENIZER.fullmatch(n)}
        for a in adapters
    }
    found = {number: names for number, names in found.items() if names}
    if choice == "adapter" and not found:
        raise Refused(
            "no tokenizer beside any adapter",
            expected="tokenizer files in an adapter's folder",
            where="--tokenizer adapter",
            hint="leave --tokenizer out",
        )
    if not found:
        return {}
    by_number = {a.number: a for a in adapters}
    first = next(iter(found))
    one, apart = _tokenizer(by_number[first], found[first]), set()
    for number, files in found.items():
        other = _tokenizer(by_number[number], files)
        fast = "tokenizer.json" in one and "tokenizer.json" in other
        there = (one.keys() | other.keys()) - (
            {*REPEATED} - (one.keys() & other.keys()) if fast else set()
        )
        differing = sorted(name for name in there if one.get(name) != other.get(name))
        apart |= {name for name in differing if name in SIDES}
        if set(differing) - SIDES:
            names = f"{by_number[first].name} and {by_number[number].name}"
            raise Refused(
                f"{names} have different tokenizers: {', '.join(map(shown, differing))}",
                expected="one tokenizer",
                where="adapters",
                hint="give --tokenizer base, and copy the one you want afterwards",
            )
    notes.append(
        f"tokenizer: from {by_number[first].name}"
        + (f" (they differ in {', '.join(sorted(apart))})" if apart else "")
    )
    return {name: CopyFile(first, name) for name in sorted(found[first])}


# Settings of a saved tokenizer that change no token: where it came from, and what the training's calls had set
CALLS = ("model_max_length", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
PLACES = (
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "vocab_file",
    "is_local",
    "local_files_only",
)
SIDES = {
    "padding_side",
    "truncation_side",
}  # of batches and long texts: what training set is no other tokenizer, but is noted
REPEATED = (
    "special_tokens_map.json",
    "added_tokens.json",
)  # repeat what a fast tokenizer's other files say


def _tokenizer(adapter: Adapter, names: set[str]) -> dict[str, Any]:
    """What a tokenizer's files say that makes its tokens: by file, and by setting where the file is JSON."""
    found: dict[str, Any] = {}
    for name in names:
        if name not in ("tokenizer.json", "tokenizer_config.json"):
            found[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
            continue
        try:
            said = read_json(adapter.folder, name)
        except AdapterkitError:  # not ours to judge: it is compared as it stands
            found[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
            continue
        if name == "tokenizer.json":
            found[name] = {
                key: value for key, value in said.items() if key not in ("truncation", "padding")
            }
        else:
            found |= {
                key: value
                for key, value in said.items()
                if key not in (*CALLS, *PLACES, "chat_template")
            }
            template = said.get("chat_template")
            if isinstance(template, str) and "chat_template.jinja" not in names:
                found["chat_template.jinja"] = template.encode()
            elif not isinstance(template, str | None):
                found["chat_template"] = template
    return found
