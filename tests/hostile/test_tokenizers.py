"""Tokenizers of strangers that take time, memory or disk without end, or that no library loads, are
refused by name, soon; the process that runs them gets no secret."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.verbs.stats.data import apart as module
from adapterkit.verbs.stats.data import templates
from adapterkit.verbs.stats.data.apart import tokenize_apart
from adapterkit.verbs.stats.data.records import Record
from adapterkit.verbs.stats.data.samples import Samples, load_tokenizer, tokenize_all
from tests.support.texts import MARKED, WORDS, save_tokenizer

HI = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
OPTIONS = {"length": 99, "vocabulary": len(WORDS), "pad": None, "is_encoder_decoder": False}
TEXT = "a" * 30 + "! who is that"
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.fixture(autouse=True)
def nothing_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return save_tokenizer(tmp_path / "base", MARKED)


def changed(base: Path, file: str, **values: Any) -> None:
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def model(kind: str, **values: Any) -> Callable[[Path], None]:
    return lambda base: changed(base, "tokenizer.json", model={"type": kind} | values)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda base: changed(base, "tokenizer_config.json", **values)


def split(pattern: str) -> Callable[[Path], None]:
    one = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda base: changed(base, "tokenizer.json", pre_tokenizer=one)


def normalizer(**values: Any) -> Callable[[Path], None]:
    return lambda base: changed(base, "tokenizer.json", normalizer=values)


def apart(base: Path, *rows: Record) -> list[Samples]:
    return tokenize_apart(LocalFolder(base), [list(rows)], OPTIONS)


def refusal(base: Path, text: str = TEXT) -> AdapterkitError:
    with pytest.raises(Refused) as caught:
        apart(base, Record("text", {"text": text}, "line 1"))
    error = caught.value
    assert error.expected and error.hint and error.where == str(base) and error.code == "AK901"
    return error


def test_a_text_that_doubles_forty_times_ends_at_the_limit(base: Path, frugal, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", 256 << 20)
    normalizer(type="Sequence", normalizers=[DOUBLED] * 40)(base)
    with frugal():
        assert "takes more than" in refusal(base).problem


def test_a_tokenizer_without_end_is_refused_soon(base: Path, since_start, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    monkeypatch.setattr(module, "RATE", 1e9)
    normalizer(type="Replace", pattern={"Regex": "a*[^a]"}, content="")(base)
    assert "takes more than 0.5 s" in refusal(base, "a" * 200_000).problem
    assert since_start() < 9


def test_files_of_200_megabytes_are_refused_before_they_are_copied(base: Path, frugal):
    with (base / "vocab.txt").open("wb") as file:
        file.truncate(200 << 20)
    with frugal():
        assert "more than 100,000,000 bytes" in refusal(base).problem


PAIR = Record("pair", {"prompt": "who ", "completion": "is that"}, "line 2")
CHAT = Record("messages", {"messages": HI}, "line 3")
BROKEN = {
    "a panic in a text": split("(a+)+$"),
    "a panic at its load": normalizer(type="Precompiled", precompiled_charsmap=""),
    "an empty unigram": model("Unigram", unk_id=None, vocab=[]),
    "words without unk": model("WordLevel", vocab={}, unk_token="x"),
    "pieces without unk": model(
        "WordPiece", vocab={"a": 9}, unk_token="x", continuing_subword_prefix="##",
        max_input_chars_per_word=100,
    ),
    "a length that is a text": config(model_max_length="x"),
    "a tokenizer of pages": config(tokenizer_class="LayoutLMv2Tokenizer"),
    "a template that is a number": config(chat_template=7),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_fails_is_an_error_of_four_parts(name: str, base: Path):
    """As the process answers, here in this one."""
    (base / "chat_template.jinja").unlink()
    config(chat_template=MARKED)(base)
    BROKEN[name](base)
    kind = CHAT if "template" in name else PAIR if "length" in name else None
    record = kind or Record("text", {"text": TEXT}, "line 1")
    rows = [[(record.kind, record.fields, record.where)]]
    request = {"rows": rows, "options": OPTIONS, "folder": str(base), "label": "base"}
    ((problem, *others),), found = module._answer(request)
    assert "the tokenizer" in problem and all(others) and not found


def test_the_process_gets_no_secret_and_gives_the_same_samples(base: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environments: list[dict[str, str]] = []
    popen = templates.subprocess.Popen

    def watched(*words: Any, **options: Any) -> Any:
        environments.append(options["env"])
        return popen(*words, **options)

    monkeypatch.setattr(templates.subprocess, "Popen", watched)
    rows = [Record("text", {"text": TEXT}, "line 1"), PAIR, CHAT]
    found = apart(base, *rows)
    (environment,) = environments
    assert "secret" not in str(environment) and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert found == tokenize_all([rows], load_tokenizer(LocalFolder(base)), OPTIONS)
    assert [sample.where for sample in found[0].samples] == ["line 1", "line 2", "line 3"]
