"""Config files of adapters: JSON and YAML read strictly, fields checked, templates filled."""

import json
import random

import pytest

from adapterkit.adapters.formats import library, tables
from adapterkit.adapters.formats.files.configs import (
    WORDS,
    config_bytes,
    fields,
    filled,
    read_config,
    unknown_words,
)
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Damaged, Refused

pytestmark = pytest.mark.quick

CONFIG = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 8, "scale": 20.0, "keys": ["self_attn.q_proj"]},
    "lora_query": True,
    "nothing": None,
}


@pytest.fixture
def read(tmp_path):
    def read(name, data):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_config(LocalFolder(tmp_path), name)

    return read


@pytest.mark.parametrize("name", ["config.json", "hyperparameters.yaml", "config.yml"])
def test_written_configs_are_read_back(name, read):
    assert read(name, config_bytes(name, CONFIG)) == CONFIG


@pytest.mark.parametrize("text, words", [
    ("a: 1\na: 2", "a key twice"),
    ("a: &x [1]\nb: *x", "an alias"),
    ("a: !!python/object/apply:os.mkdir [ran]", "a tag"),
    ("a: !!int ''", "a tag"),
    ("- 1", "a YAML list"),
    ("", "a YAML NoneType"),
    ("a: [", "not YAML"),
    ("a: 2024-13-45", "not YAML"),
    ("[" * 3000, "nested too deeply"),
    (b"a: \xff", "not YAML"),
    ("a: " + "1 " * 60_000, "more than 100000"),
])  # fmt: skip
def test_yaml_that_is_refused(text, words, read):
    with pytest.raises(Damaged, match=words):
        read("config.yaml", text)


def test_damaged_yaml_is_refused(read):
    rng, good = random.Random(0), config_bytes("a.yaml", CONFIG)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b"*&!:-[]{}'\"?|><%@`,# \n\t0aZ\xff")
        try:
            assert isinstance(read("a.yaml", bytes(data)), dict)
        except AdapterkitError as error:
            assert "hint:" in str(error)


def test_fields_by_word():
    paths = {
        "rank": ["r", "lora_parameters.rank"],
        "scale": ["lora_parameters.scale"],
        "alpha": ["lora_parameters.alpha"],
        "base": ["nothing"],
        "modules": ["lora_parameters.keys"],
        "q": ["lora_query"],
    }
    assert fields(CONFIG, paths, "x") == {
        "rank": 8, "scale": 20.0, "modules": ["self_attn.q_proj"], "q": True,
    }  # fmt: skip
    assert fields(CONFIG, {"rank": ["fine_tune_type.rank"]}, "x") == {}


@pytest.mark.parametrize("word, value", [
    ("rank", 0), ("rank", True), ("rank", 8.0), ("rank", "8"),
    ("alpha", "16"), ("alpha", float("nan")), ("scale", False), ("scale", float("inf")),
    ("rank_pattern", {"a": 0}), ("alpha_pattern", {"a": "1"}), ("alpha_pattern", [1]),
    ("modules", "a"), ("suffixes", [1]), ("layers", 1.5), ("base", 1), ("dora", 1), ("kind", []),
])  # fmt: skip
def test_values_that_a_word_cannot_have(word, value):
    with pytest.raises(Refused, match=r"x: field(\.a|\[0\])? = "):
        fields({"field": value}, {word: ["field"]}, "x")


def test_all_offenders_at_once():
    with pytest.raises(Refused, match="2 problems"):
        fields({"a": 0, "b": "x"}, {"rank": ["a"], "alpha": ["b"]}, "x")


def test_templates_are_filled_with_rank_and_scale():
    template = {
        "a": {"r": "{rank}", "s": "{scale}", "none": "{base}"},
        "b": ["{rank}", "x"],
        "c": 1,
    }
    assert filled(template, {"rank": 8, "scale": 0.5}) == {
        "a": {"r": 8, "s": 0.5}, "b": [8, "x"], "c": 1,
    }  # fmt: skip
    assert unknown_words(template) == []
    assert unknown_words({"a": ["{rang}"], "b": "{os.environ}"}) == ["{rang}", "{os.environ}"]


def test_every_word_has_a_value_that_it_takes():
    good = {
        "rank": 4, "alpha": 4, "scale": 0.5, "rank_pattern": {"a": 4}, "alpha_pattern": {"a": 0.5},
        "modules": ["a"], "suffixes": [], "layers": -1, "base": "a", "rslora": True,
        "dora": False, "kind": "lora", "q": True, "k": False, "v": True,
    }  # fmt: skip
    assert good.keys() == WORDS.keys()
    assert fields(good, {word: [word] for word in WORDS}, "x") == good
    assert json.loads(config_bytes("a.json", good)) == good


@pytest.mark.parametrize(("file", "text", "problem", "expected"), [
    ("acme.toml", 'steps = { a = ["transpoze"] }', "there are no steps transpoze",
     "transpose, shared, column"),
    ("acme.toml", 'stepps = 1', "stepps is unknown", "steps"),
    ("acme.toml", 'detect = { keys = ["("] }', "unterminated", "a regular expression"),
    ("acme.toml", 'title = ', "Invalid value", "schema.py"),
    ("architectures/acme.toml", """[[components.unet.rules]]
model = "a"
original = "b"
steps = { original = ["swap_halfs"] }""", "there are no steps swap_halfs", "swap_halves"),
    ("architectures/acme.toml", 'words = 1', "words = 1", "a table"),
], ids=range(6))  # fmt: skip
def test_an_invalid_format_file_is_refused_with_the_known_words(
    file, text, problem, expected, tmp_path, monkeypatch
):
    """With the four parts of an error, where a step is misspelt too."""
    (tmp_path / "architectures").mkdir()
    head = 'title = "Acme"\nsources = []\n'
    head += "" if "/" in file else 'summary = "acme"\n'
    (tmp_path / file).write_text(head + text, "utf-8")
    monkeypatch.setattr(tables, "folder", lambda: tmp_path)
    monkeypatch.setattr(library, "described", library.described.__wrapped__)
    known = library.architectures if "/" in file else library.formats
    with pytest.raises(Damaged, match=problem) as caught:
        known.__wrapped__()
    assert expected in caught.value.expected
    assert "acme.toml" in caught.value.where and caught.value.hint
