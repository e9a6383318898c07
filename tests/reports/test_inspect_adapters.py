"""inspect of adapters that are not as they should be: each a problem, none a traceback."""

import itertools
import json
import math
import pickle
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Refused
from adapterkit.verbs.look import tables
from tests.support import oracle, raw_files
from tests.support.inspections import cut, edited, inspect, key, problems_of


def test_modules_that_were_not_trained(lora, tmp_path):
    one = edited(
        lora, tmp_path / "one", lambda t: t[key(t, "layers.1", "q_proj", "lora_B")].zero_()
    )
    modules = inspect(one)["modules"]
    idle = [m for m in modules if not m["trained"]]
    assert [m["module"] for m in idle] == ["model.layers.1.self_attn.q_proj"] and len(modules) == 14
    assert (idle[0]["norm"], idle[0]["effective_rank"]) == (0, 0) and problems_of(
        inspect(one)
    ) == []
    none = edited(
        lora, tmp_path / "none", lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]
    )
    assert problems_of(inspect(none)) == ["no module is trained: every b is zero"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_problem(value, lora, tmp_path):
    def spoil(tensors):
        tensors[key(tensors, "layers.0", "v_proj", "lora_A")][1, 2] = value

    result = inspect(edited(lora, tmp_path / "bad", spoil))
    assert problems_of(result) == ["1 values that are not finite (NaN or infinity)"]
    assert "layers.0.self_attn.v_proj.lora_A" in result["problems"][0]["where"]
    unknown = [m["module"] for m in result["modules"] if m["norm"] is None]
    assert unknown == ["model.layers.0.self_attn.v_proj"]


def test_other_values_that_are_not_finite(tmp_path):
    files = raw_files.everything_else()
    values = np.full((3, raw_files.WIDTH), np.nan, np.float32)
    files.tensors[f"{raw_files.PREFIX}score.weight"] = raw_files.Stored.of(values)
    files.folder().write(tmp_path / "bad")
    assert problems_of(inspect(tmp_path / "bad")) == [
        "values that are not finite (NaN or infinity)"
    ]


@pytest.mark.parametrize("size, norm", [(1e-100, 0.0), (1e-60, 1e-120), (1e200, None)])
def test_factors_at_the_ends_of_float64(size, norm, tmp_path):
    """A product, or a square, that leaves float64's range is no wrong number, and no exception."""
    a, b = np.zeros((4, 16)), np.zeros((16, 4))
    a[0, 0] = a[1, 1] = b[0, 0] = b[1, 1] = size * 1e-70 if norm == 0.0 else size
    name = f"{raw_files.PREFIX}model.layers.0.q_proj.lora_"
    tensors = {f"{name}A.weight": raw_files.Stored.of(a), f"{name}B.weight": raw_files.Stored.of(b)}
    raw_files.AdapterFiles(raw_files.adapter_config(lora_alpha=4), tensors).folder().write(
        tmp_path / "adapter"
    )
    result = inspect(tmp_path / "adapter")
    module = result["modules"][0]
    assert module["trained"] and module["effective_rank"] == pytest.approx(2)
    assert module["norm"] == (
        None if norm is None else pytest.approx(norm * math.sqrt(2), rel=1e-9, abs=0)
    )
    assert len(result["problems"]) == (norm is None)


REFUSED = {
    "kasa": (
        {"kasa_config": {"beta": 1}, "use_dora": False},
        "kasa_config is set: KaSA truncates the base",
        True,
    ),
    "unknown": ({"use_magic": True}, "unknown setting use_magic = True", True),
    "pissa": ({"init_lora_weights": "pizza"}, "init_lora_weights = 'pizza'", False),
    "rank": ({"r": 3}, "rank 4 in the file", False),
    "no-alpha": ({"lora_alpha": None}, "lora_alpha = None", False),
    "kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA'", False),
    "dora": ({"use_dora": True}, "use_dora, but none for", True),
    "pattern": ({"alpha_pattern": {"(": 2}}, "pattern '('", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inspect_lists_what_a_merge_refuses(name, lora, tmp_path):
    """The rest is still told: norms too, unless the scale is not known."""
    config, words, scaled = REFUSED[name]
    oracle.edit_config(lora, tmp_path / "odd", **config)
    result = inspect(tmp_path / "odd")
    assert any(text.startswith(words) for text in problems_of(result)), problems_of(result)
    assert len(result["modules"]) == 14 and all(
        m["trained"] and m["effective_rank"] > 1 for m in result["modules"]
    )
    assert all(
        (m["norm"] is not None) == (m["scale"] is not None) == scaled for m in result["modules"]
    )


def test_a_merge_and_an_inspection_use_the_same_words(lora, llama, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd", kasa_config={"beta": 1}, use_magic=True)
    with pytest.raises(Refused) as refusal:
        adapterkit.merge(llama, [odd], out=tmp_path / "out")
    assert problems_of(inspect(odd)) == [error.problem for error in refusal.value.errors]


def test_an_adapter_of_another_base(lora, tmp_path):
    """What a merge into that base would refuse is listed; the norms are there all the same."""
    oracle.save_base(oracle.llama(hidden_size=64), tmp_path / "wide")
    result = inspect(lora, base=tmp_path / "wide")
    assert len(result["problems"]) == 14 and all("shape" in text for text in problems_of(result))
    assert all(m["relative"] is None and m["norm"] > 0 for m in result["modules"])


def test_one_refusal_hides_no_other(lora, tmp_path):
    oracle.edit_config(lora, tmp_path / "odd", use_magic=True, use_dora=True)
    texts = problems_of(inspect(tmp_path / "odd"))
    assert (
        len(texts) == 2
        and texts[0].startswith("unknown setting use_magic")
        and texts[1].startswith("use_dora, but none for")
    )


JUNK = [
    None,
    True,
    0,
    -1,
    1.5,
    math.nan,
    math.inf,
    10**400,
    "x",
    "(",
    [],
    [1],
    ["a"],
    [None],
    [[1, 2]],
    {},
    {"a": "b"},
    {"(": 1},
    {"a": [1]},
]


def test_no_config_is_a_traceback(one_thread, tmp_path):
    """Every setting with every kind of wrong value, with factors of each kind beside it."""
    more = {
        "target_parameters",
        "trainable_token_indices",
        "layer_replication",
        "kasa_config",
        "revision",
    }
    for make, settings in (
        (raw_files.everything_else, {*raw_files.adapter_config(), *more}),
        (raw_files.token_rows, {"r", *more}),
    ):
        files = make()
        files.folder().write(tmp_path / make.__name__)
        for setting, value in itertools.product(sorted(settings), JUNK):
            config = json.dumps(files.config | {setting: value})
            (tmp_path / make.__name__ / "adapter_config.json").write_text(config)
            result = inspect(tmp_path / make.__name__)
            assert len(result["modules"]) == (2 if make is raw_files.everything_else else 1)
            tables.inspect_table(result)


DAMAGED_ADAPTERS = {
    "cut": (cut, "cut off"),
    "no-weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors",
    ),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "bad-config": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "list-config": (lambda f: (f / "adapter_config.json").write_text("[]"), "a JSON list"),
    "pickle": (
        lambda f: (f / "adapter_model.bin").write_bytes(pickle.dumps(1)),
        "pickles next to the adapter: adapter_model",
    ),
    "model": (
        lambda f: shutil.copy(f / "adapter_model.safetensors", f / "model.safetensors"),
        "other weights next to",
    ),
    "lfs": (
        lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.g"),
        "a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_ADAPTERS)
def test_a_damaged_adapter(name, lora, tmp_path):
    damage, words = DAMAGED_ADAPTERS[name]
    shutil.copytree(lora, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter")
    assert result["kind"] == "adapter" and any(words in text for text in problems_of(result)), (
        problems_of(result)
    )
    assert result["peft_type"] == (None if "config" in name else "LORA")
    assert len(result["modules"]) == (0 if name in ("cut", "no-weights", "lfs") else 14)


def test_the_name_of_a_local_copy_is_no_problem(llama, lora, tmp_path):
    oracle.edit_config(lora, tmp_path / "named", base_model_name_or_path="org/model")
    assert problems_of(inspect(tmp_path / "named", base=llama)) == []


@pytest.mark.parametrize("size", [1e60, 1e155, 1e160])
def test_norms_whose_squares_are_beyond_floats(size, tmp_path, monkeypatch):
    """Of deltas, and of a base's weights: sums of squares would overflow, norms do not."""
    monkeypatch.chdir(tmp_path)
    base = oracle.llama()
    oracle.save_base(base, tmp_path / "base", "fp32")
    oracle.train(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    for file, of in (("adapter/adapter_model", "lora_B"), ("base/model", "q_proj")):
        path = tmp_path / f"{file}.safetensors"
        tensors = {k: v.double() * (size if of in k else 1) for k, v in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    norms = [module["norm"] for module in adapterkit.inspect("adapter", base="base")["modules"]]
    assert all(size / 100 < norm < size * 100 for norm in norms)
    for words in (
        "merge base adapter --out merged",
        "inspect adapter",
        "inspect adapter --base base",
        "inspect base",
        "diagnose base",
        "diagnose merged --base base --adapter adapter",
        "report adapter --out page.html",
        "diff adapter adapter",
    ):
        result = CliRunner().invoke(main, words.split())
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        assert "nan" not in result.output and result.exit_code < 2, (words, result.output)
