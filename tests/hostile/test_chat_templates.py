"""Chat templates of strangers that take time or memory without end are refused by name, soon,
and nothing of them is left running."""

import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused
from adapterkit.verbs.stats.data.records import Record
from adapterkit.verbs.stats.data.samples import load_tokenizer, tokenize
from tests.support.texts import MARKED, WORDS, ids, save_tokenizer, write_rows
from tests.support.usual import usual

HI = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SLOW = "{% for a in range(99) %}{% for b in range(9999) %}{% endfor %}{% endfor %}A"
ENDLESS = {
    "a loop": LOOP,
    "a power": "{% set n = messages|length * 5 %}{{ n ** (n ** n) }}",
    "memory": "{% set n = messages|length * 5000000000 %}{{ 'x' * n }}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "a text": "{% for i in range(99999) %}{{ 'who' * 99 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def nothing_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory):
    """transformers, which takes more than a second."""
    load_tokenizer(LocalFolder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def soon(monkeypatch):
    from adapterkit.verbs.stats.data import templates

    for name, value in {"SECONDS": 0.7, "TOTAL": 1.5, "SHARE": 0.0, "MEMORY": 256 << 20}.items():
        monkeypatch.setattr(templates, name, value)


def records(count: int = 1, messages: Any = HI) -> list[Record]:
    return [Record("messages", {"messages": messages}, f"line {i}") for i in range(count)]


def samples_of(folder: Path, template: str, its: list[Record]) -> Any:
    tokenizer = load_tokenizer(LocalFolder(save_tokenizer(folder, template)))
    return tokenize(its, tokenizer, 99, len(WORDS)).samples


def refusal(folder: Path, template: str, its: list[Record]) -> AdapterkitError:
    with pytest.raises(Refused) as caught:
        samples_of(folder, template, its)
    error = caught.value.errors[0] if isinstance(caught.value, MultipleErrors) else caught.value
    assert "the chat template" in error.problem and error.expected and error.hint
    assert error.where == "line 0" and error.code == "AK901"
    return error


# of each limit one: of time, of memory, of the text
@pytest.mark.parametrize("name", usual(ENDLESS, {"a loop", "memory", "a text"}))
def test_a_template_without_end_is_refused_soon(
    name: str, soon, since_start, frugal, tmp_path: Path
):
    with frugal():
        error = refusal(tmp_path, ENDLESS[name], records(50))  # of which one is tried
    assert "takes more than 0.7 s, 256 MiB, or 16 times the text" in error.problem
    assert since_start() < 9


def test_a_template_that_calls_itself_is_refused(tmp_path: Path):
    template = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    assert "recursion" in refusal(tmp_path, template, records()).problem


def test_many_slow_conversations_are_limited_together(
    soon, since_start, monkeypatch, tmp_path: Path
):
    monkeypatch.setattr("adapterkit.verbs.stats.data.templates.SECONDS", 60.0)
    with pytest.raises(Refused, match="or 1.5 s for all"):
        samples_of(tmp_path, SLOW, records(1000))
    assert since_start() < 12


def test_a_command_refuses_a_template_without_end(soon, tmp_path: Path, llama):
    base = tmp_path / "base"
    base.mkdir()
    for file in llama.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    save_tokenizer(base, LOOP)
    data = write_rows(tmp_path / "a.jsonl", {"messages": HI})
    with pytest.raises(Refused, match="the chat template takes more than"):
        adapterkit.stats(base, data=data, out=tmp_path / "s.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a.jsonl"}


def test_the_process_imports_nothing_of_the_folder(tmp_path: Path, monkeypatch):
    for name in ("json", "transformers", "jinja2", "adapterkit"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    (sample,) = samples_of(tmp_path / "base", MARKED, records())
    assert sample.tokens == ids("AwhoBme") and not (tmp_path / "run").exists()


def test_values_that_json_has_not_are_placeholders_as_before(tmp_path: Path):
    """As rows of tables have them; transformers shows none of them to a template."""
    row = [{"role": "user", "content": datetime.date(2020, 1, 1), "end": b"", "none": None}]
    template = "{% for m in messages %}{{ m.content }}{{ m.end }}{{ m.none }}{% endfor %}"
    (sample,) = samples_of(tmp_path, template, records(1, row))
    plain = load_tokenizer(LocalFolder(tmp_path)).apply_chat_template(row, tokenize=True)
    assert sample.tokens == tuple(plain["input_ids"])
