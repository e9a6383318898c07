"""The package's sources as trees. Several suites look through all of them, and parsing them or
walking through them takes a second each time."""

import ast
from functools import cache
from pathlib import Path

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent


@cache
def sources() -> dict[str, ast.Module]:
    """{path in the package: its tree}, which nobody changes."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): parsed(p.read_text("utf-8")) for p in paths}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def walked(tree: ast.AST) -> tuple[ast.AST, ...]:
    """The nodes of a tree that stays, as `ast.walk` gives them."""
    return tuple(ast.walk(tree))
