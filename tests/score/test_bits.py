"""The numbers of a sample are the same bits whatever else is measured: other samples, models, the
reference, the memory, an interruption. (Not for any number of threads: products of torch differ
by it.)"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.verbs.score import run
from adapterkit.verbs.stats.model import layers as units
from tests.score.test_losses import model_of
from tests.support import oracle
from tests.support.scoring import in_jsonl, measured, random_rows
from tests.support.texts import write_rows
from tests.support.usual import usual

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = random_rows(7)
KINDS = usual(["llama", "qwen3_moe", "t5", "mamba", "deepseek_v3", "gemma3"],
              ("llama", "qwen3_moe", "t5", "deepseek_v3"))  # fmt: skip


@pytest.fixture
def folders(cached_folder):
    """A model by its kind, and another one that differs in late weights."""

    def make(kind):
        def build(folder):
            model = model_of(kind)
            with oracle.quiet():
                model.save_pretrained(folder / "one")
                with torch.no_grad():
                    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
                    for weight in lists[-1][-1].parameters():
                        weight.mul_(1.5)
                model.save_pretrained(folder / "two")

        folder = cached_folder(f"score-bits-{kind}", build)
        return folder / "one", folder / "two"

    return make


def data_of(kind, tmp_path, rows=None, name="data"):
    rows = random_rows(7, decoder=kind == "t5") if rows is None else rows
    return write_rows(tmp_path / f"{name}.jsonl", *in_jsonl(rows))


def alone(folder, rows, tmp_path, **options):
    """Each sample in a run of its own."""
    tables = []
    for number, row in enumerate(rows):
        data = write_rows(tmp_path / f"{number}.jsonl", *in_jsonl([row]))
        tables.extend(measured(folder, data=data, **options).values())
    return torch.cat(tables)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_same_bits_alone_and_among_others(kind, folders, large, tmp_path):
    one, _ = folders(kind)
    rows = random_rows(7, decoder=kind == "t5")
    expected = alone(one, rows, tmp_path)
    (actual,) = measured(one, data=data_of(kind, tmp_path, rows)).values()
    assert torch.equal(actual, expected)
    (turned,) = measured(one, data=data_of(kind, tmp_path, rows[::-1], "turned")).values()
    assert torch.equal(turned.flip(0), expected)


def test_drawing_fewer_samples_leaves_the_bits_of_each(folders, tmp_path):
    one, _ = folders("llama")
    data = data_of("llama", tmp_path)
    (every,) = measured(one, data=data).values()
    for seed in range(3):
        (some,) = measured(one, data=data, samples=4, seed=seed).values()
        assert len(some) == 4
        assert all(any(torch.equal(row, other) for other in every) for row in some)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_same_bits_alone_and_with_others(kind, folders, large, tmp_path):
    """Also if the models share their first layers, and with any reference."""
    one, two = folders(kind)
    data = data_of(kind, tmp_path)
    singles = [next(iter(measured(path, data=data).values())) for path in (one, two)]
    assert not torch.equal(*singles)
    for order in ((one, two), (two, one)):
        both = measured(*order, data=data)
        for path, table in zip((one, two), singles, strict=True):
            assert torch.equal(both[str(path)], table)
    for reference in (one, two):
        both = measured(one, two, data=data, against=reference)
        for path, table in zip((one, two), singles, strict=True):
            assert torch.equal(both[str(path)][:, :2], table[:, :2])
        assert torch.count_nonzero(both[str(reference)][:, 2]) == 0
        other = both[str(two if reference == one else one)]
        assert bool((other[:, 2] > 0).all())


def test_buffers_that_differ_are_not_shared(folders, large, tmp_path):
    """The bias of DeepSeek's router is a buffer."""
    one, _ = folders("deepseek_v3")
    data = data_of("deepseek_v3", tmp_path)
    state = load_file(one / "model.safetensors")
    (key,) = (key for key in state if key.endswith("e_score_correction_bias"))
    state[key] = torch.tensor([4.0, 0.0, 0.0, 0.0])
    other = tmp_path / "other"
    other.mkdir()
    save_file(state, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((one / "config.json").read_bytes())
    (expected,) = measured(other, data=data).values()
    both = measured(one, other, data=data)
    assert torch.equal(both[str(other)], expected)
    assert not torch.equal(both[str(one)], expected)


def test_models_of_other_settings_are_not_shared(folders, large, tmp_path):
    one, _ = folders("llama")
    data = data_of("llama", tmp_path)
    other = oracle.edit_config(one, tmp_path / "other", rms_norm_eps=0.1)
    (expected,) = measured(other, data=data).values()
    both = measured(one, other, data=data)
    assert torch.equal(both[str(other)], expected)
    assert not torch.equal(both[str(one)], expected)


def test_adapters_leave_the_bits_of_the_model_and_of_each_other(folders, large, tmp_path):
    one, _ = folders("llama")
    data = data_of("llama", tmp_path)
    (plain,) = measured(one, data=data).values()
    adapters = []
    for seed, layers in enumerate(([0], [1])):
        model = model_of("llama")
        adapters.append(tmp_path / f"adapter{seed}")
        how = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": layers}
        oracle.train(model, adapters[-1], seed=seed, **how)
    first, live = measured(one, data=data, adapters=adapters[:1]).values()
    assert torch.equal(first, plain) and not torch.equal(live, plain)
    _, both = measured(one, data=data, adapters=adapters).values()
    assert not torch.equal(both, live)
    (zero,) = [measured(one, data=data, adapters=[f"{adapters[0]}=0"])[f"{one} + adapter0"]]
    assert torch.equal(zero, plain)


@pytest.mark.parametrize("memory", ["1", "20000", "1GB"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_any_memory_gives_the_same_bits(kind, memory, folders, large, tmp_path):
    one, two = folders(kind)
    data = data_of(kind, tmp_path)
    expected = measured(one, two, data=data, against=two)
    actual = measured(one, two, data=data, against=two, memory=memory)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_any_number_of_samples_that_run_together_gives_the_same_bits(
    folders, large, tmp_path, monkeypatch
):
    one, two = folders("llama")
    data = data_of("llama", tmp_path)
    expected = measured(one, two, data=data, against=two)
    (name,) = (name for name in ("ROUND", "TOGETHER") if hasattr(run, name))
    for count in (1, 2, 5):
        monkeypatch.setattr(run, name, count)
        actual = measured(one, two, data=data, against=two)
        assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_without_layers_runs_whole_and_has_the_same_numbers(
    kind, folders, large, tmp_path, monkeypatch
):
    one, two = folders(kind)
    data = data_of(kind, tmp_path)
    expected = measured(one, two, data=data, against=two)
    monkeypatch.setattr(units, "_elements", lambda model: iter(()))
    actual = measured(one, two, data=data, against=two)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6)


# -- interruptions ---------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """As the user's."""


def without(document):
    return {key: value for key, value in document.items() if key != "notes"}


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 0.99])
def test_a_resumed_run_gives_the_document_of_one_that_was_not_stopped(share, folders, tmp_path):
    one, two = folders("llama")
    given = {"data": data_of("llama", tmp_path), "against": one}
    expected = adapterkit.score([one, two], **given, out=tmp_path / "whole.json")

    def stop(done, total=0):
        stop.done += done
        if stop.total and stop.done >= share * stop.total:
            raise Stopped

    stop.done = stop.total = 0
    stop.expect = lambda total: setattr(stop, "total", total)
    out = tmp_path / "scores.json"
    with pytest.raises(Stopped):
        adapterkit.score([one, two], **given, out=out, progress=stop)
    assert not out.exists()
    resumed = adapterkit.score([one, two], **given, out=out, resume=True)
    assert resumed == expected == json.loads(out.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {
        "data.jsonl", "whole.json", "scores.json",
    }  # fmt: skip


def test_a_killed_run_is_resumed_to_the_same_document(folders, tmp_path):
    one, two = folders("llama")
    data, out = data_of("llama", tmp_path), tmp_path / "scores.json"
    expected = adapterkit.score([one, two], data=data)
    code = (
        "import os, signal, sys, adapterkit\n"
        "from adapterkit.verbs.score import results\n"
        "seen, own = [], results.SampleSums.__call__\n"
        "def call(*given):\n"
        "    seen.append(given)\n"
        "    if len(seen) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return own(*given)\n"
        "results.SampleSums.__call__ = call\n"
        "adapterkit.score(sys.argv[1:3], data=sys.argv[3], out=sys.argv[4])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, one, two, data, out],
        env=os.environ | {"PYTHONPATH": str(Path(adapterkit.__file__).parents[1])},
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    assert adapterkit.score([one, two], data=data, out=out, resume=True) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "scores.json"}


def test_what_was_kept_of_other_models_data_or_options_is_not_used(folders, tmp_path):
    """After an interruption, each of them is measured again."""
    one, two = folders("llama")
    data, out = data_of("llama", tmp_path), tmp_path / "scores.json"
    other = data_of("llama", tmp_path, random_rows(9)[2:], "other")

    def interrupted(models, **given):
        def stop(done):
            stop.done += done
            if stop.done == stop.total:
                raise Stopped

        stop.done, stop.total = 0, -1
        stop.expect = lambda total: setattr(stop, "total", total)
        with pytest.raises(Stopped):
            adapterkit.score(models, **given, out=out, progress=stop)

    for models, more in (
        ([two], {"data": data}),
        ([one], {"data": other}),
        ([one], {"data": data, "dtype": "bf16"}),
        ([one], {"data": data, "length": 4}),
    ):
        expected = adapterkit.score(models, **more)
        interrupted([one], data=data)
        assert adapterkit.score(models, **more, out=out, resume=True) == expected
        out.unlink()
    changed = oracle.edit_config(one, tmp_path / "changed", rms_norm_eps=0.1)
    expected = adapterkit.score([changed], data=data)
    (changed / "config.json").write_bytes((one / "config.json").read_bytes())
    interrupted([changed], data=data)
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(
        json.dumps(oracle.read_config(one) | {"rms_norm_eps": 0.1})
    )
    assert adapterkit.score([changed], data=data, out=out, resume=True) == expected
