"""Pipelines: planned before any data, refused together, done once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.errors import Interrupted, Refused
from adapterkit.core.inputs.weights_file import (
    NamedAdapter,
    WeightsFile,
    named_adapter,
    write_weights,
)
from adapterkit.many.workflows.workflow import run_pipeline
from tests.formats.test_any_verb import write_kohya
from tests.golden.inputs import create_inputs
from tests.support.forks import command

STEPS = """
[[step]]
verb = "subtract"
inputs = ["law"]
out = "out/law-only"
options = { general = ["./english"], rank = 3 }

[[step]]
verb = "combine"
inputs = ["out/law-only", "medicine=0.5"]
out = "out/both"
options = { method = "linear" }

[[step]]
verb = "merge"
inputs = ["base", "out/both=0.75"]
out = "out/merged"

[[step]]
verb = "convert"
inputs = "out/both"
out = "out/both.gguf"
options = { to = "gguf", base = "out/merged" }
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def write(tmp_path: Path, cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """Writes a pipeline beside inputs of its own."""
    shutil.copytree(cached_folder("golden", create_inputs), tmp_path, dirs_exist_ok=True)

    def write(text: str, name: str = "steps.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def states(file: Path, **options: Any) -> list[str]:
    report = run_pipeline(file, **options)
    assert report["totals"] == {
        state: sum(row["state"] == state for row in report["steps"]) for state in report["totals"]
    }
    return [row["state"] for row in report["steps"]]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but receipts, which have times in them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if not path.name.endswith("adapterkit.json")
    }


def train(adapter: Path) -> None:
    """Other values under the same header."""
    file = adapter / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file, {"format": "pt"})


def test_steps_are_those_of_the_verbs(write, tmp_path: Path):
    file = write(STEPS)
    planned = run_pipeline(file, dry_run=True)["steps"]
    assert [row["state"] for row in planned] == ["planned"] * 4
    assert not (tmp_path / "out").exists()
    assert states(file) == ["done"] * 4
    for row in planned:  # though all but the first were planned from what was not there
        receipt = json.loads(_receipt(tmp_path / row["out"]).read_text())
        assert row["totals"]["bytes_changed"] == receipt["totals"]["bytes_changed"]
    byhand = tmp_path / "byhand"
    adapterkit.subtract(
        tmp_path / "law", general=tmp_path / "english", rank=3, out=byhand / "law-only"
    )
    both = {byhand / "law-only": 1.0, tmp_path / "medicine": 0.5}
    adapterkit.combine(both, method="linear", out=byhand / "both")
    adapterkit.merge(tmp_path / "base", {byhand / "both": 0.75}, out=byhand / "merged")
    adapterkit.convert(byhand / "both", to="gguf", base=byhand / "merged", out=byhand / "both.gguf")
    assert contents(byhand) == contents(tmp_path / "out")


WEIGHTED = """
[[step]]
verb = "combine"
inputs = ["law", "medicine"]
out = "out/both"
options = { weights = "both.json" }

[[step]]
verb = "merge"
inputs = ["base", "out/both", "english"]
out = "out/merged"
options = { weights = "merged.json" }

[[step]]
verb = "merge"
inputs = ["base"]
out = "out/unnamed"
options = { weights = "unnamed.json" }
"""


