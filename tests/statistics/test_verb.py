"""`adapterkit stats`: the numbers are those of the model on the data, the file is whole or not
there."""

import errno
import importlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit
from adapterkit.cli import main
from adapterkit.core import execute
from adapterkit.core.checkpoint.disk import storage_errors
from adapterkit.core.errors import Failed, Interrupted, Refused, Unrecoverable
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.system import system
from adapterkit.verbs.shared.statistics_file import METADATA
from tests.support import oracle
from tests.support.texts import WORDS
from tests.support.usual import usual

from .conftest import TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")
Model = Any


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[METADATA])


def tensor_of(path: Path, module: str, kind: str) -> Tensor:
    owner = metadata(path)["shared"].get(module, module) if kind != "gradient" else module
    return load_file(path)[f"{owner}.{kind}"]


def inputs_of(model: Model, runs: list[tuple[Mapping[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """What linear layers see, (tokens, in) float64, of one sample at a time; of each the flags say
    which tokens count."""
    seen: dict[str, list[Tensor]] = {}
    flags = torch.tensor([])

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0].detach().double()  # (1, tokens, in), or (1, in) of a pooled text
            seen.setdefault(name, []).append(x[0][flags] if x.dim() == 3 else x)

        return hook

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for sample, flags in runs:  # noqa: B007 (read by the hooks)
            model(**sample)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def of_texts(model: Model, texts: list[str]) -> dict[str, Tensor]:
    tokens = [torch.tensor([ids_of(text)]) for text in texts]
    return inputs_of(model, [({"input_ids": t}, torch.ones(t.shape[1]).bool()) for t in tokens])


def ids_of(text: str) -> list[int]:
    merged = text.replace("th", "\1").replace("s ", "\2")
    names = {"\1": "th", "\2": "s "}
    return [WORDS.index(names.get(letter, letter)) for letter in merged]


def common(prompt: list[int], whole: list[int]) -> int:
    """How many tokens they begin with alike."""
    count = 0
    while count < len(prompt) and prompt[count] == whole[count]:
        count += 1
    return count


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", usual(
    itertools.product(
        ["llama", "gpt2", "bert"], [{}, {"batch": 1}, {"batch": 100}, {"whole_model": True}]
    ),
    lambda row: row[0] == "llama" or row[1] == {},
), ids=str)  # fmt: skip
def test_all_tokens_of_texts_count_and_no_padding(name, options, base, texts, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base(name), data=texts, out=out, what="covariance,mean", **options)
    xs = of_texts(oracle.load(getattr(oracle, name), base(name)), TEXTS)
    watched = [m for m in xs if not m.endswith("lm_head")]
    assert len(watched) >= 8 and "lm_head" not in metadata(out)["shared"]
    for module in watched:
        x = xs[module]
        covariance, mean = (tensor_of(out, module, kind) for kind in ("covariance", "mean"))
        assert torch.allclose(covariance.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6), module
        assert torch.allclose(mean.double(), x.mean(0), rtol=1e-4, atol=1e-6), module
    assert metadata(out)["tokens"] == sum(len(ids_of(text)) for text in TEXTS)


@pytest.mark.parametrize("name, module", [
    ("llama", "model.layers.1.mlp.down_proj"), ("bert", "encoder.layer.1.output.dense"),
])  # fmt: skip
def test_only_the_tokens_of_completions_count(name, module, base, pairs, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    receipt = adapterkit.stats(base(name), data=pairs, out=out)
    runs = []
    for text in TEXTS:
        whole = ids_of(f"{text} {text[::-1]}")
        prompt = ids_of(text)
        same = common(prompt, whole)
        tokens = torch.tensor([whole])
        runs.append(({"input_ids": tokens}, torch.arange(len(whole)) >= same))
    xs = inputs_of(oracle.load(getattr(oracle, name), base(name)), runs)
    x, actual = xs[module], tensor_of(out, module, "covariance").double()
    assert torch.allclose(actual, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    totals = receipt.data["totals"]
    assert totals["tokens_counted"] == len(x) == metadata(out)["tokens"] < totals["tokens"]


def test_an_encoder_decoder(base, pairs, tmp_path) -> None:
    """The encoder sees the prompts, the decoder the completions."""
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base("t5"), data=pairs, out=out)
    model = oracle.load(oracle.t5, base("t5"))
    encoder, decoder = [], []
    for text in TEXTS:
        batch = {"input_ids": torch.tensor([ids_of(text)]),
                 "labels": torch.tensor([ids_of(f" {text[::-1]}")])}  # fmt: skip
        for found, key in ((encoder, "input_ids"), (decoder, "labels")):
            found.append((batch, torch.ones(batch[key].shape[1]).bool()))
    for module, runs in (
        ("encoder.block.1.layer.0.SelfAttention.q", encoder),
        ("decoder.block.1.layer.0.SelfAttention.q", decoder),
        ("decoder.block.0.layer.1.EncDecAttention.k", encoder),
        ("decoder.block.0.layer.1.EncDecAttention.q", decoder),
    ):
        only = {name: m for name, m in model.named_modules() if name == module}
        x = _inputs(model, only[module], runs)
        actual = tensor_of(out, module, "covariance").double()
        assert torch.allclose(actual, x.T @ x / len(x), rtol=1e-4, atol=1e-6), module


def _inputs(model: Model, module: nn.Module, runs: list) -> Tensor:
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for batch, flags in runs:
            model(**batch)
            assert len(seen[-1]) == len(flags)
    hook.remove()
    return torch.cat(seen)


def test_every_kind_has_its_tensors(base, pairs, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    what = ["covariance", "mean", "pca,gradient"]
    receipt = adapterkit.stats(base(), data=pairs, out=out, what=what, targets="q_proj,down_proj")
    modules = [
        f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    ]
    kinds = {
        "covariance": 2,
        "mean": 1,
        "components": 2,
        "variances": 1,
        "variance": 1,
        "gradient": 2,
    }
    tensors = load_file(out)
    assert {key: value.dim() for key, value in tensors.items()} == {
        f"{module}.{kind}": axes for module in modules for kind, axes in kinds.items()
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert receipt.data["totals"]["modules"] == 4


def test_the_gradient_is_that_of_the_loss_on_completions(base, pairs, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base(), data=pairs, out=out, what="gradient", targets="v_proj", batch=1)
    model = oracle.load(oracle.llama, base())
    for text in TEXTS:
        prompt, whole = ids_of(text), ids_of(f"{text} {text[::-1]}")
        same = common(prompt, whole)
        labels = torch.tensor([[-100] * same + whole[same:]])
        (model(torch.tensor([whole]), labels=labels).loss / len(TEXTS)).backward()
    expected = model.get_submodule("model.layers.0.self_attn.v_proj").weight.grad
    actual = load_file(out)["model.layers.0.self_attn.v_proj.gradient"]
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-7)


# -- the job ---------------------------------------------------------------------------------------


def test_the_file_records_the_job(base, texts, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    receipt = adapterkit.stats(base(), data=[texts], out=out, samples=4, length=5, seed=3)
    about = metadata(out)
    assert (about["samples"], about["what"]) == (4, ["covariance"])
    options = {
        "what": ["covariance"],
        "samples": 4,
        "length": 5,
        "batch": 8,
        "seed": 3,
        "whole_model": False,
        "components": 256,
    }
    assert about["options"] == options
    assert about["data"]["files"] == {"0 texts.jsonl": {"samples": 6, "unit": "line"}}
    recipe = receipt.data["recipe"]
    assert recipe["options"] == {**options, "data": about["data"]} and recipe["verb"] == "stats"
    assert receipt.data["data"] == about["data"] and receipt.out == out
    assert str(tmp_path) not in json.dumps(receipt.data) and not receipt.finished_before


def test_the_same_job_gives_the_same_bytes(base, texts, tmp_path) -> None:
    for name in "ab":
        adapterkit.stats(base(), data=texts, out=tmp_path / f"{name}.safetensors", samples=3)
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert one == two
    adapterkit.stats(base(), data=texts, out=tmp_path / "c.safetensors", samples=3, seed=1)
    assert (tmp_path / "c.safetensors").read_bytes() != one


def test_a_dry_run_prints_sizes_and_writes_nothing(base, texts, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "s.safetensors"
    plan = adapterkit.stats(base(), data=texts, out=out, dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    receipt = adapterkit.stats(base(), data=texts, out=out)
    real, planned = receipt.data["totals"], plan.totals()
    assert real["bytes_written"] == out.stat().st_size <= planned["bytes_written"] + 100_000
    assert planned["disk_needed"] >= real["bytes_written"] - 100_000
    collected = plan.shards[0].collection
    assert collected is not None and collected.work > 0
    assert collected.temporary_disk(collected.sizes.activations) == collected.work
    assert (
        collected.temporary_disk(0) == collected.work + collected.sizes.activations > collected.work
    )
    for key in ("samples", "tokens", "tokens_counted", "modules", "batches"):
        assert planned[key] == real[key] > 0, key
    assert plan.recipe()["options"] == receipt.data["recipe"]["options"]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_stats_command_writes_the_file(as_json, base, texts, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    words = ["stats", str(base()), "--data", str(texts), "--out", str(out), "--what", "mean"]
    run = lambda *more: click.testing.CliRunner().invoke(main, [*words, *more])
    flags = ["--json"] if as_json else []
    plan, done = run("--dry-run", *flags), run(*flags)
    assert plan.exit_code == done.exit_code == 0, plan.output + done.output
    if as_json:
        assert json.loads(plan.stdout)["totals"]["samples"] == 6
        assert json.loads(done.stdout)["recipe"]["options"]["what"] == ["mean"]
    else:
        assert "tokens counted" in plan.stdout and done.stdout == ""
        assert "statistics of 14 modules from 50 tokens of 6 samples" in done.stderr
        assert "fewer than --samples 256: all are used" in done.stderr
    assert run("--quiet", "--overwrite").output == ""


def test_progress_is_per_layer(base, texts, tmp_path) -> None:
    class Progress:
        total, done = 0, 0

        def expect(self, total: int) -> None:
            self.total = total

        def __call__(self, done: int) -> None:
            self.done += done

    progress = Progress()
    adapterkit.stats(base(), data=texts, out=tmp_path / "s.safetensors", batch=2, progress=progress)
    assert progress.done == progress.total >= 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_takes_the_file(name, base, texts, tmp_path) -> None:
    """With modules that share their statistics."""
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base(name), data=texts, out=out)
    receipt = adapterkit.loftq(base(name), rank=2, stats=out, out=tmp_path / "out", iterations=1)
    metrics = [m for m in receipt.data["parameters"].values() if "error_after" in m]
    assert len(metrics) >= 8 and all("damping" in metric for metric in metrics)


# -- the file is whole or not there ----------------------------------------------------------------


def stop_after(layers: int) -> Any:
    def progress(done: int) -> None:
        nonlocal layers
        layers -= 1
        if layers <= 0:
            raise KeyboardInterrupt

    return progress


BOTH, WHOLE = (
    [f"{name}.safetensors", f"{name}.safetensors.adapterkit.json"] for name in ("s", "whole")
)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


@pytest.mark.parametrize("layers", usual([1, 2, 3], {2}))
def test_an_interrupted_run_is_resumed(layers, base, pairs, tmp_path) -> None:
    out, job = tmp_path / "s.safetensors", {"what": "covariance,gradient", "batch": 2}
    adapterkit.stats(base(), data=pairs, out=tmp_path / "whole.safetensors", **job)
    run = lambda **more: adapterkit.stats(base(), data=pairs, out=out, **(job | more))
    with pytest.raises(Interrupted, match="--resume"):
        run(progress=stop_after(layers))
    assert left(tmp_path) == [".s.safetensors.adapterkit", *WHOLE]
    with pytest.raises(Refused, match="was interrupted"):
        run()
    for other in ({"seed": 1}, {"length": 3}, {"targets": "q_proj"}, {"batch": 3}):
        with pytest.raises(Refused, match="the interrupted run was of another job"):
            run(resume=True, **other)
    assert not run(resume=True).finished_before
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert left(tmp_path) == [*BOTH, *WHOLE]
    assert run(resume=True).finished_before
    with pytest.raises(Refused, match="finished output is of another job"):
        run(resume=True, seed=1, samples=2)


def test_begin_again_after_an_interruption(base, texts, tmp_path) -> None:
    out = tmp_path / "s.safetensors"
    with pytest.raises(Interrupted):
        adapterkit.stats(base(), data=texts, out=out, progress=stop_after(1))
    adapterkit.stats(base(), data=texts, out=out, overwrite=True, samples=2)
    assert metadata(out)["samples"] == 2 and left(tmp_path) == BOTH


def test_only_older_statistics_are_replaced_and_only_with_overwrite(base, texts, tmp_path):
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base(), data=texts, out=out)
    before = out.read_bytes()
    with pytest.raises(Refused, match="a file of this name"):
        adapterkit.stats(base(), data=texts, out=out, samples=2)
    with pytest.raises(Interrupted):
        adapterkit.stats(
            base(), data=texts, out=out, samples=2, overwrite=True, progress=stop_after(1)
        )
    assert out.read_bytes() == before
    adapterkit.stats(base(), data=texts, out=out, samples=2, resume=True)
    assert metadata(out)["samples"] == 2
    model = tmp_path / "model.safetensors"
    shutil.copy(base() / "model.safetensors", model)
    with pytest.raises(Refused, match="adapterkit did not write"):
        adapterkit.stats(base(), data=texts, out=model, overwrite=True)
    assert model.read_bytes() == (base() / "model.safetensors").read_bytes()


def test_two_processes_at_one_output(base, texts, tmp_path) -> None:
    out, running = tmp_path / "s.safetensors", "another run writes this output now"
    with Stage(FolderOutput(out)), pytest.raises(Refused, match=running):
        adapterkit.stats(base(), data=texts, out=out)
    assert left(tmp_path) == []


def test_inputs_that_are_not_finite_leave_nothing(base, texts, tmp_path) -> None:
    from safetensors.torch import save_file

    broken = shutil.copytree(base(), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failed, match="not finite"):
        adapterkit.stats(broken, data=texts, out=tmp_path / "s.safetensors")
    assert "s.safetensors" not in left(tmp_path)


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_model_that_changes_is_noticed(when, base, texts, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(base(), tmp_path / "base")
    verb = importlib.import_module("adapterkit.verbs.stats.plan")
    collect = verb.collect

    def touch(*_: Any) -> None:
        os.utime(folder / "model.safetensors", ns=(1, 1))

    def touch_and_collect(*args: Any, **options: Any) -> Any:
        touch()
        return collect(*args, **options)

    if when == "before it is read":
        monkeypatch.setattr(verb, "collect", touch_and_collect)
    progress = touch if when == "while it is read" else lambda done: None
    with pytest.raises(Unrecoverable, match="changed between plan and end"):
        adapterkit.stats(folder, data=texts, out=tmp_path / "s.safetensors", progress=progress)
    assert left(tmp_path) == ["base"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_sample_is_cut_to_the_model_s_positions(name, base, tmp_path) -> None:
    """Which it has learned: it could not run on more."""
    data = tmp_path / "long.txt"
    data.write_text("a" * 70)
    adapterkit.stats(base(name), data=data, out=tmp_path / "s.safetensors", what="mean")
    assert metadata(tmp_path / "s.safetensors")["tokens"] == 64


@pytest.mark.parametrize("where", ["write", "publish"])
def test_a_disk_that_is_full_at_the_end(where, base, pairs, tmp_path, monkeypatch) -> None:
    """Nothing has the name, and a resumed run goes on."""
    out = tmp_path / "s.safetensors"
    adapterkit.stats(base(), data=pairs, out=tmp_path / "whole.safetensors")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = ShardFile.write

    def write_others(self: ShardFile, data: bytes, position: int) -> None:
        with storage_errors(self.path):
            fail() if self.final.name == out.name else write(self, data, position)

    with monkeypatch.context() as patch:
        if where == "publish":
            patch.setattr(system, "replace", fail)
        else:
            patch.setattr(ShardFile, "write", write_others)
        with pytest.raises(Failed, match="cannot write: No space") as caught:
            adapterkit.stats(base(), data=pairs, out=out)
    assert "--resume" in caught.value.hint
    assert left(tmp_path) == [".s.safetensors.adapterkit", *WHOLE]
    adapterkit.stats(base(), data=pairs, out=out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert left(tmp_path) == [*BOTH, *WHOLE]


def test_finished_sums_need_no_space_again(base, pairs, tmp_path, monkeypatch) -> None:
    out, job = tmp_path / "s.safetensors", {"data": pairs, "batch": 2, "seed": 1}
    with pytest.raises(Interrupted):
        adapterkit.stats(base(), out=out, progress=stop_after(4), **job)
    again = {**job, "dry_run": True, "resume": True}
    needed = adapterkit.stats(base(), out=out, **again).totals()["disk_needed"]
    monkeypatch.setattr(execute, "free_bytes", lambda path: needed + (1 << 20) - 1)
    adapterkit.stats(base(), out=out, resume=True, **job)
    with pytest.raises(Refused, match="bytes free"):
        adapterkit.stats(base(), out=tmp_path / "t.safetensors", **job)
