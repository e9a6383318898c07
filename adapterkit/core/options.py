"""Options of verbs: which values an option takes, and its help, defined once.

Checks read a value from outside. A value with one clear meaning becomes what the verb expects ("4"
and 4.0 are 4, "5GB" is 5000000000); all others are `Refused`. `option` and `argument` declare a
field of a verb's record with its check and its help. The Python signature, the command and its
completion, plan files, pipelines and docs/api.md are derived from these fields."""

import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, dataclass_transform

from adapterkit.core import dtypes
from adapterkit.core.errors import AdapterkitError, Problems, alternatives
from adapterkit.core.patterns import matcher
from adapterkit.core.records import MOST, Check, Json, inside, invalid_value
from adapterkit.core.registry import Tier

T = TypeVar("T")
Kind = TypeVar("Kind", bound="OptionRecord")
StrPath = str | os.PathLike[str]
# Adapters, with weights where a verb has them
Sources = (
    StrPath
    | Mapping[Any, float]  # keys of mappings are invariant: any kind of path
    | tuple[StrPath, float]
    | Iterable[StrPath | tuple[StrPath, float]]
)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_SEED = 2**63 - 1
NUMERAL = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")


class Progress(Protocol):
    """Called with the bytes just done; `expect`, if it has one, with the total."""

    def __call__(self, done: int, /) -> None: ...


@dataclass(frozen=True)
class Option:
    """The declaration of a verb's option. Without `help` it exists in Python only. `flags`: its
    spelling on the command line, if that is not its name; `metavar`: the word for the value in the
    help; `needs`: an option, OPTION=VALUE or `one or other` that it requires; `excludes`: options
    that it conflicts with, if the verb has them; `unless`: for sources, the option that replaces
    them; `contents`: the function that replaces paths of files by their contents; `section`: its
    heading in the help; `tier`: if it differs from the verb's."""

    check: Check
    help: str = ""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    needs: str = ""
    excludes: tuple[str, ...] = ()
    unless: str = ""
    contents: str = ""
    section: str = ""
    tier: Tier | None = None


def option(*, default: Any = dataclasses.MISSING, check: Check, help: str = "", **more: Any) -> Any:
    """Declare a keyword field of a verb's record; required without `default`."""
    return dataclasses.field(default=default, metadata={"option": Option(check, help, **more)})


def argument(
    *, kw_only: Literal[False], default: Any = dataclasses.MISSING, check: Check, **more: Any
) -> Any:
    """Declare a positional field of a verb's record: type checkers need the `kw_only`."""
    metadata = {"option": Option(check, **more)}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, argument))
def record(cls: type[T]) -> type[T]:
    """Make the class a frozen record whose fields are options (decorator)."""
    # every generated method makes the command line start later
    return dataclass(frozen=True, kw_only=True, repr=False, eq=False)(cls)


def option_of(field: dataclasses.Field) -> Option:
    """Return the declaration of a field of a verb's record."""
    return field.metadata["option"]


def flag_of(name: str) -> str:
    """Return an option's spelling in messages and on the command line."""
    return f"--{name.replace('_', '-')}"


