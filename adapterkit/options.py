"""Options of verbs: what values each takes and what it says of itself, told once.

An `OptionCheck` reads a value from outside: values whose meaning is plain become what the verb
expects ("4" and 4.0 are 4, "5GB" is 5000000000), all others are `Refused`. `option` and `argument`
declare a field of a verb's record with its check and its help; the Python signature, the command
and its completion, plan files, pipelines and docs/api.md are made of these fields.
"""

import contextlib
import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, dataclass_transform

from adapterkit import dtypes
from adapterkit.errors import AdapterkitError, Problems, Refused, did_you_mean, shown
from adapterkit.patterns import matcher

T = TypeVar("T")
Kind = TypeVar("Kind", bound="OptionRecord")
StrPath = str | os.PathLike
# Adapters, with weights where a verb has them
Sources = (
    StrPath
    | Mapping[StrPath, float]
    | tuple[StrPath, float]
    | Iterable[StrPath | tuple[StrPath, float]]
)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_WHOLE, MOST_SEED = 2**31 - 1, 2**63 - 1


class Progress(Protocol):
    """Called with the bytes just done; `expect`, where there is one, with the bytes to come."""

    def __call__(self, done: int, /) -> None: ...


@dataclass(frozen=True)
class OptionCheck:
    """What values an option takes: `read(name, value)` gives the verb's, `Refused` for others.

    `kind` and `words` are for the command line, plan files and pipelines: how a text is read there
    (text, flag, integer, number, targets, settings; file; source, sources: what is an input), and
    the words that there are. `several`: a list.
    """

    read: Callable[[str, Any], Any]
    kind: str = "text"
    words: Sequence[str] | Callable[[], Iterable[str]] = ()  # a function: known on use alone
    several: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        return self.read(name, value)

    @property
    def is_source(self) -> bool:
        return self.kind in ("source", "sources")


@dataclass(frozen=True)
class Option:
    """What a field of a verb's record says of itself.

    An option without `help` is Python's alone. `flags`: as the command spells it, where that is not
    its name; `metavar`: what its help has for the value; `needs`: an option, or OPTION=VALUE, that
    has to be given with it; `excludes`: options that may not.
    """

    check: OptionCheck
    help: str = ""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    needs: str = ""
    excludes: tuple[str, ...] = ()


def option(
    *, default: Any = dataclasses.MISSING, check: OptionCheck, help: str = "", **more: Any
) -> Any:
    """A field of a verb's record that is given by name; required without `default`."""
    return dataclasses.field(default=default, metadata={"option": Option(check, help, **more)})


def argument(
    *,
    default: Any = dataclasses.MISSING,
    check: OptionCheck,
    kw_only: Literal[False] = False,
    **more: Any,
) -> Any:
    """A field of a verb's record that is given by its place."""
    metadata = {"option": Option(check, **more)}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, argument))
def record(cls: type[T]) -> type[T]:
    """A decorator: the class as a frozen record whose fields are options."""
    # each method that is generated costs every start of the command line some time
    return dataclass(frozen=True, kw_only=True, repr=False, eq=False)(cls)


def option_of(field: dataclasses.Field) -> Option:
    """What a field of a verb's record says of itself."""
    return field.metadata["option"]


def flag_of(name: str) -> str:
    """An option as messages and the command line have it."""
    return f"--{name.replace('_', '-')}"


