"""Read the file of a pipeline: steps, each a verb with sources, output and options, all checked
without opening any source."""

import functools
import itertools
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.core import records
from adapterkit.core.calls import OF_THE_USER
from adapterkit.core.checkpoint import hub_ids as ids
from adapterkit.core.checkpoint.folder import read_small, refuse_shares
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.options import finite, option_of
from adapterkit.core.records import Json
from adapterkit.core.verb import WritingVerb, fields_of
from adapterkit.many.workflows.verbs import VERB

HINT = "see docs/workflows.md"
MAX_FILE = 1_000_000  # bytes
STEPS = records.also(records.list_of(records.TABLE), "[[step]] tables", len)
OUT = records.test("a path, or hf://org/name", lambda value: isinstance(value, str) and value)
# A step says where its output goes; `push` counts if the user allows it (see `Run.allow_push`).
RESERVED = ("out", *(name for name in OF_THE_USER if name != "push"))


@dataclass(frozen=True)
class Location:
    """A folder or a file, on this machine or on the Hub."""

    path: str  # absolute; in a repository the folder, "" for all of it
    repository: str = ""  # org/name[@revision]; "" on this machine

    @property
    def text(self) -> str:
        """The text by which verbs take it as a source."""
        if not self.repository:
            return self.path
        return f"{self.repository}:{self.path}" if self.path else self.repository

    @property
    def out(self) -> str:
        """The text by which verbs take it as an output."""
        return f"hf://{self.text}" if self.repository else self.path

    def within(self, other: "Location") -> bool:
        """True if it equals the other location, or is inside it."""
        if self.repository != other.repository:
            return False
        return not other.path or f"{self.path}/".startswith(f"{other.path}/")


@dataclass(frozen=True)
class StepSource:
    """A source of a verb; `weight`: the text after it, as in PATH=0.7."""

    place: Location
    weight: float | None = None


@dataclass(frozen=True)
class WorkflowStep:
    """One step: a call of a verb. `StepSource` replaces each source among its arguments."""

    number: int  # from 1
    name: str  # the verb's
    verb: type[WritingVerb]
    inputs: tuple[str, ...]  # as they are written
    out: str
    place: Location  # of the output
    arguments: Mapping[str, Any]
    needs: Mapping[StepSource, int]  # the step whose output a source is

    @property
    def push(self) -> str | None:
        """The repository that also gets the output."""
        return self.arguments.get("push")

    @property
    def sent_to(self) -> list[str]:
        """The repositories that get the output."""
        return [one for one in (self.place.repository, self.push) if one]

    def with_sources(self, value: Callable[[StepSource], Any]) -> Json:
        """The arguments with each source replaced by the value of a function."""

        def put(argument: object) -> Any:
            if isinstance(argument, list):
                return [put(item) for item in argument]
            return value(argument) if isinstance(argument, StepSource) else argument

        return {name: put(argument) for name, argument in self.arguments.items()}


@dataclass(frozen=True)
class WorkflowDocument:
    """The file."""

    step: tuple[Json, ...] = field(metadata={"check": STEPS})


@dataclass(frozen=True)
class StepTable:
    """A [[step]] as written."""

    verb: type[WritingVerb] = field(metadata={"check": VERB})
    inputs: tuple[str, ...] = field(metadata={"check": records.one_or_several(records.NAME)})
    out: str = field(metadata={"check": OUT})
    options: Json = field(default_factory=dict, metadata={"check": records.TABLE})


def read_pipeline(file: Path) -> list[WorkflowStep]:
    """The steps of a pipeline; `Refused` with every problem in any of them."""
    entries, folder = _entries(file), file.absolute().parent
    errors = Problems()
    texts = [entry.get("out") for entry in entries]
    outs = {
        number: _output(text, folder)
        for number, text in enumerate(texts, 1)
        if isinstance(text, str) and text
    }
    steps = []
    for number, entry in enumerate(entries, 1):
        with errors.collected():
            steps.append(_step(file.name, number, entry, outs, folder))
    errors += _overlaps(outs)
    errors.raise_all()
    return steps