class OptionRecord:
    """A record whose fields are options. It is made with values as people give them, and holds the
    values that the checks return. `Refused` lists every invalid value and every conflict."""

    name: ClassVar[str]
    section: ClassVar[str] = ""  # in the help, of the options that name none
    one_needed: ClassVar[tuple[str, ...]] = ()  # options of which exactly one is to be given
    none_given: ClassVar[str] = "the rank is not chosen"  # the problem if none is given
    needs: ClassVar[Mapping[str, str]] = {}  # as of `Option`, of options that several verbs have
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # each is one, by `record`

    def __post_init__(self) -> None:
        errors, fields = Problems(), type(self).__dataclass_fields__
        given = {name: v for name, v in vars(self).items() if v is not fields[name].default}
        for name, value in given.items():
            option: Option = fields[name].metadata["option"]
            with errors.collected():
                made = checked(name, option.check, value, *option.flags[:1])
                object.__setattr__(self, name, made)
        Problems(errors or self._conflicts(given)).raise_all()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"

    def only(self, kind: type[Kind]) -> Kind:
        """Return the options of another record that this one has too."""
        shared = object.__new__(kind)
        for field in dataclasses.fields(kind):
            object.__setattr__(shared, field.name, getattr(self, field.name))  # it is checked
        return shared

    def _is_given(self, text: str) -> bool:
        """Return whether an option is given, or for OPTION=VALUE has that value."""
        name, _, value = text.partition("=")
        default, own = type(self).__dataclass_fields__[name].default, getattr(self, name)
        return str(own) == value if value else own != default

    def _conflicts(self, given: Iterable[str]) -> list[AdapterkitError]:
        """Return refusals of given options that lack an option they need or conflict with another;
        `given` are those whose value is not their default."""
        errors = Problems(where="options", code="AK102")
        chosen = [flag_of(name) for name in filter(self._is_given, self.one_needed)]
        if self.one_needed and len(chosen) != 1:
            *most, last = map(flag_of, self.one_needed)
            errors.add(
                f"{' and '.join(chosen)} exclude each other" if chosen else self.none_given,
                f"one of {', '.join(most)} or {last}",
                "choose one of them",
            )
        fields = type(self).__dataclass_fields__
        for name in given:
            option: Option = fields[name].metadata["option"]
            others, needed = option.excludes, option.needs or self.needs.get(name)
            if not (others or needed) or not self._is_given(name):
                continue
            own, choices = (*option.flags, flag_of(name))[0], needed.split(" or ") if needed else []
            if choices and not any(map(self._is_given, choices)):
                other = " or ".join(map(flag_of, choices)).replace("=", " ")
                problem, expected = f"{own} is given without {other}", f"{own} with {other} alone"
                errors.add(problem, expected, f"remove {own}, or give {other}")
            others = (one for one in others if one.partition("=")[0] in fields)
            for other in map(flag_of, filter(self._is_given, others)):
                other = other.replace("=", " ")
                problem = f"{own} and {other} are given"
                errors.add(problem, "one of them", f"remove {own}, or {other}")
        return errors


def checked(name: str, check: Check, value: object, flag: str = "") -> Any:
    """Return a value as the option's check converts it; `Refused` if it is invalid. `flag`: the
    option on the command line, if that is not its name."""
    errors, flag = Problems(), flag or flag_of(name)
    hint = f"give another value, for example {check.example}" if check.example else ""
    result = inside(check, value, "", errors)
    for error in errors:
        if error.problem.startswith(" = "):
            digits = isinstance(value, str) and check.kind in ("integer", "number")
            as_typed = digits and NUMERAL.fullmatch(str(value))
            found = f" {value}" if as_typed else error.problem[2:]
            error.problem, error.where = flag + found, "options"
        else:
            error.problem = error.problem.removeprefix(": ")
            error.where = error.where or flag
        error.hint = error.hint or hint or "give another value"
    errors.raise_all()
    return result


# -- one value -------------------------------------------------------------------------------------


def choice(allowed: Sequence[str] | Callable[[], Iterable[str]]) -> Check:
    """One of these words."""

    def read(value: object) -> str:
        words = tuple(allowed() if callable(allowed) else allowed)
        if not isinstance(value, str) or value not in words:
            raise invalid_value(value, alternatives(value, words), "use one of these", words)
        return str(value)

    return Check("one of the words", read, words=allowed)


def dtype(value: object) -> str:
    """bf16, fp16 or fp32; also torch's name of it, or torch's dtype."""
    long = {dtypes.CONFIG_NAME[header]: short for short, header in dtypes.SHORT.items()}
    is_word = isinstance(value, str) or type(value).__module__ == "torch"
    word = str(value) if is_word else ""
    short = long.get(word.removeprefix("torch."), word)
    if short not in dtypes.SHORT:
        raise ValueError
    return short


def integer(least: int = 1, most: int = MOST) -> Check:
    """An integer within bounds."""

    def read(value: object) -> int:
        number = _integer(value)
        if number is None or not least <= number <= most:
            raise ValueError
        return number

    example = str(min(max(least, 8), most))
    return Check(f"a whole number, {least} to {most}", read, kind="integer", example=example)


def integer_of(*allowed: int) -> Check:
    """One of these integers."""
    words = tuple(map(str, allowed))
    read = lambda value: allowed[allowed.index(_integer(value))]
    return Check(" or ".join(words), read, words, "use one of these")


