"""How a verb is carried out: the engine by its name, the output folder, resume, dry run."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from adapterkit.checkpoint.folder import Folder, LocalFolder, original
from adapterkit.checkpoint.stage import Stage, check_name
from adapterkit.engines.call import Call
from adapterkit.engines.run_options import RunOptions
from adapterkit.errors import Refused, shown
from adapterkit.execute import Engine, check_place, output_names, run
from adapterkit.hub.destination import parse_output
from adapterkit.hub.ids import is_on_hub
from adapterkit.hub.push import check_push, repository, send
from adapterkit.options import Check, StrPath, binder, own_hints, parse_size, path
from adapterkit.plan import Plan
from adapterkit.planning.converted import conversion_notes
from adapterkit.receipt import Receipt, fingerprint_of

P = ParamSpec("P")
Planned = TypeVar("Planned", covariant=True)  # a `Plan`, or what a verb has in its place


class WritingVerb(Protocol[P, Planned]):
    """A verb that writes: a `Receipt`, or with `dry_run=True` the plan. A type checker compares
    the other options with the verb's only in calls without `dry_run`."""

    @overload
    def __call__(self, *args: Any, dry_run: Literal[True], **options: Any) -> Planned: ...
    @overload
    def __call__(self, *args: Any, dry_run: Literal[False], **options: Any) -> Receipt: ...
    @overload
    def __call__(self, *args: Any, dry_run: bool, **options: Any) -> Receipt | Planned: ...
    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> Receipt: ...

    def call(self, *args: Any, **options: Any) -> Call:
        """The call with these arguments, as data; `Refused` with all that are invalid."""
        ...


def writes(
    **own: Check,
) -> Callable[[Callable[P, Receipt | Planned]], WritingVerb[P, Planned]]:
    """A verb that writes, its options checked as in `options.checked`; `out` is a folder unless it
    says otherwise."""

    def wrap(verb: Callable[P, Receipt | Planned]) -> WritingVerb[P, Planned]:
        bind = binder(verb, {"out": output_folder, "push": repository, **own})

        @functools.wraps(verb)
        def written(*args: P.args, **options: P.kwargs) -> Receipt | Planned:
            bound = bind(*args, **options)
            with own_hints(verb), _pinned_inputs(bound.arguments):
                return verb(*bound.args, **bound.kwargs)

        as_data = lambda *args, **options: Call(written, bind(*args, **options).arguments)
        written.call = as_data  # type: ignore[attr-defined] # of a function, as the protocol says
        return cast(WritingVerb[P, Planned], written)

    return wrap


def output_folder(name: str, value: Any) -> StrPath:
    """A folder on this machine or on the Hub."""
    return _output(name, value, file=False)


def output_file(name: str, value: Any) -> StrPath:
    """A file on this machine, or a .safetensors file on the Hub."""
    return _output(name, value, file=True)


def _output(name: str, value: Any, *, file: bool) -> StrPath:
    out = path(name, value)
    if is_on_hub(out):
        parse_output(os.fspath(out), file=file)
    return out


def _pinned_inputs(arguments: Mapping[str, Any]) -> AbstractContextManager[object]:
    """Inputs of a job that ends on the Hub stay at the commits of its first run."""
    if not is_on_hub(arguments["out"]):
        return nullcontext()
    from adapterkit.engines.hub_output import pinned_inputs

    return pinned_inputs(arguments["out"], resume=bool(arguments.get("resume")))


