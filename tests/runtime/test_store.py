"""Adapters of a folder that are loaded when they are asked for, and go when others are."""

import re
import shutil

import pytest
import torch

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.live import llama, tokens

NAMES = ["fr", "de", "org/es", "it"]


@pytest.fixture(autouse=True)
def inference(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    adapters = None
    for seed, name in enumerate([*NAMES, "resident"]):
        config = LoraConfig(2 + seed, 8, ["q_proj", "up_proj"][: 1 + seed % 2], init=False)
        if adapters is None:
            adapters = attach(llama(), config, name=name, seed=seed)
        else:
            adapters.attach(config, name=name, seed=seed)
        adapters.save(root / name, name=name)
    cached = root / "models--hub--one"
    shutil.copytree(root / "fr", cached / "snapshots" / "abc")
    shutil.copytree(root / "de", cached / "snapshots" / "aaa")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    shutil.move(root / "resident", root.parent / "resident")
    return root


@pytest.fixture
def adapters(folder):
    adapters = load(llama(), folder.parent / "resident", name="resident")
    adapters.activate(None)
    adapters.model.store = adapters.store(folder, max_loaded=2)
    return adapters


def logits(folder, name) -> torch.Tensor:
    return load(llama(), folder / name).model(tokens()).logits


def test_activate_loads_and_the_least_recently_used_goes(adapters, folder):
    for name, loaded in (
        ("fr", ["fr"]), ("de", ["fr", "de"]), ("fr", ["de", "fr"]), ("org/es", ["fr", "org/es"]),
        ("fr", ["org/es", "fr"]), ("it", ["fr", "it"]), ("resident", ["fr", "it"]),
    ):  # fmt: skip
        adapters.activate(name)
        assert adapters.model.store.loaded == loaded
        assert adapters.active == {name: 1.0}
        if name != "resident":
            torch.testing.assert_close(adapters.model(tokens()).logits, logits(folder, name))
    assert set(adapters.names) == {"resident", "fr", "it"}


def test_rows_load_their_adapters_on_demand(adapters, folder):
    adapters.activate("fr")
    adapters.activate(None)
    with adapters.rows(["de", "it"]):
        y = adapters.model(tokens()).logits
        assert adapters.model.store.loaded == ["de", "it"]
    for i, name in enumerate(("de", "it")):
        torch.testing.assert_close(y[i], logits(folder, name)[i])


def test_active_adapters_stay_loaded_during_rows(adapters, folder):
    adapters.activate("fr")
    for name in ("de", "it"):
        with adapters.rows([name, None]):
            assert adapters.model.store.loaded == ["fr", name]
    torch.testing.assert_close(adapters.model(tokens()).logits, logits(folder, "fr"))


def test_one_slot_is_enough_to_change(folder):
    adapters = load(llama(), folder.parent / "resident", name="resident")
    store = adapters.store(folder, max_loaded=1)
    for name in ("fr", "de"):
        adapters.activate(name)
        assert store.loaded == [name]


def test_the_hubs_layout(adapters, folder):
    adapters.activate("hub/one")
    assert torch.equal(adapters.model(tokens()).logits, logits(folder, "fr"))


def test_more_than_may_be_loaded(adapters):
    adapters.activate("fr")
    for names in (["fr", "de", "it"], {"fr": 1.0, "de": 1.0, "it": 0.5}):
        with pytest.raises(AdapterkitError, match="3 adapters of the store at once"):
            adapters.activate(names)
    message = "2 adapters of the store at once, and fr active or changed"
    with pytest.raises(AdapterkitError, match=message), adapters.rows(["de", "it"]):
        pass
    assert adapters.model.store.loaded == ["fr"] and adapters.active == {"fr": 1.0}


def test_changed_and_trainable_ones_stay(adapters):
    adapters.activate("fr")
    adapters.rescale(0.5, name="fr")
    adapters.activate("de")
    adapters.activate("it")
    assert adapters.model.store.loaded == ["fr", "it"]
    next(iter(adapters.state.adapters["it"].patches()))[1].a.add_(1)
    with pytest.raises(AdapterkitError, match="1 adapters of the store at once, and fr, it active"):
        adapters.activate("de")
    assert adapters.active == {"it": 1.0}


def test_names_outside_the_store_are_refused(adapters):
    for name in ("frr", "../store/fr", "", "/etc", "fr/", "org", "org/../fr"):
        with pytest.raises(AdapterkitError, match=f"no adapter {re.escape(name)}"):
            adapters.activate(name)
    with pytest.raises(AdapterkitError, match="did you mean 'fr'"), adapters.rows(["frr", None]):
        pass
    assert adapters.names == ["resident"]


def test_another_models_adapter_changes_nothing(adapters, folder, tmp_path):
    wrong = attach(llama(hidden_size=16), LoraConfig(2, 2, ["q_proj"]), name="wrong")
    wrong.save(tmp_path / "wrong")
    store = adapters.store(tmp_path, max_loaded=2)
    with pytest.raises(AdapterkitError, match="trained on another model"):
        adapters.activate("wrong")
    assert store.loaded == [] and adapters.names == ["resident"]


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_invalid_max_loaded_is_refused(adapters, folder, count):
    with pytest.raises(AdapterkitError, match="max_loaded"):
        adapters.store(folder, max_loaded=count)


def test_a_store_without_a_folder_is_refused(adapters, folder):
    with pytest.raises(AdapterkitError, match="no folder"):
        adapters.store(folder / "nothing", max_loaded=2)