EXAMPLES = ("0.2", "1", "2", "10")  # of numbers: the first that fits is in the hint


def number(expected: str, fits: Callable[[float], bool]) -> Check:
    """A finite number that `fits`; `expected` says which do."""

    def read(value: object) -> float:
        result = finite(value)
        if result is None or not fits(result):
            raise ValueError
        return result

    example = next((text for text in EXAMPLES if fits(float(text))), "")
    return Check(expected, read, kind="number", example=example)


def flag(value: object) -> bool:
    """True or false, also as a number."""
    if not _is_flag(value) and (isinstance(value, str) or _integer(value) not in (0, 1)):
        raise ValueError
    return bool(value)


def _is_flag(value: object) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # numpy's too


def text(value: object) -> str:
    """A text of printable characters."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise invalid_value(value, "a text")
    return str(value)


def regex(value: object) -> str:
    """A regular expression, also a compiled one without flags."""
    if isinstance(value, re.Pattern) and value.flags in (0, re.UNICODE):
        value = value.pattern
    if not isinstance(value, str) or not value:
        raise invalid_value(value, "a regular expression", "give a text")
    matcher(value, "")
    return str(value)


def path(value: object) -> StrPath:
    """A path, or another name of a source, such as a Hub id."""
    if not _is_path(value):
        raise invalid_value(value, "a path", "give a text or a Path")
    return value


def _is_path(value: object) -> TypeGuard[StrPath]:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    return isinstance(text, str) and text != "" and "\0" not in text


def parse_size(value: object) -> int:
    """Bytes of a size such as 5GB; KB, MB and GB are powers of 1000. A number is bytes."""
    size = _integer(value)
    if size is None and isinstance(value, str):
        upper = value.strip().upper()
        unit = next((u for u in UNITS if upper.endswith(u)), "")
        factor = finite(upper.removesuffix(unit))
        scaled = math.nan if factor is None else factor * UNITS.get(unit, 1)
        size = int(scaled) if math.isfinite(scaled) else None
    if size is None or size <= 0:
        raise ValueError
    return size


def bytes_text(count: int) -> str:
    """Return a number of bytes for people, such as 178 MB."""
    unit = max((u for u in UNITS if count >= UNITS[u]), key=lambda u: UNITS[u], default="")
    if not unit:
        return f"{count} bytes"
    value = count / UNITS[unit]
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def texts(value: object) -> tuple[str, ...]:
    """Several texts, or one."""
    return tuple(map(text, _items(value)))


def paths(value: object) -> tuple[StrPath, ...]:
    """Several paths, or one."""
    return tuple(map(path, _items(value)))


def files(value: object) -> tuple[StrPath, ...]:
    """One path or more."""
    items = paths(value)
    if not items:
        raise invalid_value(value, "one path or more", "give a file")
    return items


def kinds(allowed: Sequence[str]) -> Check:
    """Several of these words: a list of them, or one text with commas between."""

    def read(value: object) -> tuple[str, ...]:
        words = [word for text in texts(value) for word in text.replace(" ", "").split(",")]
        return tuple(dict.fromkeys(map(choice(allowed).read, words or [""])))

    return Check("some of the words", read, several=True)


def targets(value: object) -> str:
    """Which modules: a text, or a list of names as PEFT takes it."""
    return regex(value) if isinstance(value, str | re.Pattern) else ",".join(texts(value))


def settings(value: object) -> Json:
    """A method's own options by name; numbers, also spelled ones, as numbers."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return {key: item if finite(item) is None else finite(item) for key, item in value.items()}


def function(value: object) -> Any:
    """Something to call."""
    if not callable(value):
        raise invalid_value(value, "a function")
    return value


def finite(value: Any) -> float | None:
    """Return the finite number that a value is, or spells; None for anything else."""
    if isinstance(value, bool | bytes | bytearray) or getattr(value, "shape", ()):
        return None
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        # RuntimeError: torch's, for a tensor of several elements
        return None
    return number if math.isfinite(number) else None


def _integer(value: Any) -> int | None:
    """Return the integer that a value is, or spells; None for anything else."""
    if _is_flag(value):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[+-]?\d{1,30}", value.strip(), re.ASCII) else None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = finite(value)
        return int(number) if number is not None and number.is_integer() else None