def test_steps_with_files_of_weights(write, tmp_path: Path):
    """Also of adapters that an earlier step makes, whose files nobody knows yet; made again where
    the weights change."""

    def weigh(name: str, *weights: float, adapters: tuple[Path, ...]) -> None:
        table = {"adapters": [one.name for one in adapters], "default": weights}
        (tmp_path / name).write_text(json.dumps(table))

    law, medicine, english = (tmp_path / name for name in ("law", "medicine", "english"))
    weigh("both.json", 0.5, 2.0, adapters=(law, medicine))
    weigh("merged.json", 1.0, 0.25, adapters=(tmp_path / "out" / "both", english))
    weigh("unnamed.json", 0.5, adapters=(english,))
    file = write(WEIGHTED)
    assert states(file) == ["done"] * 3
    by_hand = {tmp_path / "out" / "both": 1.0, english: 0.25}
    adapterkit.merge(tmp_path / "base", by_hand, out=tmp_path / "by-hand")
    one, other = (contents(tmp_path / name) for name in ("by-hand", "out/merged"))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == ["README.md"]  # the command
    assert states(file) == ["done before"] * 3
    weigh("unnamed.json", 0.75, adapters=(english,))
    assert states(file) == ["done before", "done before", "done"]
    known = named_adapter(str(law), LocalFolder(law)), NamedAdapter(str(medicine), {"x": "00"})
    write_weights(WeightsFile(known, (1.0, 1.0)), tmp_path / "both.json")
    assert states(file)[0] == "refused"


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_bytes_of_linux(write, tmp_path: Path, system: str):
    """Also where a changed step replaces what is there."""
    file, found = write(STEPS), []
    for where in ("linux", system):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for text in (STEPS, STEPS.replace("medicine=0.5", "medicine=0.25")):
            file.write_text(text, "utf-8")
            done = command("run", file, cwd=tmp_path, system=where)
            assert done.returncode == 0, done.stderr
            found.append(contents(tmp_path / "out"))
    assert found[:2] == found[2:] and found[0] != found[1]


def _receipt(out: Path) -> Path:
    return out / "adapterkit.json" if out.is_dir() else Path(f"{out}.adapterkit.json")


def test_a_step_is_done_once(write, tmp_path: Path):
    file = write(STEPS)
    run_pipeline(file)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert states(file) == ["done before"] * 4
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    # a changed step, and what reads its output
    file.write_text(STEPS.replace("medicine=0.5", "medicine=0.25"))
    assert states(file, dry_run=True) == ["done before", "planned", "planned", "planned"]
    before = contents(tmp_path / "out")
    assert states(file) == ["done before", "done", "done", "done"]
    after = contents(tmp_path / "out")
    assert before.keys() == after.keys() and before != after
    assert states(file) == ["done before"] * 4


@pytest.mark.parametrize("which", ["english", "medicine"])
def test_other_values_of_an_input_are_noticed(write, tmp_path: Path, which: str):
    """Fingerprints are of headers, which stay the same."""
    file = write(STEPS)
    run_pipeline(file)
    before = contents(tmp_path / "out")
    train(tmp_path / which)
    first = "done" if which == "english" else "done before"
    assert states(file) == [first, "done", "done", "done"]
    assert (
        contents(tmp_path / "out")["merged/model-00001-of-00002.safetensors"]
        != before["merged/model-00001-of-00002.safetensors"]
    )


def test_an_output_that_was_made_by_hand(write, tmp_path: Path):
    """It is left as it is while its inputs are older, and replaced with `overwrite` only."""
    file = write(STEPS)
    first = tmp_path / "out" / "law-only"
    adapterkit.subtract(tmp_path / "law", general=tmp_path / "english", rank=3, out=first)
    assert states(file, dry_run=True) == ["done before", *["planned"] * 3]
    train(tmp_path / "english")
    report = run_pipeline(file)
    assert [row["state"] for row in report["steps"]] == ["refused", *["planned"] * 3]
    assert "this pipeline did not write" in report["steps"][0]["message"]
    assert not (tmp_path / "out" / "both").exists()
    assert states(file, overwrite=True) == ["done"] * 4


def test_an_output_of_another_pipeline_is_not_replaced(write, tmp_path: Path):
    run_pipeline(write(STEPS))
    other = write(STEPS.replace("rank = 3", "rank = 2"), "other.toml")
    assert states(other) == ["refused"] * 4
    assert states(other, overwrite=True) == ["done"] * 4


def test_an_output_with_a_file_missing_is_written_again(write, tmp_path: Path):
    file = write(STEPS)
    run_pipeline(file)
    (tmp_path / "out" / "both" / "README.md").unlink()
    assert states(file) == ["done before", "done", "done", "done"]


