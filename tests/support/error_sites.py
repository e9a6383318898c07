"""Every place of the package that makes an error, read from its source."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import adapterkit
from adapterkit import errors

PACKAGE = Path(adapterkit.__file__).parent
CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.AdapterkitError)
} - {"MultipleErrors"}
# what `add` and `fail` are called on
COLLECTION = re.compile(r"(.*\.)?(errors|problems)|Problems\(.*|_damage\(.*", re.DOTALL)


@dataclass(frozen=True)
class Site:
    """One call: where it is, and its texts, with {} for what is put in."""

    place: str
    kind: str
    texts: tuple[str, str, str]  # problem, expected, hint; {} where they are no literal

    @property
    def code(self) -> str:
        error = errors.Refused("")
        error.place = self.place
        return errors._places().get(self.kind) or error.code


@cache
def sites() -> tuple[Site, ...]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text("utf-8"))
        found += _calls(tree, module, ()) if module != "errors" else ()
    return tuple(found)


def _calls(node: ast.AST, module: str, scope: tuple[ast.AST, ...]) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            # a function inside a function counts as that one
            inside = any(isinstance(one, ast.FunctionDef) for one in scope)
            inner = scope if inside else (*scope, child)
        if isinstance(child, ast.Call) and (kind := _kind(child)):
            names = ".".join(getattr(one, "name", "") for one in inner)
            keywords = {one.arg: one.value for one in child.keywords}
            given = dict(zip(("problem", "expected", "hint"), child.args, strict=False))
            parts = given | keywords
            texts = tuple(_template(parts.get(n)) for n in ("problem", "expected", "hint"))
            yield Site(f"{module}:{names}", kind, texts)
        yield from _calls(child, module, inner)


def _kind(call: ast.Call) -> str:
    """The class of the error that a call makes, or ""."""
    if isinstance(call.func, ast.Name):
        return call.func.id if call.func.id in {*CLASSES, "unrecoverable", "kind"} else ""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("add", "fail"):
        return ""
    of_errors = COLLECTION.fullmatch(ast.unparse(call.func.value)) and call.args
    return "Refused" if of_errors else ""


def _template(node: ast.expr | None) -> str:
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        return "".join(parts)
    return "{}"
