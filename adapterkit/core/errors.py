"""Errors in four parts: the problem, the expected value, where it is, and a hint with the fix.

Everything adapterkit raises on purpose is an `AdapterkitError`; the command line prints it without
a traceback and exits 1, or 2 if only the options are wrong. Any other exception is a bug and keeps
its traceback. The code that raises an error gives its code; `errors.toml` explains the codes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = 3  # errors of one cause that are printed
WRONG_VALUE, NO_SUCH_PATH = ("AK101", "AK103"), "AK201"
WARNING = "WARNING: "  # prefix of a plan's most important notes
# a shape, or a word with a dot, an underscore or a digit, as names of tensors and files have
_VARIABLE = re.compile(
    r"\([\d, ]*\)|(?<![^\s:;,'\"()])[^\s:;,'\"()\d._]*+[\d._](?:\.*+[^\s:;,'\"().])++|\d+"
)


class AdapterkitError(Exception):
    """A job that cannot be done, or failed, with a message that explains how to fix it."""

    is_of_verb = False  # whether the hint names options of the verb that raised it
    code = ""  # of its kind of problem; "" for an error of another program
    marked_usage: bool | None = None  # by `as_usage`

    def __init__(
        self, problem: str, *, expected: str = "", where: str = "", hint: str = "", code: str = ""
    ):
        self.problem, self.expected, self.where, self.hint = problem, expected, where, hint
        self.code = code or type(self).code
        super().__init__(str(self))

    def __str__(self) -> str:
        return self.text(with_code=False)

    def text(self, *, with_code: bool = True) -> str:
        """Return the four parts as lines, the first with the code at its end."""
        code = self.code if with_code else ""
        return _text(self.where, [self.problem], self.expected, self.hint, code)

    @property
    def is_usage(self) -> bool:
        """Whether the options alone are wrong, whatever the files contain: `as_usage` says so, or
        an option has no such value."""
        if self.marked_usage is not None:
            return self.marked_usage
        return self.code in WRONG_VALUE and self.where.startswith(("--", "options"))

    def row(self) -> dict[str, str]:
        """Return the error as an entry of a JSON document."""
        four = {"problem": self.problem, "expected": self.expected, "where": self.where}
        return four | advice(self.hint) | {"code": self.code}


class Refused(AdapterkitError):
    """A request turned down before anything is written."""


class Damaged(AdapterkitError):
    """A file whose bytes are not what its format, its index or its receipt says."""


class Failed(AdapterkitError):
    """A job that started and could not finish: storage errors, changed inputs, lost workers."""


class Unrecoverable(Failed):
    """A failure that --resume cannot continue: an input changed, or a value does not fit."""


class Waiting(Failed):
    """A worker whose last files need one that no worker has made yet."""

    code = "AK610"


class Interrupted(AdapterkitError):
    """A job stopped by a signal; finished files stay for --resume."""

    code = "AK609"


class MultipleErrors(Refused, Damaged):
    """All problems of a request or an output, in `errors`; its text has one entry per cause."""

    def __init__(self, errors: Iterable[AdapterkitError]):
        self.errors = tuple(errors)
        codes = ", ".join(dict.fromkeys(error.code for error in self.errors if error.code))
        super().__init__(f"{len(self.errors)} problems found", code=codes)

    @property
    def is_usage(self) -> bool:
        return any(error.is_usage for error in self.errors)

    def text(self, *, with_code: bool = True) -> str:
        """Return the text of the one cause, or the number of problems and the text of each."""
        causes: dict[tuple[str, ...], list[AdapterkitError]] = {}
        for error in self.errors:
            causes.setdefault(_cause(error), []).append(error)
        entries = [text for errors in causes.values() for text in _entries(errors, with_code)]
        return entries[0] if len(entries) == 1 else "\n- ".join([self.problem, *entries])


def _cause(error: AdapterkitError) -> tuple[str, ...]:
    """Return the parts that errors with one cause share: problem and expected, without names,
    shapes and numbers; no problem if the code has words for several."""
    problem = "" if _many(error.code) else _VARIABLE.sub("*", error.problem)
    expected = _VARIABLE.sub("*", error.expected)
    return (type(error).__name__, problem, expected, error.where, error.hint, error.code)


def _many(code: str) -> str:
    """Return the first line of several errors of a code, with {n}; "" for codes without."""
    return codes().get(code, {}).get("many", "")


def _entries(errors: list[AdapterkitError], with_code: bool) -> list[str]:
    """Errors of one cause as one text, if the code has words for several or there are many; else
    each as its own."""
    many = _many(errors[0].code)
    if len(errors) == 1 or (len(errors) <= EXAMPLES and not many):
        return [error.text(with_code=with_code) for error in errors]
    return [_summary(errors, many or "{n} problems of this kind", with_code)]


def _summary(errors: list[AdapterkitError], many: str, with_code: bool) -> str:
    """How many errors have one cause, the first of them, and how many more there are."""
    some = errors[:EXAMPLES]
    lines, expected = [error.problem for error in some], some[0].expected
    if len({error.expected for error in some}) > 1:  # each expects something else
        lines = [f"{error.problem}; expected: {error.expected}" for error in some]
        expected = ""
    if len(errors) > EXAMPLES:
        lines.append(f"... and {len(errors) - EXAMPLES} more")
    code = some[0].code if with_code else ""
    lines = [many.replace("{n}", str(len(errors))), *lines]
    return _text(some[0].where, lines, expected, some[0].hint, code)


# in a hint, each is a line of its own; other lines would be a name's that nobody has escaped
_COMMANDS = re.compile(r"\n(?=(?:adapterkit|hf|python|accelerate|export) )")


def _text(where: str, problems: list[str], expected: str, hint: str, code: str) -> str:
    """Return an error as it is printed; names of folders and files may come unescaped."""
    first = f"{where}: {problems[0]}" if where else problems[0]
    parts = [f"{first} [{code}]" if code else first, *problems[1:]]
    if expected:
        parts.append(f"expected: {expected}")
    if hint:
        parts += _COMMANDS.split(f"hint: {hint}")
    return "\n  ".join(map(printable, parts))


def advice(hint: str) -> dict[str, str]:
    """Return a hint for a JSON document: its sentence, and the command that does it, if there is
    one."""
    sentence, *commands = _COMMANDS.split(hint)
    return {"hint": sentence, "command": "\n".join(commands)}


def advised(row: Mapping[str, str]) -> str:
    """Return the `advice` in a row as lines, with the command on a line of its own."""
    return "\n  ".join(filter(None, (f"hint: {row['hint']}", row["command"])))


@cache
def _table() -> dict[str, Any]:
    import tomllib  # not at the start of each command

    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def codes() -> Mapping[str, Mapping[str, str]]:
    """The title, cause, remedy and example of each code; of some, `many`: the first line of
    several, and `command`: what prints the example."""
    return {code: entry for code, entry in _table().items() if code != "gone"}


@contextmanager
def as_usage(is_usage: bool = True) -> Iterator[None]:
    """Mark the errors of this block as wrong usage: the command line exits with 2 for them."""
    try:
        yield
    except AdapterkitError as error:
        for one in (error, *getattr(error, "errors", ())):
            one.marked_usage = is_usage
        raise


@contextmanager
def unrecoverable(
    what: str, *, expected: str, hint: str, code: str, where: str = ""
) -> Iterator[None]:
    """Raise a kernel's ValueError about the values of `what` as `Unrecoverable`."""
    try:
        yield
    except ValueError as error:
        raise Unrecoverable(
            f"{shown(what)}: {error}", expected=expected, where=where, hint=hint, code=code
        ) from error