@pytest.mark.parametrize("position", [0, -1], ids=["header", "data"])
def test_a_damaged_output_that_a_step_reads_is_made_again(write, tmp_path: Path, position: int):
    """Sizes do not tell, and what `verify` rejects is built on by no step."""
    file = write(STEPS)
    run_pipeline(file)
    before = contents(tmp_path / "out")
    weights = tmp_path / "out" / "both" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[position] ^= 1
    weights.write_bytes(data)
    row = run_pipeline(file, dry_run=True)["steps"][1]
    assert row["state"] == "planned" and "is damaged, and made again" in row["notes"][-1]
    assert states(file) == ["done before", "done", "done", "done"]
    assert contents(tmp_path / "out") == before
    weights.write_bytes(data)
    adapterkit.combine(  # by hand, so that it is not the pipeline's to replace
        [tmp_path / "out" / "law-only", (tmp_path / "medicine", 0.5)],
        method="linear", out=tmp_path / "out" / "both", overwrite=True,
    )  # fmt: skip
    weights.write_bytes(data)
    report = run_pipeline(file)
    assert "and is damaged, or" in report["steps"][1]["message"]
    assert states(file, overwrite=True) == ["done before", "done", "done", "done"]


def test_files_in_the_way(write, tmp_path: Path):
    file = write(STEPS)
    (tmp_path / "out" / "law-only").mkdir(parents=True)
    (tmp_path / "out" / "law-only" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "both.gguf").write_text("mine")
    for overwrite in (False, True):
        assert "refused" in states(file, overwrite=overwrite)
        assert (tmp_path / "out" / "law-only" / "notes.txt").read_text() == "mine"
    assert states(file)[0] == states(file)[3] == "refused"


def test_all_refusals_at_once(write, tmp_path: Path):
    """Of plans, also of a plan on what is not there yet: the ranks are known."""
    file = write(
        STEPS.replace('"medicine=0.5"', '"rslora"').replace("linear", 'linear", space = "factors')
        + '[[step]]\nverb = "merge"\ninputs = ["base", "nowhere/at-all"]\nout = "out/other"\n'
        + '[[step]]\nverb = "quantize"\ninputs = ["out/both"]\nout = "o"\noptions = { to = "int8" }'
    )
    report = run_pipeline(file)
    assert [row["state"] for row in report["steps"]] == [
        "planned", "refused", "planned", "planned", "refused", "planned"
    ]  # fmt: skip
    assert "rank" in report["steps"][1]["message"]
    assert "nowhere/at-all" in report["steps"][4]["message"]
    assert not (tmp_path / "out").exists()


def test_a_step_whose_input_is_not_known(write, tmp_path: Path):
    """Ranks by energy: planned when they are there; what is refused then stops the rest."""
    text = """
    [[step]]
    verb = "resize"
    inputs = ["law"]
    out = "small"
    options = { energy = 0.5 }
    [[step]]
    verb = "combine"
    inputs = ["small", "medicine"]
    out = "both"
    options = { method = "linear", space = "SPACE" }
    [[step]]
    verb = "merge"
    inputs = ["base", "both"]
    out = "merged"
    """
    file = write(text.replace("SPACE", "delta"))
    rows = run_pipeline(file, dry_run=True)["steps"]
    assert rows[1]["notes"] == ["planned when step 1 is done"] and "totals" not in rows[1]
    assert states(file) == ["done"] * 3
    shutil.rmtree(tmp_path / "merged")
    file.write_text(text.replace("SPACE", "factors"))
    assert states(file, dry_run=True)[0] == "done before"
    shutil.rmtree(tmp_path / "small")
    assert states(file) == ["done", "refused", "planned"]
    assert not (tmp_path / "merged").exists()


def test_options_are_checked_where_the_input_is_not_known(write):
    file = write("""
    [[step]]
    verb = "resize"
    inputs = ["law"]
    out = "small"
    options = { energy = 0.5 }
    [[step]]
    verb = "combine"
    inputs = ["small"]
    out = "both"
    options = { method = "linaer", rank = 0 }
    """)
    report = run_pipeline(file, dry_run=True)
    message = report["steps"][1]["message"]
    assert report["totals"]["refused"] == 1 and "--rank 0" in message and "linear" in message


