"""report: its numbers against dense float64, its page against its numbers."""

import html
import itertools
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Damaged, Refused
from adapterkit.core.inputs.weights_file import WeightsFile, named_adapter, write_weights
from adapterkit.verbs.look.overview.page import report_page
from adapterkit.verbs.look.pages import MOST_CELLS
from tests.support import raw_files
from tests.support.inspections import inspect

WIDTH = 16


def adapter(folder, seed=0, modules=(), rank=4, **config):
    """An adapter of random factors with falling singular values."""
    rng, files = (
        np.random.default_rng(seed),
        raw_files.AdapterFiles(raw_files.adapter_config(r=rank, lora_alpha=2 * rank, **config), {}),
    )
    sizes = np.logspace(0, -2, rank)
    for name in modules or [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]:
        a, b = rng.normal(size=(rank, WIDTH)), rng.normal(size=(WIDTH, rank))
        prefix = f"{raw_files.PREFIX}{name}.lora_"
        files.tensors[f"{prefix}A.weight"] = raw_files.Stored.of((a * sizes[:, None]).astype("f4"))
        files.tensors[f"{prefix}B.weight"] = raw_files.Stored.of((b * sizes).astype("f4"))
    files.folder().write(folder)
    return folder


def deltas(folder):
    """scale * b @ a by module, dense."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    names = [key for key in tensors if "lora_A" in key]
    return {
        key: scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in names
    }


def report(tmp_path, *sources, **options):
    return adapterkit.report([*sources], out=tmp_path / "report.html", overwrite=True, **options)


def test_the_numbers_of_one_adapter(tmp_path):
    one = adapter(tmp_path / "one")
    document = report(tmp_path, one)
    (its,), dense = document["adapters"], deltas(one)
    spectra = [torch.linalg.svdvals(d)[:4] for d in dense.values()]
    squares = torch.stack(spectra).square()
    assert its["norm"] == pytest.approx(float(squares.sum() ** 0.5), rel=1e-6)
    stable = (squares.sum(1) / squares[:, 0]).median()
    assert its["stable_rank"] == pytest.approx(float(stable), rel=1e-6)
    for share in (90, 99):
        kept = squares.cumsum(1) / squares.sum(1, keepdim=True)
        needed = int((kept < share / 100).sum(1).max()) + 1
        assert its[f"rank_{share}"] == needed
    rows = {row["rank"]: row["energy"] for row in document["ranks"][0]["rows"]}
    for rank, energy in rows.items():
        assert energy == pytest.approx(float(squares[:, :rank].sum() / squares.sum()), rel=1e-6)
    (band,) = document["spectra"]
    assert band["modules"] == "self_attn.q_proj" and band["count"] == 3
    assert band["median"] == pytest.approx(torch.stack(spectra).median(0).values.tolist(), rel=1e-5)
    table = next(t for t in document["heatmaps"]["tables"] if t["measure"] == "norm")
    norms = [float(s.square().sum() ** 0.5) for s in spectra]
    assert [row[0] for row in table["values"]] == pytest.approx(norms, rel=1e-6)
    assert document["pairs"] is None and "resize" in document["advice"]["command"]


def test_the_numbers_of_pairs(tmp_path):
    folders = [adapter(tmp_path / f"n{seed}", seed) for seed in (0, 1)]
    pairs = report(tmp_path, *folders)["pairs"]
    flat = [torch.cat([d.flatten() for d in deltas(f).values()]) for f in folders]
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert pairs["cosines"][0][1] == pytest.approx(cosine, rel=1e-6)
    total = flat[0] + flat[1]
    kept = [float(total @ one / (one @ one)) for one in flat]
    assert pairs["sum"]["retention"] == pytest.approx(kept, rel=1e-6)
    assert pairs["sum"]["norm"] == pytest.approx(float(total.norm()), rel=1e-6)
    opposed = float(((flat[0] * flat[1]) < 0).double().mean())
    assert pairs["opposed"][0][1] == pytest.approx(opposed, abs=1e-9)  # all of 16 rows
    overlaps = []
    for one, other in zip(*(deltas(f).values() for f in folders), strict=True):
        spaces = [torch.linalg.svd(d)[2][:4] for d in (one, other)]
        overlaps.append(float((spaces[0] @ spaces[1].T).square().sum()) / 4)
    assert pairs["inputs"][0][1] == pytest.approx(sum(overlaps) / 3, rel=1e-6)
    assert pairs["inputs"][0][0] == pytest.approx(1)


def test_statistics_weigh_the_cosines(tmp_path):
    folders = [adapter(tmp_path / f"n{seed}", seed) for seed in (0, 1)]
    root = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    covariance = root @ root.T
    keys = (key.removeprefix(raw_files.PREFIX) for key in deltas(folders[0]))
    keys = [key.replace("lora_A.weight", "covariance") for key in keys]
    save_file({key: covariance.clone() for key in keys}, tmp_path / "s.safetensors")
    pairs = report(tmp_path, *folders, stats=tmp_path / "s.safetensors")["pairs"]
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for two in zip(*(deltas(f).values() for f in folders), strict=True):
        for i, j in itertools.product(range(2), repeat=2):
            sums[i, j] += torch.trace(two[i] @ covariance.double() @ two[j].T)
    cosine = float(sums[0, 1] / (sums[0, 0] * sums[1, 1]) ** 0.5)
    assert pairs["output_cosines"][0][1] == pytest.approx(cosine, rel=1e-5)
    assert pairs["output_cosines"] != pairs["cosines"]


def test_the_advice_follows_from_the_numbers(tmp_path):
    one = adapter(tmp_path / "one")
    again = adapter(tmp_path / "again")
    minus = adapter(tmp_path / "minus")
    tensors = load_file(minus / "adapter_model.safetensors")
    opposed = {k: -0.6 * v if "lora_B" in k else v for k, v in tensors.items()}
    save_file(opposed, minus / "adapter_model.safetensors")
    advice = lambda *sources: report(tmp_path, *sources)["advice"]
    assert "--method mean" in advice(one, again)["command"]
    assert "--method ties" in advice(one, minus)["command"]
    assert "--method linear" in advice(one, adapter(tmp_path / "other", 7))["command"]
    for sources in ((one, again), (one, minus), (one, tmp_path / "other")):
        command = shlex.split(advice(*sources)["command"])[1:]
        done = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "combined"), "--overwrite"])
        assert done.exit_code == 0, done.output
    assert "opposed signs in 100% of the elements" in advice(one, minus)["reason"]
    broken = {k: torch.full_like(v, torch.nan) for k, v in tensors.items()}
    save_file(broken, minus / "adapter_model.safetensors")
    assert "not finite" in advice(minus)["reason"] and advice(minus)["command"] == ""


def test_inspect_of_several_adapters_has_pairs_and_advice(tmp_path):
    """Each as alone, and the pairs and the advice of a report of them; as a table, too."""
    sources = [adapter(tmp_path / f"n{seed}", seed) for seed in (0, 1, 2)]
    result = adapterkit.inspect(sources)
    document = adapterkit.report(sources, out=tmp_path / "report.html")
    assert result["adapters"] == [inspect(source) for source in sources]
    assert result["pairs"] == document["pairs"] and result["advice"] == document["advice"]
    words = ["inspect", *map(str, sources)]
    called = lambda *more: CliRunner().invoke(main, [*words, *more]).stdout
    assert result["kind"] == "adapters" and result["readable"]
    assert json.loads(called("--json")) == result
    text = called()
    assert f"try: {result['advice']['command']}" in text
    line = next(line for line in text.splitlines() if line.startswith("n0  n2"))
    cosine, opposed = result["pairs"]["cosines"][0][2], result["pairs"]["opposed"][0][2]
    chance = f"{math.acos(cosine) / math.pi:.0%}"
    assert line.split()[2:] == [f"{cosine:.3f}", f"{opposed:.0%}", chance]
    for how in ({"headers": True}, {"plot": tmp_path / "x.html"}):
        with pytest.raises(Refused, match="3 adapters"):
            adapterkit.inspect(sources, **how)
    with pytest.raises(Refused, match="no adapter"):
        adapterkit.inspect([sources[0], tmp_path])


def test_relative_norms_and_an_outcome(lora, llama, tmp_path):
    adapterkit.merge(llama, [lora], out=tmp_path / "merged")
    document = report(tmp_path, lora, base=llama, result=tmp_path / "merged")
    modules = inspect(lora, base=llama)["modules"]
    table = next(t for t in document["heatmaps"]["tables"] if t["measure"] == "relative")
    values = sorted(v for row in table["values"] for v in row if v is not None)
    assert values == sorted(m["relative"] for m in modules)
    outcome = document["outcome"]
    assert outcome["verb"] == "merge" and len(outcome["worst"]) == min(len(modules), 20)
    shares = [one["survived"] for one in outcome["worst"]]
    assert shares == sorted(shares)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Outcome" in page and outcome["fingerprint"] in page


def test_the_page_has_the_numbers_of_the_document(tmp_path):
    folders = [adapter(tmp_path / f"n{seed}", seed) for seed in (0, 1)]
    document = report(tmp_path, *folders)
    page = (tmp_path / "report.html").read_text("utf-8")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    for one in document["adapters"]:
        assert f"{one['norm']:.4g}" in cells and f"{one['stable_rank']:.3g}" in cells
    for row in document["pairs"]["cosines"]:
        assert {f"{value:.3f}" for value in row} <= {*cells}
    tips = html.unescape(" ".join(re.findall(r"<title>([^<]*)</title>", page)))
    for table in document["heatmaps"]["tables"]:
        for value in (v for row in table["values"] for v in row):
            assert f": {value:.4g}" in tips
    first = (tmp_path / "report.html").read_bytes()
    report(tmp_path, *folders)  # an older report may be replaced
    assert (tmp_path / "report.html").read_bytes() == first


HOSTILE = '"><script>alert(1)</script>\u202e' + "x" * 300


def test_hostile_names_are_text(tmp_path):
    folder = adapter(
        tmp_path / "<b>one", modules=["model.layers.0.<img src=x>"], base_model_name_or_path=HOSTILE
    )
    report(tmp_path, folder)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not any(text in page for text in ("<script", "<img", "<b>", "\u202e"))
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("layers", [20, pytest.param(58, marks=pytest.mark.slow)])
def test_many_experts_are_a_bitmap_of_bounded_size(layers, tmp_path):
    names = [f"m.layers.{n}.experts.{e}.up" for n in range(layers) for e in range(256)]
    folder = adapter(tmp_path / "moe", modules=names, rank=1)
    report(tmp_path, folder)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert len(names) > MOST_CELLS and "data:image/png" in page and "<rect" not in page
    assert len(page) < 1_000_000


def test_invalid_outputs_and_adapters_are_refused(tmp_path, llama):
    one = adapter(tmp_path / "one")
    (tmp_path / "taken.html").write_text("mine")
    for out in (tmp_path / "taken.html", tmp_path / "x.txt", tmp_path / "no" / "x.html", tmp_path):
        with pytest.raises(Refused):
            adapterkit.report([one], out=out)
        with pytest.raises(Refused):
            adapterkit.report([one], out=out, overwrite=True)
    assert (tmp_path / "taken.html").read_text() == "mine"
    with pytest.raises(Refused, match="no receipt"):
        report(tmp_path, one, result=llama)
    with pytest.raises(Refused, match="no adapter"):
        report(tmp_path, llama)
    assert not (tmp_path / "report.html").exists()


LAYERS = (0, 1, 2, 10, 11, 20)


def axes(text):
    """Of each heatmap of a page, its name, and the columns in the order of its cells."""
    for label, figure in re.findall(
        r'<figure class="map" aria-label="([^"]*)".*?>(.*?)</figure>', text
    ):
        cells = re.findall(r'<rect x="(\d+)".*?<title>(\S+)', figure)
        yield label, [name for _, name in sorted({(int(x), name) for x, name in cells})]


def test_layers_are_in_natural_order_on_every_axis(tmp_path):
    """safetensors stores them 0, 1, 10, 11, 2, 20."""
    names = [f"model.layers.{n}.self_attn.q_proj" for n in LAYERS]
    rows = [f"model.layers.{n}" for n in LAYERS]
    one, two = (adapter(tmp_path / f"n{seed}", seed, modules=names) for seed in (0, 1))
    adapterkit.resize(one, rank=2, out=tmp_path / "small")
    of_both = [named_adapter(str(folder), LocalFolder(folder)) for folder in (one, two)]
    modules = {name: (n / 8, 0.5) for n, name in enumerate(sorted(names))}
    write_weights(WeightsFile(tuple(of_both), (1.0, 1.0), modules), tmp_path / "w.json")
    document = report(tmp_path, weights=tmp_path / "w.json", result=tmp_path / "small")
    for own in ("heatmaps", "weights", "outcome"):
        assert document[own]["rows"] == rows, own
    assert [layer["layer"] for layer in document["pairs"]["layers"]] == rows
    drawn = dict(axes((tmp_path / "report.html").read_text()))
    assert "absolute cosines by layer" in drawn and len(drawn) > 6
    assert all(columns == rows for columns in drawn.values()), drawn


def test_every_figure_has_a_name_of_its_own(lora, llama, tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    adapterkit.merge(llama, [lora], out=tmp_path / "merged")
    found = []
    for number, adapters in enumerate(([lora], [one, two])):
        out, more = tmp_path / f"{number}.html", {"result": tmp_path / "merged"}
        adapterkit.report(adapters, out=out, **(more if number == 0 else {}))
        text = out.read_text()
        figures = re.findall(r"<figure[^>]*>", text)
        labels = [re.search(r'aria-label="(\S[^"]*)"', figure)[1] for figure in figures]
        assert len({*labels}) == len(labels), labels
        assert all('role="img" aria-label=' in svg for svg in re.findall(r"<svg[^>]*>", text))
        found += labels
    assert len(found) > 20
    assert "<iframe sandbox title=" in adapterkit.inspect(lora)._repr_html_()


def test_an_older_page_is_replaced_only_with_overwrite(tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    for verb, name in ((adapterkit.report, "out"), (adapterkit.inspect, "plot")):
        page = {name: tmp_path / f"{name}.html"}
        verb([one], **page)
        before = page[name].read_bytes()
        with pytest.raises(Refused, match="exists") as refused:
            verb([two], **page)
        assert "--overwrite" in refused.value.hint and page[name].read_bytes() == before
        verb([two], overwrite=True, **page)
        assert page[name].read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "out.html", "plot.html"}


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_module_whose_delta_is_zero_is_among_the_problems(side, tmp_path):
    one = adapter(tmp_path / "one")
    tensors = load_file(one / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1." in key and side in key)
    save_file(tensors | {key: torch.zeros_like(tensors[key])}, one / "adapter_model.safetensors")
    (problem,) = report(tmp_path, one)["adapters"][0]["problems"]
    assert "1 of 3 modules are zero: model.layers.1.self_attn.q_proj" in problem["problem"]
    assert problem["problem"] in (tmp_path / "report.html").read_text()


def test_each_problem_on_the_page_has_its_command_once(tmp_path):
    document = report(tmp_path, *(adapter(tmp_path / name, seed) for seed, name in enumerate("ab")))
    commands = [f"adapterkit resize {name} --rank 2 --out smaller" for name in "ab"]
    for one, command in zip(document["adapters"], commands, strict=True):
        one["problems"] = [Refused("bad", hint=f"mend it\n{command}").row()]
    document["advice"]["command"] = commands[0]
    page = report_page(document)
    assert [page.count(command) for command in commands] == [1, 1]


def test_the_command_and_notebooks(lora, llama, tmp_path):
    out = tmp_path / "report.html"
    words = ["report", str(lora), "--out", str(out), "--overwrite"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and "next: adapterkit" in result.stdout
    printed = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert printed == json.loads(json.dumps(report(tmp_path, lora)))
    shown = adapterkit.inspect(lora)._repr_html_()
    assert shown.startswith("<iframe sandbox") and "q_proj" in shown
    assert adapterkit.inspect(llama)._repr_html_() is None
    receipt = adapterkit.merge(llama, [lora], out=tmp_path / "merged")
    assert receipt.data["fingerprint"] in receipt._repr_html_()


def test_a_notebook_shows_the_page_of_a_report_as_it_is_written(lora, tmp_path):
    found = report(tmp_path, lora)
    shown = re.search('<iframe sandbox [^>]* srcdoc="([^"]*)"', found._repr_html_())
    assert shown and html.unescape(shown[1]) == (tmp_path / "report.html").read_text()


def test_weights_are_on_the_page(tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    name = "model.layers.{}.self_attn.q_proj".format
    file = tmp_path / "w.json"
    losses = [{"row": "base", "files": [3.5, 3.25], "value": 3.375}]
    losses += [{"row": "<module>", "files": [2.5, 2.75], "value": 2.625}]
    weights = WeightsFile(
        tuple(named_adapter(str(one), LocalFolder(one)) for one in (one, two)),
        (0.5, -0.25),
        {name(0): (1.0, 0.125), name(2): ((1.0, 2.0, 0.0, 0.0), 0.25)},
        "direction",
        fit={"losses": losses, "files": ["en", "fr"], "written": {"reason": "it is <less>"}},
    )
    write_weights(weights, file)
    document = report(tmp_path, weights=file)
    its = document["weights"]
    assert its["default"] == [0.5, -0.25] and its["rows"] == ["model.layers.0", "model.layers.2"]
    assert [one["values"] for one in its["tables"]] == [[[1.0], [0.75]], [[0.125], [0.25]]]
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Weights</h2>" in page and "2.6250" in page and "it is &lt;less&gt;" in page
    assert "&lt;module&gt;" in page and "<module>" not in page
    assert report(tmp_path, one, two, weights=file) == document
    with pytest.raises(Refused, match="is not the adapter"):
        report(tmp_path, two, one, weights=file)
    assert report(tmp_path, one)["weights"] is None


def test_scores_are_bars_and_a_table_on_the_page(tmp_path):
    estimate = lambda value, by: {"value": value, "low": value - by, "high": value + by}
    document = {
        "score": 1,
        "data": {"files": {}, "samples": 3, "tokens": 1200},
        "against": "/home/me/base",
        "rows": [
            {"model": "/home/me/base + style", "loss": estimate(2.0, 0.5), "perplexity": 7.389,
             "kl": estimate(0.0, 0.0), "same_top1": 1.0},
            {"model": "/home/me/merged", "loss": estimate(2.5, 0.25), "perplexity": 12.18,
             "more": estimate(0.5, 0.6) | {"within_noise": True}, "kl": estimate(0.3, 0.1),
             "same_top1": 0.75},
        ],
        "notes": ["two samples are cut to the model's length"],
    }  # fmt: skip
    file, one = tmp_path / "scores.json", adapter(tmp_path / "one")
    file.write_text(json.dumps(document))
    assert report(tmp_path, one, scores=file)["scores"] == document
    page = (tmp_path / "report.html").read_text()
    part = page[page.index("<h2>Scores</h2>") :]
    assert "/home/me" not in page and "merged: 2.5000" in part and "base + style: 2.0000" in part
    shown = ("KL is from base", "2.5000", "± 0.2500", "12.18", "0.3", "75.00%", "within noise")
    assert all(text in part for text in (*shown, "two samples are cut", "1,200 tokens"))
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="\.7"', part)]
    assert widths == pytest.approx([100 * 2.0 / 2.75, 100 * 2.5 / 2.75], abs=1e-3)
    (first, *_) = re.findall(r'<rect x="([\d.]+)" y="0.42" width="([\d.]+)"', part)
    assert [*map(float, first)] == pytest.approx([100 * 1.5 / 2.75, 100 * 1.0 / 2.75], abs=1e-3)
    assert "<h2>Scores</h2>" not in report_page(report(tmp_path, one))


@pytest.mark.parametrize("text", ["{}", '{"score": 2}', '{"score": 1, "rows": []}', "[]"])
def test_a_file_that_score_did_not_write_is_refused_with_the_command(text, tmp_path):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises((Refused, Damaged), match=r"scores\.json"):
        report(tmp_path, adapter(tmp_path / "one"), scores=tmp_path / "scores.json")
