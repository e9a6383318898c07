"""The regular expressions of the package take time in proportion to the text, whatever the text.

Each is attacked with texts made from its own parse tree: what comes before a part of it, then many
copies of what the part takes, then what fits nothing.
"""

import ast
import importlib
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import adapterkit
from adapterkit.adapters.formats import engines, library
from adapterkit.adapters.formats.files.keys import _suffixes
from tests.support.sources import sources, walked

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the parse tree has no public door
    from sre_compile import compile as compiled
    from sre_parse import SubPattern, parse


PACKAGE = Path(adapterkit.__file__).parent
METHODS = ("search", "match", "fullmatch")
# methods that go through a text as `search` does, and on behind each match
SEARCHES = {"search", "sub", "subn", "split", "findall", "finditer"}
CALLS = {*METHODS, *SEARCHES, "compile"}
SIZES = (16, 22, 31, 43, 60, 480, 4096)  # characters of a text
SUSPECT = 0.002  # seconds, of which a linear pattern takes a tenth at the last size
LETTERS = 'a1_.-/: ,;"\\({<@=\n\0é'  # what classes may take, besides what a pattern itself names
ENDS = ("", "\0", "\n!")
MANY = 50  # a repeat of more than that may be one without an end

# patterns that a function makes of others: path:function -> examples, or why there is nothing to
# attack; what it compiles is matched from the start
OF_TRANSFORMERS = "lists of transformers' classes"
MADE: dict[str, str | Callable[[], Iterable[str]]] = {
    "core/adapter/keys.py:canonical_key": lambda: [r"\.(lora_embedding_[AB]|b)\.\w+(\.weight)?$"],
    "core/adapter/peft.py:read_other_type": lambda: [r"^(.*)\.hada_w1_a(?:\.\w+)?(?:\.weight)?$"],
    "adapters/formats/files/keys.py:_suffixes": lambda: (
        pattern.pattern for name in library.formats() for pattern, _ in _suffixes(name)
    ),
    "adapters/formats/files/keys.py:_place": "renames of formats/*.toml",
    "adapters/formats/files/templates.py:words_of": lambda: [r"x/(?P<word>.+)", r"(?P<word>.+)_v1"],
    "adapters/formats/modules/names.py:_patterns": lambda: [
        r"a\.(?P<N>\d+)\.b\.(?P<M>\d+)\.(?P=N)",
        r"a\.(?:\d+)\.b\.(?:x|y)|a\.(?:\d+)\.c\.\d+",
    ],
    "adapters/formats/modules/names.py:_blocks": lambda: [r"blocks\.(\d+)\."],
    "adapters/formats/modules/names.py:in_rules": "renames of formats/architectures/*.toml",
    "adapters/formats/modules/names.py:kernel_of": "kernels of formats/architectures/*.toml",
    "adapters/formats/modules/names.py:_by_width": "shapes of formats/architectures/*.toml",
    "adapters/formats/modules/names.py:_by_rows": "ratios of formats/architectures/*.toml",
    "bases/gguf/mixes.py:types_of": "KINDS",
    "bases/gguf/mixes.py:image_types_of": "IMAGE_KINDS",
    "bases/gguf/tensors.py:_is_ignored": OF_TRANSFORMERS,
    "core/patterns.py:matcher": "plain ones alone",
    "core/patterns.py:__init__": "with a time limit",
    "core/patterns.py:_check": "compiled alone",
    "bases/images/block_weights.py:_block": "blocks of formats/architectures/*.toml",
    "core/merge/tied.py:_check_complete": OF_TRANSFORMERS,
    "bases/quantized/planning/weights.py:_is_upcast": OF_TRANSFORMERS,
    "core/records.py:_compiled": "formats/*.toml",
    "verbs/stats/model/stored_model.py:_keep_wide": OF_TRANSFORMERS,
    "core/weights/loading.py:find_gaps": OF_TRANSFORMERS,
    "core/weights/names.py:mentions_weight": "a module's name, escaped",
    "core/weights/skeleton.py:_expert": "conversions of transformers",
}
TABLES_OF_PATTERNS = {"renames", "kernels", "shapes", "ratios"}  # of TOML files, by their keys


class Found(NamedTuple):
    pattern: str | bytes
    flags: int
    methods: tuple[str, ...]
    where: str


# -- where patterns are ----------------------------------------------------------------------------


