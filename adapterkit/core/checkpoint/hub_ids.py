"""Hub ids: `org/name[@revision][:path]`, a folder of a model repository, or one file of it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.core.errors import shown

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
GRAMMAR = re.compile(
    rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[^\s:\\~^?*\[]+))?(?::(?P<subfolder>[^:\\]+?)/?)?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubId:
    """A folder of a model repository, `org/name[@revision][:subfolder]`; or one file, with its path
    instead of the subfolder."""

    repo: str
    revision: str | None = None  # a branch, a tag or a commit; None: the default branch
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.subfolder}" if self.subfolder else "")

    def path(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    @property
    def parent(self) -> "HubId":
        """Return the folder that contains this folder or file."""
        return replace(self, subfolder=self.subfolder.rpartition("/")[0])


def is_on_hub(out: str | os.PathLike[str]) -> bool:
    """Return whether an output is an address on the Hub, `hf://org/name[@branch][:folder or
    file]`."""
    return os.fspath(out).startswith(("hf:/", "hf:\\"))  # a Path shortens hf:// to this


def place_on_hub(out: str | os.PathLike[str]) -> HubId | None:
    """Return the Hub address of an output `hf://...`, a folder or a file; None for a local
    output."""
    text = os.fspath(out)
    text = text if isinstance(out, str) else text.replace("\\", "/")  # a Path of Windows
    return parse(re.sub("^hf:/+", "", text))


def parse(source: str) -> HubId | None:
    """Return the Hub id that a text is, or None. Callers check first whether it is a path on
    disk."""
    match = GRAMMAR.fullmatch(source) if source.isprintable() else None
    if match is None:
        return None
    repo, revision, subfolder = match.group("repo", "revision", "subfolder")
    valid_name = all(
        ".." not in part and "--" not in part and not part.endswith(".git")
        for part in repo.split("/")
    )
    valid_paths = all(
        part and part == part.rstrip(". ")
        for path in (revision, subfolder)
        if path
        for part in path.split("/")
    )
    return HubId(repo, revision, subfolder or "") if valid_name and valid_paths else None


def portable_name(source: str | os.PathLike[str]) -> str:
    """Return the name of a source for a file: the last component of its path, or its Hub id without
    a commit."""
    text = os.fspath(source)
    hub_id = parse(text)
    if hub_id is None or os.path.exists(text):
        return shown(os.path.basename(os.path.normpath(text)))
    is_commit = COMMIT.fullmatch(hub_id.revision or "") is not None
    return str(replace(hub_id, revision=None) if is_commit else hub_id)


def repositories(receipt: Mapping[str, Any]) -> set[str]:
    """Return the repositories from which an output was made, according to its receipt: its inputs,
    and those from which local inputs were made."""
    recipe, earlier = receipt.get("recipe"), receipt.get("repositories")
    inputs = recipe.get("inputs") if isinstance(recipe, dict) else None
    names = [entry.get("repo") for entry in _list(inputs) if isinstance(entry, dict)]
    ids = {name: parse(name) for name in [*names, *_list(earlier)] if isinstance(name, str)}
    return {name for name, hub_id in ids.items() if hub_id and hub_id.repo == name}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
