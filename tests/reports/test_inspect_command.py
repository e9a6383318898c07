"""inspect as a command: files, paths, tables, JSON, the picture."""

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import pytest

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Refused
from adapterkit.verbs.look import tables
from adapterkit.verbs.look.heatmaps import heatmaps_of
from tests.support import oracle, raw_files
from tests.support.inspections import DAMAGED, ROOT, edited, inspect, problems_of, refused, run


def test_inspect_of_one_file_counts_its_parameters(lora, llama, tmp_path):
    result = inspect(llama / "model.safetensors")
    assert (result["kind"], result["name"], problems_of(result)) == (
        "file",
        "model.safetensors",
        [],
    )
    assert result["parameters"] == inspect(llama)["parameters"] and result["tied"] is None
    assert problems_of(inspect(lora / "adapter_model.safetensors")) == [
        "factors of a LoRA without adapter_config.json"
    ]
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    assert "not a safetensors file" in problems_of(inspect(tmp_path / "bad.safetensors"))[0]


def test_missing_and_empty_inputs_are_refused(lora, llama, tmp_path):
    assert "no such path" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint nor an adapter" in refused(tmp_path / "empty")
    shutil.copytree(lora, tmp_path / "run" / "checkpoint-5")
    assert "checkpoint-5" in refused(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("x")
    assert "not a .safetensors file" in refused(tmp_path / "notes.txt")
    assert "--base and --plot" in refused(llama, base=llama, plot=tmp_path / "x.html")


def called(*words):
    """The command in this process: (status, stdout)."""
    result = click.testing.CliRunner().invoke(main, ["inspect", *map(str, words)])
    return result.exit_code, result.stdout


def test_the_table_and_the_json_are_the_result(lora, llama, tmp_path):
    assert json.loads(called(lora, "--base", llama, "--json")[1]) == inspect(lora, base=llama)
    status, text = called(lora, "--base", llama, "--modules")
    assert status == 0 and text.endswith("problems: none\n")
    line = next(
        line for line in text.splitlines() if line.startswith("model.layers.1.mlp.up_proj")
    ).split()
    module = next(m for m in inspect(lora, base=llama)["modules"] if m["module"] == line[0])
    message = [
        f"{module[name]:.4g}" for name in ("rank", "scale", "norm", "relative", "effective_rank")
    ]
    assert line[1:] == [*message[:2], "yes", *message[2:]]
    assert "relative" not in called(lora)[1]


@pytest.mark.parametrize("name", ["cut", "html", "empty-file", "missing"])
def test_a_damaged_checkpoint_exits_1(name, sharded, lora, tmp_path):
    """The problem is printed as any other."""
    DAMAGED[name][0](sharded)
    status, text = called(sharded)
    assert status == 1 and "problems: 1\n" in text
    assert json.loads(called(sharded, "--json")[1])["readable"] is False
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    status, text = called(tmp_path / "bad.safetensors")
    assert status == 1 and re.search("parameters +not known\n", text)
    shutil.copytree(lora, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert called(tmp_path / "adapter")[0] == 1
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert called(tmp_path / "adapter")[0] == 1


def test_other_files_of_a_trainer_are_not_a_problem(sharded, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "adapter")
    for folder in (sharded, tmp_path / "adapter"):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(1))
        assert problems_of(inspect(folder)) == []


def test_an_adapter_of_a_pipeline_is_recognized(llama, lora, tmp_path):
    """In a format that PEFT's layout holds with names that no model has: what works is said."""
    golden = Path(__file__).parents[1] / "formats" / "golden"
    path = golden / "kohya" / "sdxl.safetensors"
    words = "sdxl.safetensors is an adapter in the format kohya"
    result = inspect(path)
    assert (result["kind"], result["format"]) == ("adapter", "kohya")
    parts = {module["module"].partition(".")[0] for module in result["modules"]}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    with pytest.raises(Refused, match=words) as caught:
        adapterkit.merge(path, [lora], out=tmp_path / "out")
    assert "adapterkit merge ORIGINAL " in caught.value.hint
    for verb in (
        lambda: adapterkit.merge(llama, [path], out=tmp_path / "out"),
        lambda: adapterkit.combine([lora, path], method="linear", out=tmp_path / "out"),
    ):
        with pytest.raises(Refused, match="components|next to those of") as caught:
            verb()
        assert "--component" in caught.value.hint
    assert called(path)[0] == 0 and not list(tmp_path.iterdir())


def test_problems_are_printed_and_the_status_is_0(lora, tmp_path):
    oracle.edit_config(lora, tmp_path / "odd", use_magic=True, r=3)
    status, text = called(tmp_path / "odd")
    assert (
        status == 0
        and "problems: 15" in text
        and "unknown setting use_magic" in text
        and "hint:" in text
    )
    assert text.count("rank 4 in the file") == 1 and "and 13 more like it" in text


def test_a_path_that_is_nothing_is_status_1(tmp_path):
    done = run(tmp_path / "nothing")
    assert (
        (done.returncode, done.stdout) == (1, "")
        and "no such path" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_headers_are_read_without_torch(llama):
    code = (
        "import sys, adapterkit; adapterkit.inspect(sys.argv[1], headers=True); "
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "set()\n", done.stderr


def test_no_name_acts_on_a_terminal(tmp_path):
    files = raw_files.plain()
    files.config |= {
        "base_model_name_or_path": "\x1b[2J\u202eevil",
        "modules_to_save": ["\x1b]0;x\x07"],
    }
    files.folder().write(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter")
    for text in (tables.inspect_table(result), json.dumps(result, ensure_ascii=False)):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_the_plot_has_a_row_for_each_module(lora, llama, tmp_path):
    assert called(lora, "--base", llama, "--plot", tmp_path / "norms.html")[0] == 0
    modules = inspect(lora, base=llama)["modules"]
    maps = heatmaps_of({"lora": {"modules": modules}})
    rows, columns, values = maps["rows"], maps["columns"], maps["tables"][0]["values"]
    assert rows == ["model.layers.0", "model.layers.1"] and len(columns) == 7
    at = {m["module"]: m["relative"] for m in modules}
    assert values == [[at[f"{row}.{column}"] for column in columns] for row in rows]
    page = (tmp_path / "norms.html").read_text("utf-8")
    assert all(f"{value:.4g}</title>" in page for value in at.values())
    lines = called(lora, "--base", llama)[1].splitlines()
    drawn = [line.split() for line in lines if line.startswith("  mlp") or "  self_attn" in line]
    assert [name for name, _ in drawn] == columns and all(len(cells) == 2 for _, cells in drawn)
    darkest = max(range(7), key=lambda n: max(row[n] for row in values))
    assert "█" in drawn[darkest][1]


def test_the_picture_has_holes_where_there_is_no_number(tmp_path):
    files = raw_files.everything_else()
    files.tensors |= raw_files.pair("model.layers.0.q$_$proj", 16, 16)
    files.tensors[f"{raw_files.PREFIX}model.conv.lora_A.weight"] = raw_files.Stored.of(
        np.full((4, 6, 3, 3), np.nan, np.float32)
    )
    files.folder().write(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter", plot=tmp_path / "x.html")
    assert "q$_$proj" in (tmp_path / "x.html").read_text("utf-8")
    maps = heatmaps_of({"": result})
    assert maps["rows"] == ["", "model.layers.0"]
    assert maps["columns"] == ["model.conv", "model.embed", "q$_$proj"]
    assert [[v is None for v in row] for row in maps["tables"][0]["values"]] == [
        [True, False, True],
        [True, True, False],
    ]


def test_a_picture_that_cannot_be_drawn_is_refused_first(lora, tmp_path):
    assert ".html" in refused(lora, plot=tmp_path / "x.jpg")
    assert ".html" in refused(lora, plot=tmp_path / "nowhere" / "x.html")
    bad = edited(lora, tmp_path / "bad", lambda t: [v.fill_(math.nan) for v in t.values()])
    assert "no norms to draw" in refused(bad, plot=tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
