"""What the options of the verbs may be: one check for each name, the same in every verb, in Python
and on the command line.

`checked` wraps a verb: values whose meaning is plain become what the verb expects ("4" and 4.0 are
4, "5GB" is 5000000000), all others are refused together, before anything is read. What options mean
together the verbs check themselves.
"""

import contextlib
import functools
import inspect
import math
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ParamSpec, TypeVar

from adapterkit import dtypes
from adapterkit.errors import AdapterkitError, Refused, did_you_mean, refuse_all, shown
from adapterkit.patterns import matcher

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]  # (the option, its value) -> what the verb gets; `Refused`
StrPath = str | os.PathLike
# Adapters, with weights where a verb has them
Sources = (
    StrPath
    | Mapping[StrPath, float]
    | tuple[StrPath, float]
    | Iterable[StrPath | tuple[StrPath, float]]
)


class Executor(ABC):
    """What carries out a verb's plan in place of an engine: a rank's part of it, or its end.

    `options` are the `engines.run_options.RunOptions` of the call. Gives the receipt, or the plan
    where the verb is to stop there, as after a dry run.
    """

    pushes = True  # whether what it makes is pushed at its end

    @abstractmethod
    def __call__(self, plan: Any, options: Any, check: Any, /) -> Any: ...


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Arguments of the writing verbs that name an input, and those that name several
SOURCE = tuple("src base tuned adapter initial base16 quantized stats".split())
WEIGHTED = ("adapters", "general")
MOST_WHOLE, MOST_SEED = 2**31 - 1, 2**63 - 1
CHOICES = {
    "base_copies": ("ignore", "adapter"),
    "compat": ("peft",),
    "dtype": tuple(dtypes.SHORT),
    "engine": ("local", "ray"),
    "expert_layout": ("peft-0.18", "peft-0.19"),
    "hash": ("sha256", "none"),
    "majority": ("total", "frequency"),
    "prefix_only": (
        "unet",
        "transformer",
        "transformer_2",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ),
    "residual": ("write", "implicit"),
    "rest": ("save", "drop", "refuse"),
    "rounding": ("nearest", "stochastic", "compensated"),
    "space": ("delta", "factors"),
    "tied": ("untie", "fold", "refuse"),
    "tokenizer": ("base", "adapter"),
}


