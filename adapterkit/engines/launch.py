"""Run a plan on the engine of a given name, into a folder that is apart from its inputs."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.stage import check_name
from adapterkit.errors import Refused, shown
from adapterkit.execute import run
from adapterkit.options import parse_size
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt


def carry_out(
    plan: Plan,
    out: str | os.PathLike,
    *,
    engine: str,
    device: str,
    memory: str | int | None,
    dry_run: bool,
    **how: Any,
) -> Receipt | Plan:
    """Run a plan on the engine of that name, into an output apart from its inputs; with `dry_run` give it back."""
    check_output_apart(Path(out), plan.folders)
    plan = replace(plan, memory=parse_size("memory", memory) if memory else None)
    if dry_run:
        return plan
    if engine != "local":
        raise Refused(
            f"engine {engine!r}", expected="local", where="--engine", hint="leave --engine out"
        )
    from adapterkit.engines.local import local

    return run(plan, Path(out), local(device), **how)


def check_output_apart(out: Path, folders: Iterable[Folder]) -> None:
    """`Refused` when the output is an input, inside one, around one, or a link to one, or cannot be a folder."""
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
        found = (
            "a file of that name"
            if there == final
            else f"{shown(there.name)} is a file, and no folder to make one in"
        )
        raise Refused(
            found, expected="a folder to make", where=str(out), hint="choose another --out"
        )
    for folder in folders:
        if not isinstance(folder, LocalFolder):
            continue
        root = (folder.root / folder.single if folder.single else folder.root).resolve()
        if final == root or root in final.parents or final in root.parents:
            raise Refused(
                f"the output {final.name} is, holds, or lies inside the input {folder.name}",
                expected="an output apart from the inputs",
                where="--out",
                hint="choose another --out",
            )
