"""What is in memory while a model runs one layer at a time."""

import threading

import pytest
import torch

from adapterkit.verbs.stats.model import activations
from adapterkit.verbs.stats.model import layerwise_schedule as schedule
from adapterkit.verbs.stats.model.activations import Activations, ActivationStore, Copy
from adapterkit.verbs.stats.model.coroutines import Coroutine
from adapterkit.verbs.stats.model.stored_model import StoredModel
from tests.statistics.test_layerwise import texts
from tests.support.live import llama
from tests.support.stored import checkpoint, collect_sums, collected


class Gauge:
    """Bytes of parameters, and of activations of all batches, that are in memory together."""

    def __init__(self, monkeypatch):
        self.weights = self.peak = self.waiting = self.spilled = 0
        load, free, park = StoredModel.load, StoredModel.free, Activations.park
        passes = {}

        def loads(stored, names, device):
            names = list(names)
            self.weights += stored.nbytes(names)
            self.peak = max(self.peak, self.weights)
            load(stored, names, device)

        def frees(stored, names):
            names = list(names)
            self.weights -= stored.nbytes(names)
            free(stored, names)
            assert all(stored.model.get_parameter(name).is_meta for name in names)

        def parks(one):
            park(one)
            alive = [(known, storage) for known, storage in one._alive() if known.parks]
            passes[id(one)] = sum(storage.nbytes() for _, storage in alive)
            self.spilled = max(self.spilled, sum(known.nbytes for known, _ in alive))
            self.waiting = max(self.waiting, sum(passes.values()))

        monkeypatch.setattr(StoredModel, "load", loads)
        monkeypatch.setattr(StoredModel, "free", frees)
        monkeypatch.setattr(Activations, "park", parks)


@pytest.mark.parametrize("what", [("covariance",), ("covariance", "gradient")])
def test_memory_does_not_grow_with_the_model(tmp_path, large, monkeypatch, what):
    """Three depths: the largest part, and nothing of the batches that wait."""
    peaks = []
    for depth in (2, 5, 9):
        model = llama(num_hidden_layers=depth)
        layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
        base = checkpoint(model, tmp_path / f"base{depth}")
        with monkeypatch.context() as patch:
            gauge = Gauge(patch)
            collected(base, texts(), tmp_path, what=what, memory=0)
        assert gauge.weights == 0 and gauge.waiting == 0 < gauge.spilled
        norm = 4 * model.config.hidden_size
        assert gauge.peak == layer + norm  # outside the layers is one norm
        peaks.append(gauge.peak)
    assert len(set(peaks)) == 1


@pytest.mark.parametrize("memory", [0, 3000, 10**9])
def test_memory_is_what_may_wait(tmp_path, large, monkeypatch, memory):
    base = checkpoint(llama(num_hidden_layers=3), tmp_path / "base")
    gauge = Gauge(monkeypatch)
    collected(base, texts(), tmp_path, memory=memory)
    assert gauge.waiting <= memory
    assert (gauge.waiting > 0) == (memory > 0)


def test_memory_of_layers_is_freed(tmp_path, large, monkeypatch):
    """Of a file as long as it has to be: places are used again; nothing is taken in the end."""
    rooms = []
    init = ActivationStore.__init__
    monkeypatch.setattr(
        ActivationStore, "__init__", lambda self, *a: (rooms.append(self), init(self, *a))[1]
    )
    ends = []
    for depth in (3, 8):
        base = checkpoint(llama(num_hidden_layers=depth), tmp_path / f"base{depth}")
        collected(base, texts(), tmp_path, what=("mean",), memory=0)
        ends.append(rooms[-1]._end)
    assert ends[0] == ends[1] > 0
    collected(base, texts(), tmp_path, what=("mean", "gradient"), memory=20_000)
    assert rooms[-1].used == 0
    places = sum(size * len(free) for size, free in rooms[-1]._free.items())
    assert places == rooms[-1]._end


def test_a_batch_waits_with_its_views(tmp_path, large):
    store = ActivationStore(tmp_path, 0)
    waiting = Activations(store, 4, set())
    x = torch.randn(4, 6)
    view, value = x.T[2:], x.clone()
    table = torch.randn(1, 6)  # not of the batch: may be another's too
    waiting.track((x, {"table": table}))
    saved = waiting.save(view)
    waiting.park()
    assert x.untyped_storage().nbytes() == 0 and table.untyped_storage().nbytes() == 24
    waiting.restore()
    assert torch.equal(x, value) and torch.equal(view, value.T[2:])
    x.add_(1)
    waiting.park()
    waiting.restore()
    assert torch.equal(x, value + 1)
    assert isinstance(saved, activations.Saved) and torch.equal(saved.tensor(), value.T[2:])
    store.close()


def test_a_copy_in_memory_counts(tmp_path):
    store = ActivationStore(tmp_path, 100)
    storage = torch.arange(20, dtype=torch.float32).untyped_storage()
    first, second = Copy(store, storage), Copy(store, storage)
    assert (first.at, second.memory) == (None, None) and store.used == 80
    del first
    assert store.used == 0
    store.close()


def test_data_is_never_emptied(tmp_path, large):
    """Also of a job that stops while its batches wait."""
    data = texts()
    base = checkpoint(llama(), tmp_path / "base")

    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_sums(base, data, tmp_path / "work", memory=0, progress=progress)
    for batch, other in zip(data, texts(), strict=True):
        assert all(torch.equal(batch[key], value) for key, value in other.items())


def test_passes_take_turns():
    running, seen = [], []

    def run(name):
        def go():
            for number in range(3):
                running.append(name)
                assert len(running) == 1
                seen.append((name, number))
                running.remove(name)
                assert Coroutine.current().stop(number) == (name, number)

        return go

    passes = {name: Coroutine(run(name)) for name in "ab"}
    answers = dict.fromkeys("ab")
    for number in range(4):
        for name, one in passes.items():
            one.resume(answers[name])
            answers[name] = (name, number)
    assert seen == [(name, number) for number in range(3) for name in "ab"]
    assert all(one.is_done for one in passes.values())


def test_an_error_of_a_pass_is_raised_where_it_is_resumed():
    one = Coroutine(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.resume()
    assert one.is_done
    other = Coroutine(lambda: Coroutine.current().stop("more"))
    other.resume()
    before = threading.active_count()
    other.close()
    assert threading.active_count() == before - 1 and other.request is None


def test_threads_do_little(tmp_path, monkeypatch):
    """The units run in the caller's thread, and its number of threads is left as it was."""
    threads = set()
    computed = schedule.LayerwiseSchedule.computed
    monkeypatch.setattr(
        schedule.LayerwiseSchedule,
        "computed",
        lambda *a: (threads.add(threading.current_thread()), computed(*a))[1],
    )
    before = torch.get_num_threads()
    base = checkpoint(llama(), tmp_path / "base")
    collected(base, texts(), tmp_path, what=("mean", "gradient"))
    assert threads == {threading.current_thread()} and torch.get_num_threads() == before
