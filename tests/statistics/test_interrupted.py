"""A job that stops: its threads end, nothing of it waits on the disk but finished layers, and a
resumed one leaves those out."""

import threading

import pytest
import torch

from adapterkit.core.errors import Failed
from adapterkit.verbs.stats.sums import Sums
from tests.statistics.test_layerwise import texts
from tests.support.live import llama
from tests.support.stored import checkpoint, collect_sums, collected
from tests.support.usual import usual

WHAT = ("covariance", "mean", "gradient")


class Stopped(KeyboardInterrupt):
    """As the user's."""


def at_step(number, error):
    def progress(done, total):
        if done == number:
            raise error

    return progress


@pytest.fixture
def base(tmp_path):
    return checkpoint(llama(num_hidden_layers=4), tmp_path / "base")


# 3 batches through 1 embedding, 4 layers and 1 head, then back
@pytest.mark.parametrize("step", usual([1, 3, 7, 15, 17, 18, 20, 26, 29], {1, 7, 18, 29}))
def test_an_interrupted_collection_resumes_to_the_same_bits(
    tmp_path, large, base, step, monkeypatch
):
    """Wherever it stopped, the results are those of a run without a stop."""
    expected = collected(base, texts(), tmp_path, what=WHAT, memory=0)
    work = tmp_path / "work"
    before = threading.active_count()
    with pytest.raises(Stopped):
        collect_sums(base, texts(), work, what=WHAT, memory=0, progress=at_step(step, Stopped()))
    assert threading.active_count() == before
    assert {path.suffix for path in work.iterdir()} <= {".safetensors"}
    finished = len([*work.glob("*.sums.safetensors")])
    assert finished == min(max((step - 4) // 3, 0), 4)  # the third batch is a layer's last
    counted = []
    add = Sums.add
    monkeypatch.setattr(Sums, "add", lambda self, m, *a: (counted.append(m), add(self, m, *a))[1])
    resumed = collected(base, texts(), tmp_path, what=WHAT, memory=0)
    assert len({name.split(".")[2] for name in counted}) == 4 - finished
    assert resumed.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key


def test_a_shared_layer_is_not_counted_twice(tmp_path, large, monkeypatch):
    """ALBERT uses one layer several times: stopped between them, each use counts once."""
    from tests.statistics.test_layerwise import MODELS

    make, data, _ = MODELS["albert"]
    base = checkpoint(make(), tmp_path / "base")
    expected = collected(base, data(), tmp_path, what=WHAT, memory=0)
    for step in (4, 7, 10, 12):
        with pytest.raises(Stopped):
            stop = at_step(step, Stopped())
            collect_sums(base, data(), tmp_path / "work", what=WHAT, memory=0, progress=stop)
    resumed = collected(base, data(), tmp_path, what=WHAT, memory=0)
    for key, value in expected.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("whole", [True, False])
def test_inputs_that_are_not_finite(tmp_path, large, whole):
    """Named as soon as their layer is done; threads end; the data stays as it was."""
    model = llama(num_hidden_layers=3)
    with torch.no_grad():
        for layer in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            layer.weight.fill_(1e37)  # their product is infinite
    base, data = checkpoint(model, tmp_path / "base"), texts()
    before = threading.active_count()
    with pytest.raises(Failed, match=r"model.layers.(1.mlp.down_proj|2)"):
        collect_sums(base, data, tmp_path / "work", memory=0, whole=whole, what=("mean",))
    assert threading.active_count() == before
    for batch, other in zip(data, texts(), strict=True):
        assert all(torch.equal(batch[key], value) for key, value in other.items())