def calls(node: ast.AST, function: str = "", name: str = "") -> Iterator[tuple[ast.Call, str, str]]:
    """Calls of re and regex with a pattern; the function that each is in, and the name that its
    result is given."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield from calls(child, child.name)
            continue
        given = child.targets[0].id if _is_assignment(child) else name  # type: ignore[attr-defined]
        if isinstance(child, ast.Call) and _is_of_re(child.func):
            yield child, function, given
        yield from calls(child, function, given)


def _imports_re(tree: ast.Module) -> bool:
    imports = (node for node in walked(tree) if isinstance(node, ast.Import))
    return any(one.name in ("re", "regex") for node in imports for one in node.names)


def _is_assignment(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def _is_of_re(node: ast.AST) -> bool:
    is_of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return is_of_module and node.value.id in ("re", "regex") and node.attr in CALLS


@cache
def methods() -> Mapping[str, set[str]]:
    """The methods that are called on each name, anywhere."""
    found: dict[str, set[str]] = {}
    nodes = (node for tree in sources().values() for node in walked(tree))
    for node in (node for node in nodes if isinstance(node, ast.Attribute) and node.attr in CALLS):
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        found.setdefault(name, set()).add("search" if node.attr in SEARCHES else node.attr)
    return found


def written() -> Iterator[Found]:
    """Patterns in the sources, and those of modules' names that are put together."""
    for path, tree in sources().items():
        for call, function, name in calls(tree) if _imports_re(tree) else ():
            how = call.func.attr  # type: ignore[attr-defined]
            used = {*(methods().get(name) or METHODS)} if how == "compile" else {how}
            used = {"search" if one in SEARCHES else one for one in used}
            used = tuple(sorted(used - {"search"} if how == "compile" and function else used))
            first, where = call.args[0], f"{path}:{function or name}"
            if isinstance(first, ast.Constant):
                flags = _flags([*call.args[1:], *(one.value for one in call.keywords)])
                yield Found(first.value, flags, used, where)
            elif function:
                examples = MADE[where]
                for pattern in () if isinstance(examples, str) else examples():
                    yield Found(pattern, 0, used, where)
            else:
                module = importlib.import_module("adapterkit." + path[:-3].replace("/", "."))
                one = getattr(module, name)
                yield Found(one.pattern, one.flags, used, where)


def _flags(arguments: Iterable[ast.AST]) -> int:
    words = re.findall(r"\bre\.([A-Z]+)", " ".join(map(ast.unparse, arguments)))
    return int(sum(getattr(re, word) for word in words))


def of_files(value: Any, where: str, used: Collection[str] = ("search",)) -> Iterator[Found]:
    """The compiled patterns in a record of a TOML file; keys of its tables of patterns."""
    if isinstance(value, re.Pattern):
        yield Found(value.pattern, value.flags, tuple(used), where)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from of_files(one, where, used)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from of_files(one, where, used)
    for name, one in vars(value).items() if hasattr(value, "__dataclass_fields__") else ():
        place = f"{where}:{name}"
        if name in TABLES_OF_PATTERNS or place.endswith("blocks:names"):
            yield from (Found(key, 0, ("search",), place) for key in one)
        is_of_names = place.endswith("file:carry")  # whole names of files
        yield from of_files(one, place, ("fullmatch",) if is_of_names else used)


def found() -> list[Found]:
    records = (
        library.formats(),
        library.architectures(),
        library.single_file_format(),
        engines.engines(),
    )
    several = [*written(), *(one for value in records for one in of_files(value, "formats"))]
    several += [Found(pattern, 0, ("search",), where) for pattern, where in gguf_kinds().items()]
    return list({(one.pattern, one.flags, one.methods): one for one in several}.values())


def gguf_kinds() -> dict[str, str]:
    from adapterkit.bases.gguf.mixes import IMAGE_KINDS, KINDS

    return dict.fromkeys([*KINDS.values(), *IMAGE_KINDS.values()], "bases/gguf/mixes.py")


# -- texts that attack one -------------------------------------------------------------------------


