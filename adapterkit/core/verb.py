"""A verb: a frozen record of its sources and options that plans and runs the job.

    @record
    class Resize(WritingVerb):
        '''The docstring of the Python function.'''

        command = "The help of the command."
        planner = "verbs.combine.planning.resize:plan_resize"
        adapter: StrPath = argument(kw_only=False, check=SOURCE)
        rank: int | None = option(default=None, check=COUNT, help="Rank of each module.")

    resize = function_of(Resize)

Every help reads all records, so what needs torch is named as `MODULE:FUNCTION` and imported when it
is called.
"""

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    overload,
)

from adapterkit.core.calls import own_hints
from adapterkit.core.errors import NO_SUCH_PATH, Refused, as_usage, did_you_mean, listed
from adapterkit.core.options import OptionRecord, option, option_of, record
from adapterkit.core.records import Json
from adapterkit.core.registry import STABLE, Tier, load
from adapterkit.core.shared_options import REPOSITORY, RUNNING, RunOptions

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan
    from adapterkit.core.receipt import Receipt

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V", bound="Verb")


class Verb(OptionRecord, Generic[R]):
    """A verb: `command` is the help of its command, `runner` the function that runs its record."""

    tier: ClassVar[Tier] = STABLE
    command: ClassVar[str]
    runner: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def run(self) -> R:
        """Run the verb and return the result of its Python function."""
        return load(self.runner)(self)


@record
class WritingVerb(RunOptions, Verb["Receipt | Plan"]):
    """A verb that plans, then writes: it returns a `Receipt`, or with `dry_run` the plan. `planner`
    is the function that plans its record."""

    planner: ClassVar[str]

    @property
    def planned_by(self) -> str:
        """The planner for these options."""
        return self.planner

    def check(self, plan: "Plan") -> Callable[[Path], object] | None:
        """Return the check of the plan's finished folder before it gets its name."""
        return None

    def plan(self) -> "Plan":
        """Return the plan; `Refused` lists every problem. Inputs of a job that writes to the Hub
        stay at the commits of its first run."""
        execution = import_module("adapterkit.core.engine.execution")
        with own_hints(self), execution.pinned_inputs(self):
            verb = self._with_contents()
            return execution.as_it_runs(load(verb.planned_by)(verb), verb)

    def _with_contents(self: V) -> V:
        """Return the verb with the contents of files instead of their paths, so that they are read
        once."""
        contents = {
            field.name: load(read)(value)
            for field in dataclasses.fields(self)
            if (read := field.metadata["option"].contents) and (value := getattr(self, field.name))
        }
        return dataclasses.replace(self, **contents) if contents else self

    def recipe_options(self) -> Json:
        """Return the given options that determine the output, for the receipt; sources are its
        inputs."""
        own = (field for field in fields_of(type(self)) if field.name not in RUNNING)
        computing = (f.name for f in own if option_of(f).help and not option_of(f).check.is_source)
        return {name: value for name in computing if (value := getattr(self, name))}

    def run(self) -> "Receipt | Plan":
        with import_module("adapterkit.core.engine.execution").pinned_inputs(self):
            return self.carry_out(self.plan())

    def carry_out(self, plan: "Plan", *, push: bool = True) -> "Receipt | Plan":
        """Run a plan of this verb. With `dry_run` only check whether it could start, and return it.
        Without `push` the caller sends the output. Raises `Refused` before anything is written,
        `Failed` after."""
        execution = import_module("adapterkit.core.engine.execution")
        with own_hints(self):
            sent = getattr(self, "push", None) if push else None
            return execution.execute(plan, self, self.check(plan), sent)


def push_option() -> Any:
    """The repository to which the finished folder is sent too."""
    return option(
        default=None,
        check=REPOSITORY,
        metavar="ORG/NAME",
        help="Upload the output to this repository on the Hub too, in one commit.",
    )


class Function(Protocol[P]):
    """A verb that writes, as a function. A type checker compares the other options with the verb's
    only in calls without `dry_run`."""

    __name__: str

    @overload
    def __call__(self, *args: object, dry_run: Literal[True], **options: object) -> "Plan": ...
    @overload
    def __call__(self, *args: object, dry_run: Literal[False], **options: object) -> "Receipt": ...
    @overload
    def __call__(self, *args: object, dry_run: bool, **options: object) -> "Receipt | Plan": ...
    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> "Receipt": ...


@overload
def function_of(verb: Callable[P, WritingVerb]) -> Function[P]: ...
@overload
def function_of(verb: Callable[P, Verb[R]]) -> Callable[P, R]: ...
def function_of(verb: Any) -> Any:
    """Return a verb as a Python function: sources are positional, options keywords."""

    def function(*args: Any, **options: Any) -> Any:
        with own_hints(verb), as_usage():
            call = called(verb, *args, **options)
        with own_hints(call):
            try:
                return call.run()
            except Refused as error:
                if error.code == NO_SUCH_PATH:  # the first one; there may be more
                    load("core.hints:refuse_missing_sources")(call)
                raise

    function.__name__ = function.__qualname__ = verb.name
    function.__module__, function.__doc__ = verb.__module__, verb.__doc__
    function.__signature__ = signature_of(verb)
    return function


def called(verb: type[V], *args: Any, **options: Any) -> V:
    """Return the record of a call; `TypeError` for an unknown option, with the nearest name, and
    for a missing one."""
    try:
        return verb(*args, **options)
    except TypeError:
        signature = signature_of(verb)
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            unknown = [name for name in options if name not in signature.parameters]
            problem = f"has no option {listed(unknown)}" if unknown else str(error)
            near = did_you_mean(unknown, signature.parameters)
            raise TypeError(f"{verb.name}() " + "; ".join(filter(None, [problem, near]))) from None
        raise


def fields_of(verb: type[Verb]) -> list[dataclasses.Field]:
    """Return the sources and options of a verb in the order of the help: its own, then those of the
    run."""
    fields = dataclasses.fields(verb)
    run_fields = RUNNING - {"out"}
    return sorted(fields, key=lambda f: (f.kw_only, f.name != "out", f.name in run_fields))


def signature_of(verb: type[Verb]) -> inspect.Signature:
    """Return the signature of a verb's function."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    empty = inspect.Parameter.empty
    parameters = [
        inspect.Parameter(
            field.name,
            kinds[field.kw_only is True],
            default=empty if field.default is dataclasses.MISSING else field.default,
            annotation=field.type,
        )
        for field in fields_of(verb)
    ]
    result = inspect.signature(verb.run).return_annotation
    if result is R:
        (result,) = get_args(verb.__orig_bases__[0])  # type: ignore[attr-defined] # is generic
    return inspect.Signature(parameters, return_annotation=result)