# -- several values --------------------------------------------------------------------------------


def _items(value: object) -> list[Any]:
    """Return the items of a list; a text or a path counts as one item, None as none."""
    if value is None:
        return []
    if isinstance(value, str | os.PathLike):
        return [value]
    has_order = not isinstance(value, bytes | bytearray | AbstractSet)
    if not has_order or hasattr(value, "shape") or not isinstance(value, Iterable):
        raise invalid_value(value, "a list, in the order that counts", "give a list")
    return list(value)


def weighted(adapters: object) -> list[tuple[StrPath, float | None]]:
    """Return sources with their weights (None without one), from one source, several, pairs
    `(source, weight)`, or a mapping from sources to weights. `Refused` lists every other value."""
    items = list(adapters.items()) if isinstance(adapters, Mapping) else _items(adapters)
    is_pair = isinstance(adapters, tuple) and len(items) == 2 and not isinstance(items[1], str)
    if is_pair and finite(items[1]) is not None:
        items = [adapters]
    pairs, errors = [], Problems()
    for item in items:
        source, weight = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        number = None if weight is None else finite(weight)
        if not _is_path(source):
            hint = "give a text, a Path or a pair"
            errors.append(invalid_value(item, "a source, or a source and its weight", hint))
        elif source is not item and number is None:
            errors.append(invalid_value(item, "a number as the weight", "give a finite number"))
        pairs.append((source, number))
    errors.raise_all()
    return pairs


def unweighted(adapters: object) -> list[StrPath]:
    """Return the sources of a verb that takes no weights; `Refused` for weights other than 1."""
    pairs = weighted(adapters)
    expected, hint = "no weights: this verb has none", "remove the weight"
    wrong = (pair for pair in pairs if pair[1] not in (None, 1))
    Problems(invalid_value(pair, expected, hint) for pair in wrong).raise_all()
    return [source for source, _ in pairs]


def _sources(value: object) -> list[StrPath | tuple[StrPath, float]]:
    """Return sources, with their weights if given, in a form that `weighted` accepts."""
    pairs = weighted(value)
    return [source if weight is None else (source, weight) for source, weight in pairs]


def progress(value: object) -> Progress:
    """Return the progress callback; one that does nothing for None."""
    return no_progress if value is None else function(value)


def no_progress(done: int, /) -> None:
    """Ignore the progress."""


def expect(progress: Progress, total: int) -> None:
    """Announce the total bytes to a progress callback that supports it."""
    getattr(progress, "expect", no_progress)(total)


def device(value: object) -> str:
    """auto, cpu, cuda or one of several GPUs; also torch's device."""
    word = str(value) if type(value).__module__ == "torch" else value
    if not isinstance(word, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", word, re.ASCII):
        raise ValueError
    return word


ONE_OF = "use one of these"
TEXT, TEXTS = Check("a text", text), Check("texts", texts, several=True)
REGEX = Check("a regular expression", regex)
SIZE = Check("bytes, or a number with KB, MB, GB or TB", parse_size, hint="for example 5GB")
FLAG = Check("True or False", flag, kind="flag")
SETTINGS = Check("a mapping of names to values", settings, kind="settings")
TARGETS = Check("names, or a regular expression", targets, kind="targets")
FILE, FILES = (Check("a path", path, kind="file"), Check("paths", files, kind="file", several=True))
SOURCE = Check("a path", path, kind="source")
SOURCES = Check("paths", paths, kind="source", several=True)
WEIGHTED = Check("sources and weights", _sources, kind="sources", several=True)
UNWEIGHTED = Check("sources", unweighted, kind="sources", several=True)
FUNCTION, PROGRESS = Check("a function", function), Check("a function", progress)
DEVICE = Check("auto, cpu, cuda or cuda:i", device, hint=ONE_OF)
DTYPE = Check(" or ".join(dtypes.SHORT), dtype, tuple(dtypes.SHORT), ONE_OF)
COMPAT = choice(("peft",))
COUNT, SEED = integer(), integer(0, MOST_SEED)
SHARE = number("a share, 0 to 1", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = number("a share above 0, at most 1", lambda x: 0 < x <= 1)
ABOVE_0 = number("a number above 0", lambda x: x > 0)
NUMBER = number("a finite number", lambda x: True)