def checked(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of verbs that checks their arguments, as `binder` does."""

    def wrap(verb: Callable[P, R]) -> Callable[P, R]:
        bind = binder(verb, own)

        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = bind(*args, **kwargs)
            with own_hints(verb):
                return verb(*bound.args, **bound.kwargs)

        return call

    return wrap


def binder(verb: Callable[P, Any], own: Mapping[str, Check]) -> Callable[P, inspect.BoundArguments]:
    """A function that gives a verb's arguments by name, checked: by `own` where an option differs
    from the others of that name. Defaults are not checked. `Refused` with all that are invalid."""
    signature = inspect.signature(verb)
    checks = {name: own.get(name) or CHECKS[name] for name in signature.parameters}

    def bind(*args: P.args, **kwargs: P.kwargs) -> inspect.BoundArguments:
        bound, errors = signature.bind(*args, **kwargs), []
        for name, value in bound.arguments.items():
            if value is signature.parameters[name].default:
                continue
            try:
                bound.arguments[name] = checks[name](name, value)
            except AdapterkitError as error:
                errors.append(error)
        refuse_all(errors)
        return bound

    return bind


# An option in a hint; those of a command that the hint gives in full are that command's
_COMMANDS = r"`[^`]*`|\b(?:adapterkit|hf|ray|llama-gguf-split|python) .*"
_OPTION = re.compile(rf"{_COMMANDS}|(?<![\w-])--([a-z][a-z0-9-]*)(?: [A-Z]+\b)?")
_OF_COMMANDS = {"help", "json", "plan", "quiet"}  # options of commands that are none of their verbs


@contextlib.contextmanager
def own_hints(verb: Callable) -> Iterator[None]:
    """Errors of a verb hint at options that it has: planning is shared by verbs that differ. Of one
    verb within another, such as a step of `run`, the inner one's options are meant."""
    try:
        yield
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            if not one.is_of_verb:
                one.hint, one.is_of_verb = own_hint(one.hint, verb), True
        raise


def own_hint(hint: str, verb: Callable) -> str:
    """A hint with the verb's arguments as they are written, without alternatives that name options
    of other verbs."""
    parameters = inspect.signature(verb).parameters.values()
    known = {p.name.replace("_", "-") for p in parameters if p.kind is p.KEYWORD_ONLY}
    known |= {"adapter"} if "adapters" in known else set()
    arguments = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    name = lambda m: m[1].upper() if m[1] in arguments else m[0]
    fits = lambda text: all(m[1] in known | _OF_COMMANDS for m in _OPTION.finditer(text) if m[1])
    hint = _OPTION.sub(name, hint)
    parts = [hint] if fits(hint) else re.split(r", or |, then |; (?=give |--)", hint)
    kept = ", or ".join(part for part in parts if fits(part))
    return kept or f"adapterkit {verb.__name__} --help lists its options" if hint else hint


def invalid(name: str, value: Any, expected: str, hint: str = "give another value") -> Refused:
    """The refusal of an option's value."""
    text = shown(value if type(value) in (int, float) else repr(value))
    option = f"--{name.replace('_', '-')}"
    return Refused(f"{option} {text}", expected=expected, where="options", hint=hint)


# -- one value -------------------------------------------------------------------------------------


def choice(allowed: Sequence[str] | Callable[[], Iterable[str]]) -> Check:
    """One of these words."""

    def check(name: str, value: Any) -> str:
        words = tuple(allowed() if callable(allowed) else allowed)
        if not isinstance(value, str) or value not in words:
            hint = did_you_mean([value], words) if isinstance(value, str) else ""
            raise invalid(name, value, " or ".join(words), hint or "use one of these")
        return str(value)

    return check


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


def whole(least: int = 1, most: int = MOST_WHOLE) -> Check:
    """An integer within bounds."""

    def check(name: str, value: Any) -> int:
        number = _integer(value)
        if number is None or not least <= number <= most:
            raise invalid(name, value, f"a whole number, {least} to {most}")
        return number

    return check


def whole_of(*allowed: int) -> Check:
    """One of these integers."""

    def check(name: str, value: Any) -> int:
        number = _integer(value)
        if number not in allowed:
            raise invalid(name, value, " or ".join(map(str, allowed)), "use one of these")
        return number

    return check


def number(expected: str, fits: Callable[[float], bool]) -> Check:
    """A finite number that `fits`; `expected` says which do."""

    def check(name: str, value: Any) -> float:
        result = finite(value)
        if result is None or not fits(result):
            raise invalid(name, value, expected)
        return result

    return check


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


def kinds(allowed: Sequence[str]) -> Check:
    """Several of these words: a list of them, or one text with commas between."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        words = [word for text in texts(name, value) for word in text.replace(" ", "").split(",")]
        one = choice(allowed)
        return tuple(dict.fromkeys(one(name, word) for word in words or [""]))

    return check


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


def check_stats(rounding: str, stats: object) -> list[AdapterkitError]:
    """What is wrong with --rounding and --stats together."""
    if (rounding == "compensated") == (stats is not None):
        return []
    if stats is None:
        problem, expected = "--rounding compensated needs --stats", "--stats FILE"
        hint = "collect them: adapterkit stats BASE --data FILE --out STATS"
    else:
        problem = f"--stats has no effect with --rounding {rounding}"
        expected, hint = "--rounding compensated", "remove --stats"
    return [Refused(problem, expected=expected, where="options", hint=hint)]


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
    refuse_all(errors)
    return pairs


def unweighted(adapters: Any, name: str = "adapters") -> list[StrPath]:
    """Sources, for verbs without weights; `Refused` for weights other than 1."""
    pairs = weighted(adapters, name)
    refuse_all(
        [
            invalid(name, pair, "no weights: this verb has none", "remove the weight")
            for pair in pairs
            if pair[1] not in (None, 1)
        ]
    )
    return [source for source, _ in pairs]


def _unchecked(name: str, value: Any) -> Any:
    """Sources, for `weighted` and `unweighted` in the verb."""
    return value


def _progress(name: str, value: Any) -> Any:
    return (lambda done: None) if value is None else function(name, value)


def _device(name: str, value: Any) -> str:
    word = str(value) if type(value).__module__ == "torch" else value
    if not isinstance(word, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", word, re.ASCII):
        raise invalid(name, value, "auto, cpu, cuda or cuda:i", "use one of these")
    return word


def _engine(name: str, value: Any) -> Any:
    return value if isinstance(value, Executor) else choice(CHOICES["engine"])(name, value)


_share = number("a share above 0, at most 1", lambda value: 0 < value <= 1)
_above_0 = number("a number above 0", lambda value: value > 0)

CHECKS: dict[str, Check] = {
    **{name: choice(words) for name, words in CHOICES.items()},
    **dict.fromkeys(
        (*SOURCE, *"folder path a b out plot file".split()),
        path,
    ),
    **dict.fromkeys(WEIGHTED, _unchecked),
    **dict.fromkeys(
        (
            "rslora double_quant base_is_residual dequantize verify download headers resume "
            "overwrite dry_run whole lossy allow_pickle"
        ).split(),
        flag,
    ),
    **dict.fromkeys("include exclude skip".split(), regex),
    **dict.fromkeys("max_shard_size max_size memory disk_limit".split(), parse_size),
    **dict.fromkeys("bits_for weight_for rank_for alpha_for".split(), texts),
    **dict.fromkeys(
        "rank block_size iterations top_k samples length batch components workers".split(), whole()
    ),
    "accept": function,
    "alpha": _above_0,
    **dict.fromkeys(("architecture", "ray_address"), text),
    "bits": whole_of(4, 8),
    "data": files,
    "density": number("a share, 0 to 1", lambda value: 0 <= value <= 1),
    "device": _device,
    "dtype": dtype,
    "energy": _share,
    "engine": _engine,
    "progress": _progress,
    "layers": text,
    "rank_for_energy": number("a share, 0 to 1", lambda value: 0 <= value <= 1),
    "seed": whole(0, MOST_SEED),
    "settings": settings,
    "sv_ratio": number("a number of at least 1", lambda value: value >= 1),
    "svd_clamp": _share,
    "targets": targets,
    "temperature": _above_0,
    "wait": number("0 or more seconds", lambda value: value >= 0),
    "tolerance": number("0 or more", lambda value: value >= 0),
}