class OptionRecord:
    """A record whose fields are options: made with values as people give them, it holds those that
    the checks make of them. `Refused` with all that are invalid, or do not go together."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # each is one, by `record`

    def __post_init__(self) -> None:
        errors = Problems()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            try:
                object.__setattr__(self, field.name, option_of(field).check(field.name, value))
            except AdapterkitError as error:
                errors.append(error)
        Problems(errors or self._conflicts()).raise_all()

    def only(self, kind: type[Kind]) -> Kind:
        """The options of another record that this one has too."""
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(self, name) for name in names})

    def _conflicts(self) -> list[AdapterkitError]:
        """Refusals of options that are given without what they need, or with what they exclude."""
        errors = Problems(where="options")
        fields = {field.name: field for field in dataclasses.fields(self)}
        is_given = lambda name: getattr(self, name) != fields[name].default
        for name, one in ((name, option_of(field)) for name, field in fields.items()):
            if not is_given(name):
                continue
            other, _, value = one.needs.partition("=")
            if other and (getattr(self, other) != value if value else not is_given(other)):
                needed = f"{flag_of(other)} {value}" if value else flag_of(other)
                errors.add(
                    f"{flag_of(name)} is given without {needed}",
                    f"{flag_of(name)} with {needed} alone",
                    f"remove {flag_of(name)}, or give {needed}",
                )
            for other in filter(is_given, one.excludes):
                errors.add(
                    f"{flag_of(name)} and {flag_of(other)} are given",
                    "one of them",
                    f"remove {flag_of(name)}, or {flag_of(other)}",
                )
        return errors


# An option in a hint; those of a command that the hint gives in full are that command's
_COMMANDS = r"`[^`]*`|\b(?:adapterkit|hf|ray|llama-gguf-split|python) .*"
_OPTION = re.compile(rf"{_COMMANDS}|(?<![\w-])--([a-z][a-z0-9-]*)(?: [A-Z]+\b)?")
_OF_COMMANDS = {"help", "json", "plan", "quiet"}  # options of commands that are none of their verbs


@contextlib.contextmanager
def own_hints(verb: type[OptionRecord]) -> Iterator[None]:
    """Errors of a verb hint at options that it has: planning is shared by verbs that differ. Of one
    verb within another, such as a step of `run`, the inner one's options are meant."""
    try:
        yield
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            if not one.is_of_verb:
                one.hint, one.is_of_verb = own_hint(one.hint, verb), True
        raise


def own_hint(hint: str, verb: type[OptionRecord]) -> str:
    """A hint with the verb's arguments as they are written, without alternatives that name options
    of other verbs."""
    fields = dataclasses.fields(verb)
    known = {field.name.replace("_", "-") for field in fields if field.kw_only}
    known |= {"adapter"} if "adapters" in known else set()
    arguments = {field.name for field in fields if not field.kw_only}
    name = lambda m: m[1].upper() if m[1] in arguments else m[0]
    fits = lambda text: all(m[1] in known | _OF_COMMANDS for m in _OPTION.finditer(text) if m[1])
    hint = _OPTION.sub(name, hint)
    parts = [hint] if fits(hint) else re.split(r", or |, then |; (?=give |--)", hint)
    kept = ", or ".join(part for part in parts if fits(part))
    return kept or f"adapterkit {verb.name} --help lists its options" if hint else hint


def invalid(name: str, value: Any, expected: str, hint: str = "give another value") -> Refused:
    """The refusal of an option's value."""
    text = shown(value if type(value) in (int, float) else repr(value))
    return Refused(f"{flag_of(name)} {text}", expected=expected, where="options", hint=hint)


# -- one value -------------------------------------------------------------------------------------


def choice(allowed: Sequence[str] | Callable[[], Iterable[str]]) -> OptionCheck:
    """One of these words."""

    def check(name: str, value: Any) -> str:
        words = tuple(allowed() if callable(allowed) else allowed)
        if not isinstance(value, str) or value not in words:
            hint = did_you_mean([value], words) if isinstance(value, str) else ""
            raise invalid(name, value, " or ".join(words), hint or "use one of these")
        return str(value)

    return OptionCheck(check, words=allowed)


def dtype(name: str, value: Any) -> str:
    """bf16, fp16 or fp32; also torch's name of it, or torch's dtype."""
    long = {dtypes.CONFIG_NAME[header]: short for short, header in dtypes.SHORT.items()}
    word = (
        value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    )
    short = long.get(word.removeprefix("torch."), word)
    if short not in dtypes.SHORT:
        raise invalid(name, value, " or ".join(dtypes.SHORT), "use one of these")
    return short


def whole(least: int = 1, most: int = MOST_WHOLE) -> OptionCheck:
    """An integer within bounds."""

    def check(name: str, value: Any) -> int:
        number = _integer(value)
        if number is None or not least <= number <= most:
            raise invalid(name, value, f"a whole number, {least} to {most}")
        return number

    return OptionCheck(check, "integer")


def whole_of(*allowed: int) -> OptionCheck:
    """One of these integers."""

    def check(name: str, value: Any) -> int:
        number = _integer(value)
        if number not in allowed:
            raise invalid(name, value, " or ".join(map(str, allowed)), "use one of these")
        return number

    return OptionCheck(check, words=tuple(map(str, allowed)))