class Attack:
    """Texts that would make a pattern go back and forth."""

    def __init__(self, pattern: str | bytes, flags: int = 0):
        self.tree, self.flags = parse(pattern, flags), flags
        self.is_bytes = isinstance(pattern, bytes)
        letters = dict.fromkeys([*self._literals(self.tree), *LETTERS])
        self.letters = [one for one in letters if not self.is_bytes or ord(one) < 256]
        self.taken: dict[str, list[str]] = {}

    def texts(self, size: int) -> Iterator[tuple[str, str, str, Any]]:
        """Beginning, what is repeated, end, and the text."""
        parts = dict.fromkeys(self._parts(self.tree, ""))
        for (before, part), end in product(parts, ENDS):
            if part:
                yield before, part, end, self.text(before, part, end, size)

    def text(self, before: str, part: str, end: str, size: int) -> Any:
        text = before + part * (size // len(part)) + end
        return text.encode("latin-1") if self.is_bytes else text

    def _parts(self, nodes: Any, before: str) -> Iterator[tuple[str, str]]:
        for kind, value in nodes:
            inner: list[Any] = []
            match str(kind):
                case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                    inner = [value[2]]
                    if value[1] - value[0] > MANY:
                        for part in [self._sample(value[2]), *self._taken_by(value[2])]:
                            yield from ((before, part), ("", before + part))
                case "SUBPATTERN":
                    inner = [value[3]]
                case "ATOMIC_GROUP":
                    inner = [value]
                case "ASSERT" | "ASSERT_NOT":
                    inner = [value[1]]
                case "BRANCH":
                    inner = value[1]
            for one in inner:
                yield from self._parts(one, before)
            before += self._sample([(kind, value)])
            yield "", before

    def _sample(self, nodes: Any) -> str:
        """A short text that the nodes take."""
        text = ""
        for kind, value in nodes:
            match str(kind):
                case "LITERAL":
                    text += chr(value)
                case "NOT_LITERAL" | "ANY" | "IN":
                    text += next(iter(self._taken_by([(kind, value)])), "")
                case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                    text += self._sample(value[2]) * min(max(value[0], 1), MANY)
                case "SUBPATTERN":
                    text += self._sample(value[3])
                case "ATOMIC_GROUP":
                    text += self._sample(value)
                case "BRANCH":
                    text += self._sample(value[1][0])
        return text

    def _taken_by(self, nodes: Any) -> list[str]:
        """Letters that the body of a repeat takes, each alone; all of them for a body of more."""
        if len(nodes) > 1 or str(nodes[0][0]) not in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self.letters
        if (name := repr(nodes[0])) not in self.taken:
            one = compiled(SubPattern(self.tree.state, list(nodes)), self.flags)
            text = lambda letter: letter.encode("latin-1") if self.is_bytes else letter
            self.taken[name] = [each for each in self.letters if one.fullmatch(text(each))]
        return self.taken[name]

    def _literals(self, nodes: Any) -> Iterator[str]:
        for node in nodes:
            if not isinstance(node, tuple | list | SubPattern):
                continue
            if len(node) == 2 and str(node[0]) in ("LITERAL", "NOT_LITERAL"):
                yield chr(node[1])
            elif len(node) == 2 and str(node[0]) == "RANGE":
                yield chr(node[1][0])
            else:
                yield from self._literals(node)


def seconds(pattern: re.Pattern, method: str, text: Any) -> float:
    """Of the processor: others may have it meanwhile."""
    began = time.thread_time()
    if method == "search":
        for _ in pattern.finditer(text):
            pass
    else:
        getattr(pattern, method)(text)
    return time.thread_time() - began


def slow_texts(one: Found) -> Iterator[str]:
    """The first text that takes long; what doubles with a letter shows itself at a small size."""
    pattern, attack = re.compile(one.pattern, one.flags), Attack(one.pattern, one.flags)
    for size in SIZES:
        for before, part, end, text in attack.texts(size):
            for method in one.methods:
                if seconds(pattern, method, text) < SUSPECT:
                    continue
                shorter = attack.text(before, part, end, size // 4)
                took = min(seconds(pattern, method, text) for _ in range(3))
                if took > max(SUSPECT, 8 * min(seconds(pattern, method, shorter) for _ in "abc")):
                    yield f"{method} of {before!r} + {part!r} * {size} + {end!r}"
                    return


@pytest.mark.parametrize("one", found(), ids=lambda one: f"{one.where} {one.pattern!r}"[:80])
def test_no_text_makes_a_pattern_take_more_than_linear_time(one):
    assert not list(slow_texts(one))


@pytest.mark.parametrize(
    "pattern, method",
    [
        (r"(a+)+b", "match"), (r"x *([\w ]+)$", "match"), (r"\{.*?\}", "search"),
        (r"\S+\.\S+", "search"), (r"(a|aa)*b", "fullmatch"), (r"\w*x\w*-", "search"),
        (r"(?:a.\n)?(?:b.*)+$", "match"), (rb"\d+\d+-", "fullmatch"),
    ],
)  # fmt: skip
def test_patterns_that_go_back_and_forth_are_seen(pattern, method):
    assert list(slow_texts(Found(pattern, 0, (method,), "")))


def test_patterns_that_are_made_of_others_are_known():
    there = {
        f"{path}:{function}"
        for path, tree in sources().items()
        for call, function, _ in calls(tree)
        if function and not isinstance(call.args[0], ast.Constant)
    }
    assert there == MADE.keys()