class Execution(RunOptions):
    """Where and how a verb's plan runs."""

    def run(
        self,
        plan: Plan,
        check: Callable[[Path], object] | None = None,
        push: str | None = None,
    ) -> Receipt | Plan:
        """Run a plan, or with `dry_run` return it. `check` looks at the finished folder before it
        gets its name; `push` is the repository to which it goes then. Raises `Refused` before
        anything is written, `Failed` after."""
        on_hub = is_on_hub(self.out)
        if not on_hub:
            check_output_apart(Path(self.out), plan.folders)
        check_disk_limit(self.out, self.disk_limit)
        if self.ray_address is not None and self.engine != "ray":
            raise Refused(
                "--ray-address with another engine",
                expected="--engine ray",
                where="options",
                hint="remove --ray-address",
            )
        memory = parse_size("memory", self.memory) if self.memory else None
        notes = (*plan.notes, *conversion_notes(plan.folders))
        plan = replace(plan, memory=memory, notes=notes)
        if push is not None and (isinstance(self.engine, str) or self.engine.pushes):
            names, job = output_names(plan), fingerprint_of(plan.recipe())
            check_push(push, names, plan.folders, overwrite=self.overwrite, job=job)
        if not isinstance(self.engine, str) and not self.dry_run:
            receipt = self.engine(plan, self, check)
            if push is not None and isinstance(receipt, Receipt):
                receipt.data["pushed"] = send(Path(receipt.out), push, overwrite=self.overwrite)
            return receipt
        if self.engine == "ray" and not (self.dry_run or on_hub):
            from adapterkit.engines.ray import on_ray

            with on_ray(self.ray_address, self.device) as cluster:
                return self._run(cluster.placed(plan), cluster, check, push)
        from adapterkit.engines.placement import place

        plan, device = place(plan, self.device)
        if on_hub:
            from adapterkit.engines.hub_output import run_to_hub

            return run_to_hub(plan, replace(self, device=device), check)
        if self.dry_run:
            if not self.overwrite:
                check_place(Stage(Path(self.out)), plan, resume=self.resume, overwrite=False)
            return plan
        from adapterkit.engines.local import local

        return self._run(plan, local(device), check, push)

    def _run(
        self,
        plan: Plan,
        engine: Engine,
        check: Callable[[Path], object] | None,
        push: str | None,
    ) -> Receipt | Plan:
        return run(
            plan,
            Path(self.out),
            engine,
            hash=self.hash,
            resume=self.resume,
            overwrite=self.overwrite,
            check=check,
            push=None if push is None else partial(send, repo=push, overwrite=self.overwrite),
            progress=self.progress,
        )


def executes(
    **own: Check,
) -> Callable[[Callable[Concatenate[Execution, P], Receipt | Planned]], WritingVerb[P, Planned]]:
    """A verb as of `writes` that runs a plan: before the arguments of its caller it gets the
    `Execution` that those of them which are run options make up."""

    def wrap(
        verb: Callable[Concatenate[Execution, P], Receipt | Planned],
    ) -> WritingVerb[P, Planned]:
        signature = inspect.signature(verb)
        _, *public = signature.parameters.values()
        signature = signature.replace(parameters=public)

        @functools.wraps(verb)
        def executed(*args: P.args, **options: P.kwargs) -> Receipt | Planned:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            run_options = {field.name: bound.arguments[field.name] for field in fields(Execution)}
            return verb(Execution(**run_options), *args, **options)

        executed.__signature__ = signature  # type: ignore[attr-defined] # of a function
        return writes(**own)(executed)

    return wrap


def check_disk_limit(out: StrPath, limit: str | int | None) -> None:
    """`Refused` for a limit with an output on this machine."""
    if limit is not None and not is_on_hub(out):
        raise Refused(
            "--disk-limit with an output on this machine",
            expected="an output on the Hub: --out hf://org/name",
            where="options",
            hint="remove --disk-limit",
        )


def check_output_apart(out: Path, folders: Iterable[Folder]) -> None:
    """`Refused` when the output is an input, inside one, around one, or a link to one, or cannot be
    a folder."""
    check_name(out)
    final = out.resolve()
    if out.is_symlink():
        raise Refused(
            "the output is a link",
            expected="a new folder",
            where=str(out),
            hint="choose another --out",
        )
    there = next(path for path in (final, *final.parents) if os.path.exists(path))
    if not there.is_dir():
        problem = (
            "a file of this name exists"
            if there == final
            else f"{shown(there.name)} is a file, and no folder to make one in"
        )
        raise Refused(
            problem, expected="a folder to make", where=str(out), hint="choose another --out"
        )
    for folder in map(original, folders):
        if not isinstance(folder, LocalFolder):
            continue
        root = (folder.root / folder.single if folder.single else folder.root).resolve()
        relations = {
            "is": final == root,
            "lies in": root in final.parents,
            "holds": final in root.parents,
        }
        relation = next((name for name, holds in relations.items() if holds), None)
        if relation is not None:
            raise Refused(
                f"the output {shown(str(out))} {relation} the input {folder.label}",
                expected="an output apart from the inputs",
                where="--out",
                hint="choose another --out",
            )
