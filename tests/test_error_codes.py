"""Every error has a code: given where it is made, printed, and never given another meaning."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterkit.cli import main
from adapterkit.core import errors
from adapterkit.core.errors import Damaged, Problems, Refused, codes
from tests.support import mistakes
from tests.support.documents import ROOT
from tests.support.error_sites import Site, sites
from tests.test_docs import script

GOLDEN = Path(__file__).with_name("error_codes.json")  # code -> title, as they were given
GONE = errors._table()["gone"]


def test_a_code_keeps_its_meaning():
    """`python -m tests.test_error_codes` adds new ones; one that goes is listed in `gone`."""
    given = json.loads(GOLDEN.read_text("utf-8"))
    now = {code: entry["title"] for code, entry in codes().items()}
    assert {code: given[code] for code in given if code not in GONE} == now
    assert not set(GONE) & set(now) and set(GONE) <= set(given)
    assert all(re.fullmatch(r"AK[1-9]\d\d", code) for code in given)


# codes without an example that is run: why
NOT_RUN = {
    "AK405": "the text is that of this version of transformers",
    "AK704": "the server of the tests sends what it lists",
}
OPTIONS_ALONE = {"AK101", "AK102", "AK103", "AK104", "AK106"}  # wrong whatever the files are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    mistakes.files(folder)
    return folder


@pytest.mark.parametrize("code", mistakes.provoked())
def test_the_example_is_what_the_mistake_prints(code: str, folder: Path):
    """`python -m tests.support.mistakes` writes the examples."""
    done = mistakes.run(code, folder)
    assert mistakes.printed(done.stderr, folder) == codes()[code]["example"].strip()
    assert done.returncode == (2 if code in OPTIONS_ALONE else 1)


def test_each_code_is_run_or_has_a_reason():
    assert {*mistakes.provoked()} ^ {*NOT_RUN} == {*codes()}


@pytest.mark.parametrize("code", NOT_RUN)
def test_an_example_that_is_not_run_has_the_words_of_the_program(code: str):
    entry = codes()[code]
    first, *rest = entry["example"].splitlines()
    parts = dict(line.strip().split(": ", 1) for line in rest)
    texts = (
        first.removeprefix("Error: ").removesuffix(f" [{code}]"),
        parts.get("expected", ""),
        parts.get("hint", ""),
    )
    assert first == f"Error: {texts[0]} [{code}]" and set(parts) <= {"expected", "hint"}
    assert any(_prints(site, texts) for site in sites() if site.code == code), texts


def _prints(site: Site, texts: tuple[str, str, str]) -> bool:
    """Whether texts are those of this place: what it has as literals, eight letters of it or more;
    a hint may come from elsewhere."""
    problem, expected, hint = (".*".join(map(re.escape, text.split("{}"))) for text in site.texts)
    literal = "".join(site.texts).replace("{}", "").strip()
    return (
        len(literal) >= 8
        and re.search(f"(^|: ){problem}$", texts[0]) is not None
        and re.fullmatch(expected, texts[1]) is not None
        and (not hint or re.fullmatch(hint, texts[2], re.DOTALL) is not None)
    )


def test_the_page_is_current():
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == script("errors").document()


# -- at work -------------------------------------------------------------------------------------


def test_errors_have_the_code_of_their_collection_or_their_class():
    problems = Problems([Refused("one")], where="there", code="AK101")
    problems.add("another")
    problems.add("a third", code="AK102")
    codes = [error.code for error in [*problems, errors.Interrupted("stopped"), Refused("plain")]]
    assert codes == ["", "AK101", "AK102", "AK609", ""]
    with (
        pytest.raises(errors.Unrecoverable) as caught,
        errors.unrecoverable("x", expected="", hint="", code="AK208"),
    ):
        raise ValueError("not finite")
    assert caught.value.code == "AK208"


@pytest.mark.parametrize("code", [code for code, entry in codes().items() if "many" in entry])
def test_several_errors_of_a_code_begin_with_its_own_words(code: str):
    """Also two, and of different words: one entry, with each problem on a line."""
    problems = ["layers.0.up is cut off", "there is no layers.1.down"]
    with pytest.raises(errors.MultipleErrors) as caught:
        Problems(Refused(one, expected="x", where="y", code=code) for one in problems).raise_all()
    first = codes()[code]["many"].replace("{n}", "2")
    assert caught.value.text().splitlines() == [
        f"y: {first} [{code}]",
        *(f"  {one}" for one in problems),
        "  expected: x",
    ]
    assert re.fullmatch(r"2 [a-zA-Z ]+", first)


def test_each_cause_is_printed_with_its_code():
    there = {"expected": "x", "where": "there", "hint": "do"}
    many = [Damaged(f"x.{i} is damaged", **there, code="AK202") for i in range(9)]
    with pytest.raises(errors.MultipleErrors) as caught:
        Problems([*many, Refused("no alpha", **there, code="AK504")]).raise_all()
    lines = caught.value.text().splitlines()
    assert lines[:2] == ["10 problems found", "- there: 9 files or tensors are damaged [AK202]"]
    assert "- there: no alpha [AK504]" in lines and caught.value.code == "AK202, AK504"
    assert "[AK" not in str(caught.value)


def test_commands_print_the_code(tmp_path: Path):
    run = CliRunner().invoke
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    result = run(main, ["inspect", str(tmp_path), "--json"])
    assert [one["code"] for one in json.loads(result.stdout)["problems"]] == ["AK202"] * 2
    assert "[AK202]\n" in run(main, ["inspect", str(tmp_path)]).stdout
    for code, entry in codes().items():
        result = run(main, ["explain", f"[{code.lower()}]"])
        assert result.exit_code == 0 and entry["example"] in result.stdout
    # the runner ends where a command exits
    words = [sys.executable, "-m", "adapterkit", "merge", "base", "style", "--out", "out", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    error, other = json.loads(done.stdout)["errors"]
    assert error["code"] == other["code"] == "AK201"
    assert done.returncode == 1 and f"[{error['code']}]\n" in done.stderr
    assert set(error) == {"problem", "expected", "where", "hint", "command", "code"}
    assert run(main, ["explain"]).stdout.count("\n") == len(codes())


if __name__ == "__main__":
    given = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    given |= {code: entry["title"] for code, entry in codes().items()}
    GOLDEN.write_text(json.dumps(given, indent=1, ensure_ascii=False) + "\n", "utf-8")
