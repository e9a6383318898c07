"""diff as a command: statuses, streams, JSON; memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapterkit import diff
from adapterkit.core.errors import Damaged, MultipleErrors, Refused
from adapterkit.verbs.look import tables
from adapterkit.verbs.look.tables import outcomes
from tests.support import oracle
from tests.support.differences import ROOT, called, normal, only, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_merge_changes_what_the_adapter_targets_by_its_rank(cached_folder, tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 640}
    base = cached_folder(
        "wide", lambda folder: oracle.save_base(oracle.llama(**sizes), folder, "bf16")
    )
    oracle.train(
        oracle.load(lambda: oracle.llama(**sizes), base),
        tmp_path / "lora",
        r=3,
        target_modules=["q_proj", "down_proj"],
    )
    oracle.merge(base, tmp_path / "lora", out=tmp_path / "out", max_shard_size="500KB")
    document = diff(base, tmp_path / "out")
    ends = ("mlp.down_proj.weight", "self_attn.q_proj.weight")
    assert {row["name"] for row in document["changed"]} == {
        f"model.layers.{i}.{end}" for i in (0, 1) for end in ends
    }
    assert all(1 <= row["rank"]["needed"] <= 3 for row in document["changed"])
    assert document["totals"]["identical"] == document["totals"]["compared"] - 4
    assert document["totals"]["added"] == document["totals"]["removed"] == 0


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of memory is read from Linux's /proc",
)
def test_memory_does_not_grow_with_a_tensor(tmp_path, pair):
    """One tensor of 300 MB against its copy with a rank-one change, and against its rounded one."""
    diff(*pair({"w": normal(600, 600)}, {"w": normal(600, 600, seed=1)}))
    torch.manual_seed(0)
    w = torch.randn(19_200, 4_096)
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    save_file({"w": w}, files[0])
    save_file({"w": w.bfloat16()}, files[2])
    w += torch.linspace(1, 2, 19_200)[:, None]
    save_file({"w": w}, files[1])
    del w
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    assert (
        only(diff(files[0], files[1]))["rank"]["needed"] == 1 and diff(files[0], files[2])["same"]
    )
    assert peak() - before < 60


def test_exit_statuses_and_streams(llama, lora, pair, tmp_path):
    a = normal(8, 8)
    files = pair({"w": a}, {"w": a + 1})
    done = called(files[0], files[0])
    assert (done.exit_code, done.stdout) == (0, "") and done.stderr.startswith(
        "same: 1 compared, 1 identical"
    )
    done = called(*files)
    assert done.exit_code == 1 and done.stdout.count("\n") == 2
    relative = 8 / float(a.double().norm())
    assert (
        done.stderr
        == f"different: 1 compared, 1 changed; ‖A−B‖/‖A‖ {relative:.3g} over what differs\n"
    )
    done = called(*files, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")
    assert (
        called(*files, "--tolerance", "9").exit_code == 0
        and run(*files, "--tolerance", "x").returncode == 2
    )
    for words in ((llama, lora), (files[0], tmp_path / "nowhere"), (*files, "--tolerance", "-1")):
        done = run(*words, "--quiet")
        assert (
            (done.returncode, done.stdout) == (2, "")
            and "Error: " in done.stderr
            and "Traceback" not in done.stderr
        ), words
    refused = subprocess.run(
        [sys.executable, "-m", "adapterkit", "verify", str(llama)], capture_output=True, cwd=ROOT
    )
    assert refused.returncode == 1  # the other commands keep theirs


def test_a_bug_is_trouble_with_its_traceback_and_no_difference(pair, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("adapterkit.verbs.look.difference.compare_sources", broken)
    done = called(*pair({"w": normal(3)}, {"w": normal(3)}))
    assert (
        (done.exit_code, done.stdout) == (2, "")
        and "Traceback" in done.stderr
        and "ZeroDivisionError: a bug" in done.stderr
    )


def test_json_is_the_verbs_document(pair):
    files = pair(
        {"w": normal(8, 8), "n": torch.full((2,), math.nan)},
        {"w": normal(8, 8, seed=1), "n": torch.ones(2)},
    )
    result = called(*files, "--json", "--rank-for-energy", "0.5")

    def refuse(word):
        raise AssertionError(word)  # NaN and Infinity are no JSON

    assert result.exit_code == 1 and json.loads(result.stdout, parse_constant=refuse) == diff(
        *files, rank_for_energy=0.5
    )
    assert json.loads(result.stdout)["diff"] == 1


def test_an_adapter_and_a_model_are_refused_and_their_files_are_not(llama, lora, tmp_path):
    with pytest.raises(Refused, match="lora is an adapter, llama is not"):
        diff(llama, lora)
    document = diff(llama / "model.safetensors", lora / "adapter_model.safetensors")
    assert (
        document["kind"] == "checkpoints"
        and document["totals"]["compared"] == 0
        and document["notes"]
    )
    assert diff(llama, llama / "model.safetensors")["same"]


def test_problems_of_both_sides_are_listed(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"no header")
    with pytest.raises(MultipleErrors) as caught:
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(caught.value.errors) == 2 and all(
        isinstance(e, Damaged) for e in caught.value.errors
    )


def test_help_and_import_load_no_torch():
    code = (
        "import sys, click.testing, adapterkit\nfrom adapterkit.cli import main\n"
        "assert click.testing.CliRunner().invoke(main, ['diff', '--help']).exit_code == 0\n"
        "assert 'diff' in dir(adapterkit) and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_many_alike_lines_are_one_with_a_count():
    """Tables and lists of what is in every layer; the JSON has all."""
    side = {"dtype": "F32", "shape": [2, 2]}
    figures = {"max_abs": 1.0, "cosine": 0.5, "differing": 0.5, "norm": 1.0, "rank": None}
    rows = [
        {"name": f"layers.{n}.{leaf}", "kind": "tensor", "why": "values", "a": side, "b": side}
        | figures
        | {"relative_error": n / 30}
        for n in range(30)
        for leaf in ("q.weight", "k.weight")
    ]
    lone = [{"name": row["name"], "kind": "tensor", **side} for row in rows]
    document = {"changed": rows, "added": lone, "removed": lone[:3], "config": []}
    lines = tables.diff_table(document)
    assert len(lines) == 1 + 2 + 3 + 2
    assert lines[1].startswith("layers.29.q.weight (worst of 30 layers)")
    assert lines[-1].startswith("+ layers.*.k.weight") and lines[-1].endswith("(30)")
    assert len(tables.diff_table(document | {"changed": rows[:20], "added": []})) == 1 + 20 + 3


def test_compensated_rounding_reports_the_error_of_the_outputs():
    metric = {"survived": 0.07, "output_error": 0.01, "unweighted_output_error": 0.03}
    (line,) = outcomes({"parameters": {"a.weight": metric, "b.weight": metric}})
    assert "outputs: median 0.0100 over 2 weights, 0.0300" in line and "kept" not in line
