"""fit --score: weights by a program's numbers, what it does with a program that fails, and that an
interrupted search goes on to the same bits."""

import json
import re
import shlex
import shutil
import sys

import pytest
from click.testing import CliRunner

import adapterkit
from adapterkit.cli import main
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Failed, Refused
from adapterkit.core.inputs.weights_file import read_weights
from tests.support import oracle

TARGET = (0.8, -0.3)
# near the planted weights the larger the better, by the receipt of the candidate; a line a call
PROGRAM = """
import json, pathlib, sys
folder, calls, limit = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
assert (folder / "adapter_model.safetensors").stat().st_size > 1000
receipt = json.loads((folder / "adapterkit.json").read_text())
weights = [one["weight"] for one in receipt["adapters"]]
done = calls.read_text().count("\\n") if calls.exists() else 0
calls.write_text("\\n" * (done + 1))
if done >= limit:
    print("out of memory", file=sys.stderr)
    sys.exit(3)
print("evaluating 12 samples")
print("score:", -sum((w - t) ** 2 for w, t in zip(weights, TARGET)))
"""


@pytest.fixture
def adapters(adapters):
    return adapters[:2]


@pytest.fixture
def program(tmp_path):
    """The command of the program, which fails from the n-th call on."""
    path = tmp_path / "score.py"
    path.write_text(PROGRAM.replace("TARGET", str(TARGET)))

    def command(limit: int = 10**6, calls: str = "calls") -> str:
        words = [sys.executable, "-S", str(path), "{}", str(tmp_path / calls), str(limit)]
        return " ".join(word if word == "{}" else shlex.quote(word) for word in words)

    return command


def searched(base, adapters, command, out, **options) -> dict:
    return adapterkit.fit(base, adapters, score=command, out=out, **options)


def test_planted_weights_are_found(base, adapters, program, tmp_path):
    out = tmp_path / "w.json"
    document = searched(base, adapters, program(), out, evaluations=60)
    weights = read_weights(LocalFolder(out))
    assert weights.default == pytest.approx(TARGET, abs=0.05) and weights.per == "adapter"
    assert document["best"]["weights"] == list(weights.default)
    assert len(document["evaluations"]) == 60 == (tmp_path / "calls").read_text().count("\n")
    assert document["evaluations"][0]["weights"] == [0.5, 0.5]  # the start
    best = max(one["score"] for one in document["evaluations"])
    assert document["best"]["score"] == best == weights.fit["best"] > -0.01
    adapterkit.combine(adapters, weights=out, out=tmp_path / "both")
    receipt = json.loads((tmp_path / "both" / "adapterkit.json").read_text())
    assert [one["weight"] for one in receipt["adapters"]] == document["best"]["weights"]
    assert not (tmp_path / ".w.json.adapterkit").exists()


def test_a_failing_program_stops_a_search_that_can_be_resumed(base, adapters, program, tmp_path):
    whole = searched(
        base, adapters, program(calls="whole"), tmp_path / "whole.json", evaluations=15
    )
    out = tmp_path / "w.json"
    with pytest.raises(Failed, match=r"exit status 3: out of memory") as caught:
        searched(base, adapters, program(9), out, evaluations=15)
    some = whole["evaluations"][:9]
    best = max(some, key=lambda one: one["score"])
    said = f"the best so far, {best['score']:g} with {best['weights']}, is written by "
    assert f"{said}--resume --evaluations 9" in caught.value.hint and not out.exists()
    (tmp_path / "calls").write_text("")
    with pytest.raises(Refused, match="of another job"):
        searched(base, adapters, program(5), out, evaluations=15, resume=True)
    command = program(9)
    shutil.copytree(tmp_path / ".w.json.adapterkit", tmp_path / "best/.w.json.adapterkit")
    searched(base, adapters, command, tmp_path / "best/w.json", evaluations=9, resume=True)
    assert list(read_weights(LocalFolder(tmp_path / "best/w.json")).default) == best["weights"]
    path = tmp_path / "score.py"
    path.write_text(path.read_text().replace("sys.exit(3)", "pass"))  # corrected
    document = searched(base, adapters, command, out, evaluations=15, resume=True)
    assert document["evaluations"] == whole["evaluations"]
    assert (tmp_path / "calls").read_text().count("\n") == 6  # those that were not kept
    hidden = re.compile(r'"score_sha256": "[0-9a-f]{64}"')
    files = (tmp_path / "whole.json").read_text(), out.read_text()
    assert [hidden.sub("", text) for text in files].count(hidden.sub("", files[0])) == 2
    assert all(hidden.search(text) and str(tmp_path) not in text for text in files)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("print('it is fine, nan')", "no number in its output: it is fine, nan"),
        ("pass", "no number in its output: nothing"),
        ("raise SystemExit(2)", "exit status 2"),
    ],
)
def test_a_program_without_a_number_is_refused(text, problem, base, adapters, tmp_path):
    path, out = tmp_path / "score.py", tmp_path / "w.json"
    path.write_text(text)
    command = f"{shlex.quote(sys.executable)} -S {shlex.quote(str(path))} {{}}"
    with pytest.raises(Failed) as caught:
        searched(base, adapters, command, out)
    assert f"weights 0.5, 0.5: {problem}" in str(caught.value) and not out.exists()
    with pytest.raises(Failed, match="No such file"):
        searched(base, adapters, "./no-such-program {}", tmp_path / "other.json")


def test_invalid_scores_and_options_are_refused(base, adapters, program, tmp_path):
    out = tmp_path / "w.json"
    for options, text in (
        ({"score": "evaluate"}, "a command with {}"),
        ({"score": "evaluate '{}"}, "a command with {}"),
        ({"score": program(), "data": [tmp_path / "x.jsonl"]}, "exclude each other"),
        ({}, "nothing says which weights are good"),
        ({"score": program(), "granularity": "layer"}, "--score and --granularity are given"),
        ({"data": [tmp_path / "x.jsonl"], "evaluations": 9}, "--evaluations is given without"),
    ):
        with pytest.raises(Refused, match=text):
            adapterkit.fit(base, adapters, out=out, **options)
    for some in (adapters[:1], adapters * 5):
        with pytest.raises(Refused, match=f"{len(some)} adapters\n  expected: 2 to 8"):
            searched(base, some, program(), out)
    dora = tmp_path / "dora"
    oracle.train(oracle.llama(), dora, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(Refused, match="DoRA"):
        searched(base, [adapters[0], dora], program(), out)
    assert not (tmp_path / "calls").exists() and not out.exists()


def test_the_fit_command_with_a_score_writes_weights(base, adapters, program, tmp_path):
    out = tmp_path / "w.json"
    words = ["fit", str(base), *map(str, adapters), "--score", program(), "--evaluations", "3"]
    result = CliRunner().invoke(main, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "0.5, 0.5" in result.stdout and "the best of 3 evaluations" in result.stdout
    dry = CliRunner().invoke(main, [*words, "--out", str(out), "--overwrite", "--dry-run"])
    assert dry.exit_code == 0 and "evaluations" in dry.stdout