def number(expected: str, fits: Callable[[float], bool]) -> OptionCheck:
    """A finite number that `fits`; `expected` says which do."""

    def check(name: str, value: Any) -> float:
        result = finite(value)
        if result is None or not fits(result):
            raise invalid(name, value, expected)
        return result

    return OptionCheck(check, "number")


def flag(name: str, value: Any) -> bool:
    """True or false, also as a number."""
    if _integer(value, flags=True) not in (0, 1) or isinstance(value, str):
        raise invalid(name, value, "True or False")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A text of printable characters."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise invalid(name, value, "a text")
    return str(value)


def regex(name: str, value: Any) -> str:
    """A regular expression, also a compiled one without flags."""
    if isinstance(value, re.Pattern) and value.flags in (0, re.UNICODE):
        value = value.pattern
    if not isinstance(value, str) or not value:
        raise invalid(name, value, "a regular expression", "give a text")
    matcher(value, f"--{name.replace('_', '-')}")
    return str(value)


def path(name: str, value: Any) -> StrPath:
    """A path, or what else a source can be called."""
    if not isinstance(value, str | os.PathLike) or not _is_name(os.fspath(value)):
        raise invalid(name, value, "a path", "give a text or a Path")
    return value


def parse_size(name: str, value: Any) -> int:
    """Bytes of a size such as 5GB; KB, MB and GB are powers of 1000. A number is bytes."""
    size = _integer(value)
    if size is None and isinstance(value, str):
        upper = value.strip().upper()
        unit = next((u for u in UNITS if upper.endswith(u)), "")
        factor = finite(upper.removesuffix(unit))
        scaled = math.nan if factor is None else factor * UNITS.get(unit, 1)
        size = int(scaled) if math.isfinite(scaled) else None
    if size is None or size <= 0:
        raise invalid(name, value, "bytes, or a number with KB, MB, GB or TB", "e.g. 5GB")
    return size


def bytes_text(count: int) -> str:
    """A number of bytes as people read it, such as 178 MB."""
    unit = max((u for u in UNITS if count >= UNITS[u]), key=lambda u: UNITS[u], default="")
    if not unit:
        return f"{count} bytes"
    value = count / UNITS[unit]
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts, or one."""
    return tuple(text(name, item) for item in _items(name, value))


def paths(name: str, value: Any) -> tuple[StrPath, ...]:
    """Several paths, or one."""
    return tuple(path(name, item) for item in _items(name, value))


def files(name: str, value: Any) -> tuple[StrPath, ...]:
    """One path or more."""
    items = paths(name, value)
    if not items:
        raise invalid(name, value, "one path or more", "give a file")
    return items


def kinds(allowed: Sequence[str]) -> OptionCheck:
    """Several of these words: a list of them, or one text with commas between."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        words = [word for text in texts(name, value) for word in text.replace(" ", "").split(",")]
        one = choice(allowed)
        return tuple(dict.fromkeys(one(name, word) for word in words or [""]))

    return OptionCheck(check, several=True)


def targets(name: str, value: Any) -> str:
    """Which modules: a text, or a list of names as PEFT takes it."""
    if isinstance(value, str | re.Pattern):
        return regex(name, value)
    return ",".join(texts(name, value))


