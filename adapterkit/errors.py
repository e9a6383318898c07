"""Errors in four parts: what was found, what was expected, where, and what to do.

Everything adapterkit raises on purpose is an `AdapterkitError`; the command line prints it without a traceback and exits 1.
Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable


class AdapterkitError(Exception):
    """A job that cannot be done, or went wrong, said so that its reader can mend it."""

    def __init__(self, found: str, *, expected: str = "", where: str = "", do: str = ""):
        self.found, self.expected, self.where, self.do = found, expected, where, do
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.do:
            parts.append(f"what to do: {self.do}")
        return "\n  ".join(map(_printable, parts))  # names of folders and files go in as they are


class Refused(AdapterkitError):
    """A request turned down before anything is written."""


class Damaged(AdapterkitError):
    """A file whose bytes are not what its format, its index or its receipt says."""


class Failed(AdapterkitError):
    """A job that started and could not finish: storage errors, changed inputs, lost workers."""


class Spoiled(Failed):
    """A failure that no resume can mend: an input changed, or a value does not fit; what was made of it is thrown away."""


class Interrupted(AdapterkitError):
    """A job stopped by a signal; what is finished is kept for --resume."""


class Offenders(Refused, Damaged):
    """Several problems found in one look at a request, or at an output, all of them listed."""

    def __init__(self, errors: Iterable[AdapterkitError]):
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} problems found")

    def __str__(self) -> str:
        return super().__str__() + "".join(f"\n- {error}" for error in self.errors)


def refuse_all(errors: list[AdapterkitError]) -> None:
    """Raise what was found: nothing, the one error itself, or all of them together."""
    different = list({str(error): error for error in errors}.values())
    if len(different) == 1:
        raise different[0]
    if different:
        raise Offenders(different)


def shown(name: object) -> str:
    """A name from a file, printable: control and bidirectional characters escaped, at most 200 characters."""
    text = _printable(str(name)[:201])
    return text if len(text) <= 200 else text[:197] + "..."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