def _entries(file: Path) -> list[Json]:
    """The tables of the file; `Refused` unless it is a pipeline's."""
    where = file.name
    try:
        document = tomllib.loads(read_small(file, MAX_FILE).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of TOML, of UTF-8, of its numbers
        reason = error.strerror if isinstance(error, OSError) else f"not TOML: {error}"
        raise Refused(
            shown(reason),
            expected="[[step]] tables",
            where=where,
            hint="check the path and the file",
            code="AK111",
        ) from error
    refuse_shares(document, where)
    hint = "add a [[step]] with verb, inputs and out"
    return list(records.read(WorkflowDocument, document, where, hint=hint).step)


def _step(
    file: str, number: int, entry: Json, outs: Mapping[int, Location], folder: Path
) -> WorkflowStep:
    name = entry.get("verb")
    where = f"{file}: step {number}" + (f" ({shown(name)})" if isinstance(name, str) else "")
    step = records.read(StepTable, entry, where, hint=HINT)
    fields = {field.name: field for field in fields_of(step.verb)}
    errors = Problems(_misnamed_options(fields, step.options, where))
    source = functools.partial(_source, folder=folder, outs=tuple(outs.values()))
    arguments = _sources(fields, step, source, where, errors)
    for name, value in step.options.items():
        kind = option_of(fields[name]).check.kind if name in fields else ""
        is_source = kind in ("source", "sources", "file")
        arguments[name] = _located(kind, value, source) if is_source else value
    needs: dict[StepSource, int] = {}
    for one in _all_sources(arguments):
        errors += _needed(one, number, outs, where, needs)
    errors.raise_all()
    return WorkflowStep(
        number, step.verb.name, step.verb, step.inputs, step.out, outs[number], arguments, needs
    )


def _misnamed_options(
    fields: Mapping[str, Field], options: Json, where: str
) -> list[AdapterkitError]:
    """The problems with the names of a step's options."""
    own = {n: field for n, field in fields.items() if field.kw_only and n not in RESERVED}
    needed = [name for name, field in own.items() if field.default is MISSING]
    checks = {name: option_of(field).check for name, field in own.items()}
    errors = records.placed(records.misnamed(options, checks, needed), where, hint=HINT)
    for error in errors:
        if error.problem == "push is unknown":
            error.hint = "give out = 'hf://org/name', or push a later merge"
    return errors


def _sources(
    fields: Mapping[str, Field],
    step: StepTable,
    source: Callable[[str, str], StepSource],
    where: str,
    errors: Problems,
) -> Json:
    """The verb's sources by name, in its order; the last name may take all remaining ones."""
    checks = {name: option_of(field).check for name, field in fields.items() if not field.kw_only}
    *single, last = checks
    several, inputs = checks[last].several, step.inputs
    needed = [name for name in checks if option_of(fields[name]).unless not in step.options]
    if len(inputs) < len(needed) or (len(inputs) > len(checks) and not several):
        expected = " ".join(checks).upper().replace("ADAPTERS", "ADAPTER...")
        errors.add(f"{len(inputs)} inputs", expected, "check inputs", where=where, code="AK111")
        return {}
    arguments: dict[str, Any] = {
        name: source(checks[name].kind, text) for name, text in zip(single, inputs, strict=False)
    }
    rest = [source(checks[last].kind, text) for text in inputs[len(single) :]]
    return arguments | {last: rest if several else rest[0]}


def _located(kind: str, value: object, source: Callable[[str, str], StepSource]) -> Any:
    """The option's value with texts of sources replaced; other values are left to their check."""
    if isinstance(value, list):
        return [_located(kind, item, source) for item in value]
    return source(kind, value) if isinstance(value, str) and value else value


def _source(kind: str, text: str, *, folder: Path, outs: Sequence[Location]) -> StepSource:
    if kind != "sources":
        return StepSource(_place(text, folder, outs))
    whole = _place(text, folder, outs)
    path, _, number = text.rpartition("=")
    weight = finite(number)
    known = os.path.exists(whole.text) or any(whole.within(out) for out in outs)
    if known or not path or weight is None:
        return StepSource(whole, 1.0)
    return StepSource(_place(path, folder, outs), weight)


def _output(text: str, folder: Path) -> Location:
    """hf://org/name, or else a path in the file's folder."""
    return (_on_hub(text.removeprefix("hf://")) if ids.is_on_hub(text) else None) or _here(
        text, folder
    )


def _place(text: str, folder: Path, outs: Sequence[Location]) -> Location:
    """The location of a source: a path in the file's folder that exists or that a step writes, a
    Hub id, or else a path."""
    here = _here(text, folder)
    if os.path.exists(here.path) or any(here.within(out) for out in outs):
        return here
    return _on_hub(text.removeprefix("hf://")) or here


def _here(text: str, folder: Path) -> Location:
    return Location(os.path.normpath(folder / text))


def _on_hub(text: str) -> Location | None:
    hub_id = ids.parse(text)
    if hub_id is None:
        return None
    revision = f"@{hub_id.revision}" if hub_id.revision else ""
    return Location(hub_id.subfolder, hub_id.repo + revision)


def _all_sources(arguments: Mapping[str, Any]) -> Iterator[StepSource]:
    for argument in arguments.values():
        for item in argument if isinstance(argument, list) else [argument]:
            if isinstance(item, StepSource):
                yield item


def _needed(
    source: StepSource,
    number: int,
    outs: Mapping[int, Location],
    where: str,
    needs: dict[StepSource, int],
) -> Iterator[AdapterkitError]:
    """Record which step a source comes from; errors unless that is an earlier one."""
    for other, out in outs.items():
        inside, around = source.place.within(out), out.within(source.place)
        if inside and other < number:
            needs[source] = other
        elif inside or around:
            which = "this step" if other == number else f"step {other}"
            how = "is" if inside else "holds"
            yield Refused(
                f"{shown(source.place.text)} {how} the output of {which}",
                expected="inputs that no step writes, or an earlier one",
                where=where,
                hint="put the steps in order, or choose another out",
                code="AK111",
            )


def _overlaps(outs: Mapping[int, Location]) -> list[AdapterkitError]:
    errors = Problems(hint="choose another out", code="AK111")
    for (first, one), (second, two) in itertools.combinations(outs.items(), 2):
        if one.within(two) or two.within(one):
            problem = f"the outputs of steps {first} and {second} are the same or nested"
            errors.add(problem, "outputs apart", where=f"step {second}")
    return errors