def settings(name: str, value: Any) -> dict[str, Any]:
    """A method's own options by name; numbers, also spelled ones, as numbers."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise invalid(name, value, "a mapping of names to values")
    return {key: item if finite(item) is None else finite(item) for key, item in value.items()}


def function(name: str, value: Any) -> Any:
    """Something to call."""
    if not callable(value):
        raise invalid(name, value, "a function")
    return value


def finite(value: Any) -> float | None:
    """The finite number that a value is, or spells; None for anything else."""
    if isinstance(value, bool | bytes | bytearray) or getattr(value, "shape", ()):
        return None
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        # RuntimeError: torch's, of a tensor of several elements
        return None
    return number if math.isfinite(number) else None


def _integer(value: Any, *, flags: bool = False) -> int | None:
    """The integer that a value is, or spells; None for anything else."""
    if type(value).__name__ in ("bool", "bool_"):  # numpy's too
        return int(value) if flags else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[+-]?\d{1,30}", value.strip(), re.ASCII) else None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = finite(value)
        return int(number) if number is not None and number.is_integer() else None


def _is_name(text: str | bytes) -> bool:
    return isinstance(text, str) and bool(text) and "\0" not in text


# -- several values --------------------------------------------------------------------------------


def _items(name: str, value: Any) -> list[Any]:
    """The items of a list in its order; a text or a path is a list of one, None an empty one."""
    if value is None:
        return []
    if isinstance(value, str | os.PathLike):
        return [value]
    if (
        isinstance(value, bytes | bytearray | AbstractSet)
        or hasattr(value, "shape")
        or not isinstance(value, Iterable)
    ):
        raise invalid(name, value, "a list, in the order that counts", "give a list")
    return list(value)


def weighted(adapters: Any, name: str = "adapters") -> list[tuple[StrPath, float | None]]:
    """Sources and their weights, None where there is none, of one source or several, of pairs
    `(source, weight)`, or of a mapping of sources to weights. `Refused` with all that are none of
    these."""
    items = list(adapters.items()) if isinstance(adapters, Mapping) else _items(name, adapters)
    if (
        len(items) == 2
        and isinstance(adapters, tuple)
        and finite(items[1]) is not None
        and not isinstance(items[1], str)
    ):
        items = [adapters]  # one pair
    pairs, errors = [], []
    for item in items:
        source, weight = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if not isinstance(source, str | os.PathLike) or not _is_name(os.fspath(source)):
            errors.append(
                invalid(
                    name,
                    item,
                    "a source, or a source and its weight",
                    "give a text, a Path or a pair",
                )
            )
        elif source is item:
            pairs.append((source, None))
        elif finite(weight) is None:
            errors.append(invalid(name, item, "a number as the weight", "give a finite number"))
        else:
            pairs.append((source, finite(weight)))
    Problems(errors).raise_all()
    return pairs


def unweighted(adapters: Any, name: str = "adapters") -> list[StrPath]:
    """Sources, for verbs without weights; `Refused` for weights other than 1."""
    pairs = weighted(adapters, name)
    Problems(
        [
            invalid(name, pair, "no weights: this verb has none", "remove the weight")
            for pair in pairs
            if pair[1] not in (None, 1)
        ]
    ).raise_all()
    return [source for source, _ in pairs]


def _sources(name: str, value: Any) -> list[StrPath | tuple[StrPath, float]]:
    """Sources with their weights where they have some, as `weighted` takes them again."""
    pairs = weighted(value, name)
    return [source if weight is None else (source, weight) for source, weight in pairs]


def progress(name: str, value: Any) -> Progress:
    """What is called with the bytes done; nothing for None."""
    return no_progress if value is None else function(name, value)


def no_progress(done: int, /) -> None:
    """The progress that nobody looks at."""


def device(name: str, value: Any) -> str:
    """auto, cpu, cuda or one of several GPUs; also torch's device."""
    word = str(value) if type(value).__module__ == "torch" else value
    if not isinstance(word, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", word, re.ASCII):
        raise invalid(name, value, "auto, cpu, cuda or cuda:i", "use one of these")
    return word


TEXT, TEXTS, REGEX, SIZE = (
    OptionCheck(text),
    OptionCheck(texts, several=True),
    OptionCheck(regex),
    OptionCheck(parse_size),
)
FLAG, SETTINGS, TARGETS = (
    OptionCheck(flag, "flag"),
    OptionCheck(settings, "settings"),
    OptionCheck(targets, "targets"),
)
FILE, FILES = OptionCheck(path, "file"), OptionCheck(files, "file", several=True)
SOURCE, SOURCES = OptionCheck(path, "source"), OptionCheck(paths, "source", several=True)
WEIGHTED = OptionCheck(_sources, "sources", several=True)
UNWEIGHTED = OptionCheck(lambda name, value: unweighted(value, name), "sources", several=True)
FUNCTION, PROGRESS, DEVICE = OptionCheck(function), OptionCheck(progress), OptionCheck(device)
DTYPE = OptionCheck(dtype, words=tuple(dtypes.SHORT))
COMPAT = choice(("peft",))
COUNT, SEED, SHARE = whole(), whole(0, MOST_SEED), number("a share, 0 to 1", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = number("a share above 0, at most 1", lambda x: 0 < x <= 1)
ABOVE_0 = number("a number above 0", lambda x: x > 0)
