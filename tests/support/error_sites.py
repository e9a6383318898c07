"""Every place of the package that makes an error, read from its source."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from adapterkit.core import errors
from tests.support.sources import sources

CLASSES = {
    name: value.code
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.AdapterkitError)
}
del CLASSES["MultipleErrors"]
# what `add` and `fail` are called on
COLLECTION = re.compile(r"(.*\.)?(errors|problems)|Problems\(.*|_damage\(.*", re.DOTALL)
CODE = re.compile(r"AK\d{3}")


@dataclass(frozen=True)
class Site:
    """One call: where it is, its code, and its texts, with {} for what is put in."""

    place: str
    kind: str
    code: str  # "" where the call has none; CODE of an error that is passed on is not known here
    texts: tuple[str, str, str]  # problem, expected, hint; {} where they are no literal


@cache
def sites() -> tuple[Site, ...]:
    found = []
    for name, tree in sources().items():
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if module != "core.errors":
            found += _calls(tree, module, ())
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
            yield Site(f"{module}:{names}", kind, _code(child, inner), texts)
        yield from _calls(child, module, inner)


def _kind(call: ast.Call) -> str:
    """The class of the error that a call makes, or ""."""
    if isinstance(call.func, ast.Name):
        is_error = call.func.id != "kind" or any(one.arg == "expected" for one in call.keywords)
        known = {*CLASSES, "unrecoverable", "kind"}
        return call.func.id if is_error and call.func.id in known else ""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("add", "fail"):
        return ""
    of_errors = COLLECTION.fullmatch(ast.unparse(call.func.value)) and call.args
    return "Refused" if of_errors else ""


def _code(call: ast.Call, scope: tuple[ast.AST, ...]) -> str:
    """The code that a call gives, or that of the `Problems` of this function or class to which it
    adds."""
    if code := _own_code(call) or CLASSES.get(ast.unparse(call.func), ""):
        return code
    if not isinstance(call.func, ast.Attribute):
        return ""
    errors = call.func.value
    if isinstance(errors, ast.Call):
        return _own_code(errors)
    name = ast.unparse(errors)
    home = scope[0] if name.startswith("self.") else scope[-1]
    made = (_own_code(value) for own, value in _assigned(home) if own == name)
    return next(filter(None, made), "")


def _own_code(call: ast.Call) -> str:
    keyword = next((one.value for one in call.keywords if one.arg == "code"), None)
    found = CODE.search(ast.unparse(keyword)) if keyword is not None else None
    return found[0] if found else ""


@cache
def _assigned(function: ast.AST) -> tuple[tuple[str, ast.Call], ...]:
    """The calls whose results a function gives names, by these."""
    pairs: list[tuple[ast.expr, ast.expr | None]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=True)
                else:
                    pairs.append((target, node.value))
        elif isinstance(node, ast.AnnAssign):
            pairs.append((node.target, node.value))
    return tuple((ast.unparse(t), value) for t, value in pairs if isinstance(value, ast.Call))


def _template(node: ast.expr | None) -> str:
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        return "".join(parts)
    return "{}"