class Problems(list[AdapterkitError]):
    """All problems of a request, an input or an output, collected to be raised together. `where`,
    `hint`, `kind` and `code` are the defaults of errors that are added."""

    def __init__(
        self,
        errors: Iterable[AdapterkitError] = (),
        *,
        where: str = "",
        hint: str = "",
        kind: type[AdapterkitError] = Refused,
        code: str = "",
    ):
        super().__init__(errors)
        self.where, self.hint, self.kind, self.code = where, hint, kind, code

    def add(
        self,
        problem: str,
        expected: str = "",
        hint: str = "",
        *,
        where: str = "",
        kind: type[AdapterkitError] | None = None,
        code: str = "",
    ) -> None:
        """Add an error of four parts."""
        where, hint, code = where or self.where, hint or self.hint, code or self.code
        kind = kind or self.kind
        self.append(kind(problem, expected=expected, where=where, hint=hint, code=code))

    def fail(
        self, problem: str, expected: str = "", hint: str = "", *, where: str = "", code: str = ""
    ) -> NoReturn:
        """Add an error, and raise it with all earlier ones."""
        self.add(problem, expected, hint, where=where, code=code)
        self.raise_all()
        raise AssertionError("there is an error to raise")

    def include(self, error: AdapterkitError) -> None:
        """Add an error, or each error of a `MultipleErrors`."""
        self += error.errors if isinstance(error, MultipleErrors) else (error,)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add the errors that are raised in this block."""
        try:
            yield
        except AdapterkitError as error:
            self.include(error)

    def raise_all(self) -> None:
        """Raise the error, or all of them together; do nothing without errors."""
        different = list({str(error): error for error in self}.values())
        if len(different) == 1:
            raise different[0]
        if different:
            raise MultipleErrors(different)


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """Return a hint with the closest known name for each unknown one; "" if none is close."""
    from difflib import get_close_matches

    names = list(names)
    known = [name for name in known if name not in names]
    close = [match for name in names for match in get_close_matches(name, known, n=1)]
    words = " and ".join(repr(shown(name)) for name in dict.fromkeys(close))
    return f"did you mean {words}?" if words else ""


MOST_WORDS = 8  # that an error lists


def alternatives(value: object, words: Sequence[str]) -> str:
    """The words that a value could have been: all if they are few, else the three nearest."""
    from difflib import get_close_matches

    if len(words) <= MOST_WORDS:
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    near = get_close_matches(str(value), words, n=EXAMPLES, cutoff=0) or list(words[:EXAMPLES])
    return f"{', '.join(near)} or one of {len(words) - len(near)} others, which --help lists"


def shown(name: object) -> str:
    """Return a name from a file, printable: control and bidirectional characters escaped, at most
    200 characters."""
    text = printable(str(name)[:201])
    return text if len(text) <= 200 else text[:197] + "..."


def by_reason(pairs: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    """Group names by reason; names without a reason are left out."""
    table: dict[str, list[str]] = {}
    for name, reason in pairs:
        if reason:
            table.setdefault(reason, []).append(name)
    return table


def listed(names: Sequence[object]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


def printable(text: str) -> str:
    """Return a text with its control and bidirectional characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