def test_values_that_a_plan_reads(write, tmp_path: Path):
    """A plan that compares values of what is not there yet is put off, not refused."""
    write_kohya(tmp_path / "flux.safetensors", 0)
    file = write("""
    [[step]]
    verb = "convert"
    inputs = ["flux.safetensors"]
    out = "flux"
    options = { to = "peft" }
    [[step]]
    verb = "convert"
    inputs = ["flux"]
    out = "again.safetensors"
    options = { to = "kohya" }
    """)
    rows = run_pipeline(file, dry_run=True)["steps"]
    assert [row["state"] for row in rows] == ["planned"] * 2
    assert rows[1]["notes"] == ["planned when step 1 is done"]
    assert states(file) == ["done"] * 2


def test_a_conversion_of_what_is_not_there_yet_is_planned(write):
    file = write("""
    [[step]]
    verb = "convert"
    inputs = ["law"]
    out = "law.gguf"
    options = { to = "gguf", base = "base" }
    [[step]]
    verb = "merge"
    inputs = ["base", "law.gguf"]
    out = "merged"
    """)
    rows = run_pipeline(file, dry_run=True)["steps"]
    assert [row["state"] for row in rows] == ["planned"] * 2
    assert not rows[1].get("notes")
    assert states(file) == ["done"] * 2


def test_statistics_and_folders_of_an_output(write, tmp_path: Path):
    text = """
    [[step]]
    verb = "stats"
    inputs = ["base32"]
    out = "covariances-new.safetensors"
    options = { data = "ids.jsonl", what = "covariance" }
    [[step]]
    verb = "loftq"
    inputs = ["base32"]
    out = "loftq"
    options = { rank = 2, iterations = 1, stats = "covariances-new.safetensors" }
    [[step]]
    verb = "resize"
    inputs = ["loftq/adapter"]
    out = "smaller"
    options = { rank = 1 }
    """
    file = write(text)
    assert states(file) == ["done"] * 3
    assert states(file) == ["done before"] * 3
    (tmp_path / "loftq" / "adapter" / "README.md").unlink()
    rows = run_pipeline(file, dry_run=True)["steps"]
    assert [row["state"] for row in rows] == ["done before", "planned", "planned"]
    assert rows[2]["totals"]["tensors"] == len(_keys(tmp_path / "smaller"))
    file.write_text(text.replace("loftq/adapter", "loftq/adaptor"))
    report = run_pipeline(file)
    assert [row["state"] for row in report["steps"]] == ["done before", "planned", "refused"]
    assert "adapter" in report["steps"][2]["message"]


def _keys(adapter: Path) -> list[str]:
    header = read_header(LocalFolder(adapter), "adapter_model.safetensors")
    return [tensor.key for tensor in header.tensors]


