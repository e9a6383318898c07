"""The command: a table, the document, or nothing; and the document's fields."""

import json
import re

import pytest

import adapterkit
from tests.support import oracle
from tests.support.forks import command
from tests.support.scoring import in_jsonl, random_rows
from tests.support.texts import save_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATE = {"value": float, "low": float, "high": float}
DOCUMENT = {
    "score": int,
    "data": {"files": dict, "sha256": str, "samples": int, "tokens": int, "length": int},
    "against": str,
    "rows": list,
    "notes": list,
}
ROW = {
    "model": str,
    "adapters": list,
    "loss": ESTIMATE,
    "perplexity": float,
    "more": ESTIMATE | {"within_noise": bool},
    "kl": ESTIMATE,
    "same_top1": float,
}


@pytest.fixture
def files(tmp_path):
    """A model, one with noise, an adapter, and data."""
    oracle.save_base(oracle.llama(initializer_range=0.2), tmp_path / "base", "fp32")
    oracle.save_base(oracle.llama(initializer_range=0.21), tmp_path / "other", "bf16")
    oracle.train(oracle.load(oracle.llama, tmp_path / "base"), tmp_path / "adapter",
                 target_modules=["q_proj"])  # fmt: skip
    for name in ("base", "other"):
        save_tokenizer(tmp_path / name)
    write_rows(tmp_path / "data.jsonl", *in_jsonl(random_rows(6, vocabulary=40)))
    return tmp_path


def assert_fits(value, shape):
    if isinstance(shape, dict):
        assert list(value) == list(shape)
        for key, one in shape.items():
            assert_fits(value[key], one)
    else:
        assert isinstance(value, shape), value


def test_the_document_has_these_fields(files):
    given = ["score", "base", "other", "--adapter", "adapter=0.5", "--against", "base"]
    out = ["--out", "scores.json"]
    ended = command(*given, "--data", "data.jsonl", *out, "--json", cwd=files)
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document == json.loads((files / "scores.json").read_text())
    assert_fits(document, DOCUMENT)
    first, *rows = document["rows"]
    assert_fits(first, {key: value for key, value in ROW.items() if key != "more"})
    for row in rows:
        assert_fits(row, ROW)
    losses = [row["loss"]["value"] for row in document["rows"]]
    assert losses == sorted(losses) and len(losses) == 4
    assert {row["model"]: row["adapters"] for row in document["rows"]} == {
        "base": [], "base + adapter": ["adapter"], "other": [], "other + adapter": ["adapter"],
    }  # fmt: skip
    # the reference has the adapter too
    (same,) = (row for row in document["rows"] if row["model"] == "base + adapter")
    assert same["kl"]["value"] == 0 and same["same_top1"] == 1
    assert document["score"] == 1 and document["data"]["samples"] == 6
    assert document["data"]["length"] == 64


def test_without_a_reference_or_adapters_the_document_says_so(files):
    document = adapterkit.score(files / "base", data=files / "data.jsonl", samples=3, length=9)
    assert document["against"] is None and document["rows"][0]["adapters"] == []
    shape = {key: value for key, value in ROW.items() if key not in ("more", "kl", "same_top1")}
    assert_fits(document["rows"][0], shape)
    assert (document["data"]["samples"], document["data"]["length"]) == (3, 9)
    assert document["data"]["files"] == {"0 data.jsonl": {"samples": 6, "unit": "line"}}


def test_the_table_has_a_row_for_each_model_the_best_first(files):
    given = ["score", "base", "other", "--data", "data.jsonl", "--against", "base"]
    ended = command(*given, cwd=files)
    assert (ended.returncode, ended.stderr) == (0, "")
    head, *lines = ended.stdout.splitlines()
    assert re.findall(r"\S+(?: \S+)*", head) == [
        "loss", "95 %", "perplexity", "KL per token", "same top 1", "more than the best",
    ]  # fmt: skip
    document = json.loads(command(*given, "--json", cwd=files).stdout)
    for line, row in zip(lines, document["rows"], strict=False):
        cells = re.split(r"  +", line.strip())
        assert cells[:2] == [row["model"], f"{row['loss']['value']:.4f}"]
        width = (row["loss"]["high"] - row["loss"]["low"]) / 2
        assert cells[2] == f"± {width:.4f}"
        if "more" in row:
            assert cells[-1].startswith(f"{row['more']['value']:+.4f}")
            assert cells[-1].endswith(", within noise") == row["more"]["within_noise"]
    tokens = document["data"]["tokens"]
    assert f"{tokens:,} tokens of 6 samples, nats per token; KL from base" in lines
    assert "note: 6 samples, fewer than --samples 256: all are used" in lines


def test_quiet_prints_nothing_and_writes_the_file(files):
    ended = command("score", "base", "--data", "data.jsonl", "--out", "s.json", "-q", cwd=files)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert json.loads((files / "s.json").read_text())["score"] == 1


def test_a_refusal_is_printed_with_a_status(files):
    ended = command("score", "adapter", "--data", "data.jsonl", cwd=files)
    assert ended.returncode == 1 and not ended.stdout
    assert "[AK" in ended.stderr and "Traceback" not in ended.stderr
    ended = command("score", "--data", "data.jsonl", cwd=files)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
