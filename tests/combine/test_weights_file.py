"""The file of weights: read, written, by hand, of an old version, and what is wrong with one."""

import json
from pathlib import Path

import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.inputs.weights_file import (
    NamedAdapter,
    WeightsFile,
    digests,
    named_adapter,
    read_weights,
    text,
    write_weights,
)

GOLDEN = Path(__file__).parent / "weights-1.json"  # as version 1 wrote it
TABLE = {"adapters": ["a", "b"], "default": [1, 0.5]}


def read_table(tmp_path: Path, table: object) -> WeightsFile:
    (tmp_path / "w.json").write_text(json.dumps(table))
    return read_weights(LocalFolder(tmp_path / "w.json"))


def test_version_1_is_read_and_written_as_it_was(tmp_path: Path):
    weights = read_weights(LocalFolder(GOLDEN))
    assert weights.weights_of(0, "model.layers.0.mlp.up_proj") == (0.30000000000000004, 2.0)
    assert weights.weights_of(1, "model.layers.0.mlp.down_proj") == 1e-12
    assert weights.weights_of(1, "elsewhere") == -0.5
    assert [one.name for one in weights.adapters] == ["./en", "org/fr@main"]
    write_weights(weights, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == GOLDEN.read_bytes()


def test_a_file_written_by_hand_gives_its_weights(tmp_path: Path):
    weights = read_table(tmp_path, TABLE)
    assert weights == WeightsFile((NamedAdapter("a"), NamedAdapter("b")), (1.0, 0.5))
    assert weights.weights_of(1, "anywhere") == 0.5
    read_table(tmp_path, json.loads(text(weights)))


def test_digests_hash_weights_and_config_only(tmp_path: Path):
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (tmp_path / name).write_text(name)
    its = digests(LocalFolder(tmp_path))
    assert list(its) == ["adapter_config.json", "adapter_model.safetensors"]
    assert its["adapter_config.json"] == sha256_of_file(tmp_path / "adapter_config.json")
    assert named_adapter("x", LocalFolder(tmp_path)) == NamedAdapter("x", its)


BAD = [
    ({"schema": 2}, "schema is 2"),
    ({"schema": 0}, "schema is 0"),
    ({"schema": "1"}, "schema = '1'"),
    ({"per": "block"}, "per = 'block'"),
    ({"adapters": []}, "adapters is empty"),
    ({"adapters": [{"files": {}}, "b"]}, "adapters[0].name is missing"),
    ({"adapters": [{"name": "a", "digest": ""}, "b"]}, "adapters[0].digest is unknown"),
    ({"adapters": "a"}, "adapters = 'a'"),
    ({"default": [1]}, "the length of default is 1"),
    ({"default": [1, float("nan")]}, "default[1] = nan"),
    ({"default": [1, True]}, "default[1] = True"),
    ({"default": [1, [1]]}, "default[1] = [1]"),
    ({"modules": {"m": [1]}}, "other numbers of weights: m has 1"),
    ({"modules": {"m": [1, float("inf")]}}, "modules.m[1] = inf"),
    ({"modules": {"m": [1, [2]]}}, "lists of weights, though per is module: m"),
    ({"modules": {"m": [1, [None]]}, "per": "direction"}, "modules.m[1][0] = None"),
    ({"modules": {"m": 1}}, "modules.m = 1"),
    ({"modules": {"m": [1, 2]}, "per": "adapter"}, "weights of modules, though per is adapter: m"),
    ({"weights": []}, "weights is unknown"),
    ({"fit": 1}, "fit = 1"),
    ({"base": "org/base"}, "base = 'org/base'"),
]


@pytest.mark.parametrize(("change", "problem"), BAD, ids=lambda value: str(value)[:30])
def test_each_invalid_entry_is_refused_with_its_problem(tmp_path: Path, change: dict, problem: str):
    with pytest.raises(AdapterkitError) as caught:
        read_table(tmp_path, TABLE | change)
    assert problem in str(caught.value)
    assert str(tmp_path / "w.json") in str(caught.value)


def test_all_invalid_entries_are_listed_together(tmp_path: Path):
    changes = [BAD[i] for i in (0, 3, 9, 12, 18)]
    table = TABLE | {name: value for change, _ in changes for name, value in change.items()}
    with pytest.raises(Refused) as caught:
        read_table(tmp_path, table)
    for _, problem in changes:
        assert problem in str(caught.value)


def test_only_good_ones_are_written(tmp_path: Path):
    for weights in (
        WeightsFile((NamedAdapter("a"),), (float("nan"),)),
        WeightsFile((NamedAdapter("a"),), (1.0, 2.0)),
        WeightsFile((NamedAdapter("a"),), (1.0,), {"m": ((1.0,),)}),
    ):
        with pytest.raises(Refused):
            write_weights(weights, tmp_path / "w.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refused, match="a folder with 0 files"):
        read_weights(LocalFolder(tmp_path))
