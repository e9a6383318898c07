"""Group the keys of a file by module and role; keys without a role become errors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from adapterkit.adapters.formats.detect import Container
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.kinds import (
    ALPHA,
    EXPERTS,
    KINDS,
    SHAPE,
    axes_at_least,
    is_complete,
)
from adapterkit.adapters.formats.schema import Format
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import LIST_FORMATS
from adapterkit.core.errors import Problems, listed, shown

INTEGERS = ("I64", "I32")  # as diffusers writes alphas for kohya's names


@dataclass(frozen=True)
class Raw:
    """The tensors of one module of a file, by role, before its name is resolved."""

    prefix: str  # of its keys
    head: str  # the key without prefix and suffix
    kind: str
    roles: Mapping[str, TensorSpec]

    @property
    def key(self) -> str:
        return next(iter(self.roles.values())).key


def raws_of(
    format: Format, container: Container, candidates: Sequence[str], errors: Problems
) -> list[Raw]:
    """The tensors of the file by module and kind; keys without a role join the errors."""
    prefixes = _prefixes(format, candidates)
    heads: dict[tuple[str, str], dict[str, tuple[TensorSpec, dict[str, str]]]] = {}
    unknown, twice = [], []
    for key, spec in container.tensors.items():
        place = _place(format, key, prefixes)
        if place is None:
            unknown.append(key)
            continue
        prefix, head, suffix, roles = place
        home = heads.setdefault((prefix, head), {})
        if suffix in home:
            twice.append(key)
        home[suffix] = (spec, roles)
    if unknown:
        errors.add(
            f"{len(unknown)} keys do not belong to {format.title}: {listed(sorted(unknown))}",
            "a role for every key",
            LIST_FORMATS,
            code="AK302",
        )
    if twice:
        problem = f"{listed(twice)} and other keys have the same role"
        errors.add(problem, "each once", "remove one of them", code="AK302")
    raws = [raw for place, own in heads.items() for raw in _kinds(*place, own, errors)]
    for spec, role in ((spec, role) for raw in raws for role, spec in raw.roles.items()):
        numbers = dtypes.FLOATS + INTEGERS if role in (ALPHA, SHAPE) else dtypes.FLOATS
        if spec.dtype not in numbers or 0 in spec.shape or len(spec.shape) < axes_at_least(role):
            errors.add(
                f"{shown(spec.key)} is {spec.dtype} {spec.shape}",
                "F32, F16, BF16 or F64, with axes, and not empty",
                "save it as floats, gathered from all shards",
                code="AK302",
            )
    return raws


def _prefixes(format: Format, candidates: Sequence[str]) -> list[str]:
    """The prefixes of all keys, the longest first."""
    tables = [format.names.components, *(format.components(name) for name in candidates)]
    prefixes = {prefix for table in tables for own in table.values() for prefix in own}
    return sorted(prefixes or {""}, key=lambda prefix: (-len(prefix), prefix))


@lru_cache(maxsize=64)
def _suffixes(format_name: str) -> list[tuple[re.Pattern[str], dict[str, str]]]:
    """(pattern of a key, kind -> role), the longest suffix first; `{adapter}` in it may be an
    adapter's name."""
    suffixes: dict[str, dict[str, str]] = {}
    for kind, roles in formats()[format_name].kinds.items():
        for role, texts in roles.items():
            for text in texts:
                suffixes.setdefault(text, {})[kind] = role
    ordered = sorted(suffixes.items(), key=lambda item: (-len(item[0]), item[0]))
    ends = (re.escape(text).replace(r"\{adapter\}", r"(?:\.\w+)?") for text, _ in ordered)
    patterns = (re.compile(f"(.*?){end}") for end in ends)
    return [(pattern, roles) for pattern, (_, roles) in zip(patterns, ordered, strict=True)]


def _place(
    format: Format, key: str, prefixes: Sequence[str]
) -> tuple[str, str, str, dict[str, str]] | None:
    """Prefix, name, suffix and roles of a key in the format's own spelling; None if it has none."""
    for spelling, replacement in format.names.renames.items():
        key = re.sub(spelling, replacement, key)
    for pattern, roles in _suffixes(format.name):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        for prefix in prefixes:
            if match[1].startswith(prefix) and len(match[1]) > len(prefix):
                name = match[1].removeprefix(prefix)
                return prefix, name, "/".join(sorted(set(roles.values()))), roles
    return None


def _kinds(
    prefix: str,
    head: str,
    tensors: Mapping[str, tuple[TensorSpec, dict[str, str]]],
    errors: Problems,
) -> list[Raw]:
    """The deltas of one module. Its other keys decide about a key that several kinds share."""
    kinds = {kind for _, roles in tensors.values() for kind in roles}
    sets = {
        kind: {roles[kind]: spec for spec, roles in tensors.values() if kind in roles}
        for kind in KINDS
        if kind in kinds
    }
    complete = {kind: roles for kind, roles in sets.items() if is_complete(kind, roles)}
    if EXPERTS in complete:  # the axes distinguish them from factors of one matrix
        axes = {len(complete[EXPERTS][role].shape) for role in ("a", "b")}
        one_by_one = {kind: complete[kind] for kind in complete if kind != EXPERTS}
        complete = {EXPERTS: complete[EXPERTS]} if axes == {3} else one_by_one
    used: set[str] = set()
    raws = []
    for kind, roles in complete.items():
        own = {role: spec for role, spec in roles.items() if spec.key not in used}
        if is_complete(kind, own):
            raws.append(Raw(prefix, head, kind, own))
            used |= {spec.key for spec in own.values()}
    missing = sorted(spec.key for spec, _ in tensors.values() if spec.key not in used)
    if missing:
        problem = f"{shown(head)} has {listed(missing)} alone"
        errors.add(
            problem, "all tensors of a module: both factors", "save the adapter again", code="AK302"
        )
    return raws
