"""The pages and docstrings keep the language of docs/writing.md: turns that nobody writes are
counted, and their numbers only fall."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterkit
from tests.support.documents import CODE, DOCUMENTS, ROOT, prose
from tests.support.sources import sources, walked

PACKAGE = Path(adapterkit.__file__).parent
# At most so many in all; lower a limit when you have mended some
IN_DOCUMENTS, IN_DOCSTRINGS = 12, 40
START = r"(?:^|(?<=[.;:] )|(?<=\| ))"  # of a sentence, or of a cell in a table
TURNS = {
    "a clause as subject": START + r"(?:What|Whether|Where|Whose)\b(?![^.|]*\?)",
    "Of ..., first": START + r"Of (?:a|an|the|several|all|these|those|two|files|each|one|what)\b",
    "software that tells": r"\b(?:is|are|was|were|be|being|been) (?:told|said|asked)\b|\btells?\b",
    "are others": r"\b(?:is|are|was|were) (?:others|another)\b",
    "goes on": r"\b(?:goes?|going|went) on\b",
    "but for": r"\bbut for\b",
    "beside": r"\bbeside\b",
    "in the place of": r"\bin (?:the )?place of\b",
    "no more": r"\b(?:no|any) more\b(?! than)",
    "anew": r"\banew\b|\bway out\b",
    "all that": r"\ball (?:that|else)\b",
    "rooms": r"\brooms?\b|\bheld\b(?!-out| out)",
    "lies": r"\b(?:lie|lies|lay)\b",
    "trained whole": r"\btrained (?:whole|in full)\b",
}
GENERATED = ("api.md", "errors.md", "tested.md")  # of docstrings, texts and counts
TABLE_OF_TURNS = "writing.md"


def turns(texts: Iterator[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in texts:
        words = re.sub(r"(?<!\n)\n(?![\n|#-])", " ", CODE.sub("`x`", text))
        for name, pattern in TURNS.items():
            found[name] += len(re.findall(pattern, words, re.MULTILINE))
    return +found


def docstrings() -> Iterator[tuple[ast.AST, str]]:
    for tree in sources().values():
        for node in walked(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and (text := ast.get_docstring(node)):
                yield node, text


def pages() -> list[Path]:
    return [page for page in DOCUMENTS if page.name != TABLE_OF_TURNS]


def test_the_pages_have_few_turns_that_nobody_writes():
    found = turns(prose(page) for page in pages() if page.name not in GENERATED)
    assert found.total() <= IN_DOCUMENTS, found


def test_docstrings_have_few_turns_that_nobody_writes():
    found = turns(text for _, text in docstrings())
    assert found.total() <= IN_DOCSTRINGS, found


def test_modules_say_what_they_do():
    begun = re.compile(r"(What|Where|Whether)\b")
    found = [
        text for node, text in docstrings() if isinstance(node, ast.Module) and begun.match(text)
    ]
    assert not found


@pytest.mark.parametrize(
    "words, least",
    [
        (r"because|since|so that|therefore", 60),
        (r"for example|for instance|such as", 60),
        (r"you|your", 250),
    ],
)
def test_the_pages_argue_and_address_the_reader(words: str, least: int):
    text = "\n".join(prose(page) for page in pages())
    assert len(re.findall(rf"\b(?:{words})\b", text, re.IGNORECASE)) >= least


def test_every_guide_begins_with_a_need_of_the_reader():
    guides = [
        page
        for page in (ROOT / "docs").glob("*.md")
        if re.search(r"^## (Do it|Quick start)$", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(guides) >= 12
    for page in guides:
        lead = page.read_text("utf-8").split("\n## ")[0]
        assert re.search(r"\b[Yy]ou(r|rs)?\b", lead), page.name


def test_guides_show_what_commands_print():
    shown = [page.name for page in DOCUMENTS if "```console" in page.read_text("utf-8")]
    assert len(shown) >= 12, shown