def test_stopped_and_gone_on_with(write, tmp_path: Path):
    """By Ctrl-C in the second step; the first is not done again, the second goes on."""
    file, seen = write(STEPS), []

    def stop(done: int) -> None:
        if (tmp_path / "out" / "law-only").exists():
            seen.append(done)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="step 2 of 4"):
        run_pipeline(file, progress=stop)
    assert seen and (tmp_path / "out" / ".both.adapterkit").is_dir()
    assert states(file) == ["done before", "done", "done", "done"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_an_interrupted_run_of_another_job(write, tmp_path: Path):
    file = write(STEPS)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_pipeline(file, progress=stop)
    file.write_text(STEPS.replace("rank = 3", "rank = 2"))
    report = run_pipeline(file)
    assert "options.rank" in report["steps"][0]["message"]
    assert states(file, overwrite=True) == ["done"] * 4


STEP = {"verb": '"merge"', "inputs": '["base", "law"]', "out": '"merged"'}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verb": '"merg"'}, "did you mean 'merge'?"),
        ({"verb": '"inspect"'}, "a verb that writes: arrow"),
        ({"verb": "3"}, "step 1: verb = 3"),
        ({"verb": None}, "verb is missing"),
        ({"inputs": None}, "inputs is missing"),
        ({"inputs": '["base"]'}, "BASE ADAPTER..."),
        ({"inputs": "[1]"}, "inputs[0] = 1"),
        ({"out": None}, "out is missing"),
        ({"ouput": '"x"'}, "ouput is unknown"),
        ({"options": "{ dtyp = 'bf16' }"}, "did you mean 'dtype'?"),
        ({"options": "{ overwrite = true }"}, "overwrite is unknown"),
        ({"options": "3"}, "options = 3"),
        ({"verb": '"quantize"', "inputs": '["base"]'}, "step 1 (quantize): to is missing"),
        ({"verb": '"quantize"', "options": "{ push = 'me/x' }"}, "push is unknown"),
        ({"verb": '"quantize"', "inputs": '["base", "law"]'}, "2 inputs"),
        ({"inputs": '["merged", "law"]'}, "the output of this step"),
        ({"inputs": '["base", "later"]'}, "the output of step 2"),
        ({"out": '"later/inner"'}, "outputs of steps 1 and 2"),
        ({"out": '"base/inner"'}, "holds the output of this step"),
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_refused(write, changes: dict[str, str | None], words: str):
    entry = {key: value for key, value in (STEP | changes).items() if value is not None}
    lines = "\n".join(f"{key} = {value}" for key, value in entry.items())
    later = '[[step]]\nverb = "merge"\ninputs = ["base", "law"]\nout = "later"\n'
    with pytest.raises(Refused) as caught:
        run_pipeline(write(f"[[step]]\n{lines}\n{later}"))
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("text", ["", "step = 3", "[[steps]]\nverb = 'merge'", "=", "step = []"])
def test_files_without_steps_are_refused(write, text: str):
    with pytest.raises(Refused, match=r"steps\.toml"):
        run_pipeline(write(text))


def test_all_problems_of_a_file_are_listed(write):
    file = write('[[step]]\nverb = "merg"\n[[step]]\nverb = "init"\ninputs = ["a", "b"]\n')
    with pytest.raises(Refused) as caught:
        run_pipeline(file)
    message = str(caught.value)
    assert "step 1" in message and "step 2 (init)" in message and "out is missing" in message


def test_names_of_files_with_weights_in_them(write, tmp_path: Path):
    """`a=1` is a folder where there is one, as on the command line."""
    shutil.copytree(tmp_path / "law", tmp_path / "law=2")
    file = write(
        '[[step]]\nverb = "merge"\ninputs = ["base", "law=2", "law=2=0.5", "law=-1"]\nout = "m"'
    )
    assert states(file) == ["done"]
    options = json.loads((tmp_path / "m" / "adapterkit.json").read_text())["recipe"]["options"]
    assert options["weights"] == [1.0, 0.5, -1.0]


def test_receipts_name_no_path(write, tmp_path: Path):
    run_pipeline(write(STEPS))
    for path in (tmp_path / "out").rglob("*adapterkit.json"):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)["pipeline"]["file"] == "steps.toml"


def test_the_run_command_plans_and_runs_a_pipeline(write, tmp_path: Path):
    file = str(write(STEPS))
    command = lambda *words: CliRunner().invoke(main, ["run", file, *words])
    planned = command("--dry-run")
    assert planned.exit_code == 0 and planned.stderr.count("planned: step") == 4
    done = command("--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["totals"]["done"] == 4
    assert document["steps"][2]["verb"] == "merge"
    shutil.rmtree(tmp_path / "english")
    refused = command()
    assert refused.exit_code == 1 and "1 refused" in refused.stderr
    assert "refused: step 1, subtract -> out/law-only" in refused.stderr
    usage = command("--worker", "0/2")
    assert usage.exit_code == 2 and "--worker does not apply to a pipeline" in usage.stderr


def test_run_in_python_accepts_a_pipeline(write):
    """`adapterkit.run` tells a pipeline by its name."""
    file = write(STEPS)
    report = adapterkit.run(file, dry_run=True)
    assert isinstance(report, dict) and report["totals"]["planned"] == 4
    with pytest.raises(Refused, match="--workers does not apply to a pipeline"):
        adapterkit.run(file, workers=2)
