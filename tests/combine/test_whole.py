"""What is no product of factors in a combination: DoRA, whose delta depends on the base's weights,
and values trained whole."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Refused
from adapterkit.core.registry import members, options
from tests.support import oracle
from tests.support.combining import statistics_for
from tests.support.deltas import LAYERS, assert_close, deltas, net, trained, truncated
from tests.support.usual import usual

WEIGHTS = (1.0, 0.6, -0.5)
NEEDED = {"density": 0.6, "decay": 0.7, "beta": 0.7}
METHODS = {
    name: {k: v for k, v in NEEDED.items() if k in options(record)}
    for name, record in members("combinations").items()
}
BY_FACTORS = [name for name, record in members("combinations").items() if record.by_factors]
DRAWS = ("dare_linear", "dare_ties", "della")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    oracle.save_base(net(), folder, "fp32")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two DoRAs and a plain LoRA, of different ranks, scales and modules."""
    root = tmp_path_factory.mktemp("sources")
    first = trained(
        root / "d0",
        1,
        r=2,
        lora_alpha=3,
        use_dora=True,
        target_modules=["embed", "fit", "image", "line", "tall"],
    )
    second = trained(
        root / "d1",
        2,
        r=3,
        use_rslora=True,
        use_dora=True,
        target_modules=["embed", "fit", "image"],
    )
    return [first, second, trained(root / "plain", 3, r=4)]


@pytest.fixture(scope="module")
def plain(sources, base, tmp_path_factory) -> list[Path]:
    """The same adapters, of the same names, as plain LoRAs of full rank."""
    root = tmp_path_factory.mktemp("plain")
    for source in sources[:2]:
        adapterkit.resize(source, base=base, rank=99, out=root / source.name)
    return [*(root / source.name for source in sources[:2]), sources[2]]


def combined(sources, out, weights=WEIGHTS, **how) -> dict[str, Tensor]:
    named = [f"{source}={weight}" for source, weight in zip(sources, weights, strict=True)]
    how = statistics_for(how["method"], sources, out) | how
    metrics = adapterkit.combine(named, out=out, **how).data["parameters"]
    assert all(len(metrics[name].get("cosines", ())) in (0, 1, 3) for name in metrics)
    return deltas(out)


def changed_by(adapter: Path, base: Path) -> dict[str, Tensor]:
    """W' - W as PEFT merges it, as matrices (out, in)."""
    before, after = load_file(base / "model.safetensors"), oracle.peft_merged(net(), adapter)
    actual = {}
    for name in LAYERS:
        delta = (after[f"{name}.weight"].double() - before[f"{name}.weight"].double()).flatten(1)
        actual[name] = delta.T if name == "embed" else delta
    return actual


def test_linear_of_doras_equals_the_sum_of_peft_s_merges(sources, base, tmp_path):
    actual = combined(sources, tmp_path / "out", method="linear", rank=99, base=base)
    changes = [changed_by(source, base) for source in sources]
    expected = {
        name: sum(w * c[name] for w, c in zip(WEIGHTS, changes, strict=True)) for name in LAYERS
    }
    assert_close(actual, expected, 3e-6)
    metrics = json.loads((tmp_path / "out" / "adapterkit.json").read_text())["parameters"]
    for name in ("fit", "line"):
        flat = [change[name].flatten() for change in changes if bool(change[name].any())]
        cosines = [
            float(torch.cosine_similarity(x, y, dim=0)) for x, y in itertools.combinations(flat, 2)
        ]
        assert metrics[name]["cosines"] == pytest.approx(cosines, abs=1e-5)
    low = combined(sources, tmp_path / "low", method="svd", base=base)
    assert_close(low, {name: truncated(delta, 4) for name, delta in expected.items()}, 1e-5)
    adapterkit.verify(tmp_path / "out")


# each gets deltas, and none knows of what: test_combine has all methods
SOME = ("linear", "ties", "slerp", "karcher", "regmean", "iso_c", "tsv", "knots")


@pytest.mark.parametrize(
    "method",
    usual(
        [name for name in METHODS if name not in (*DRAWS, *BY_FACTORS)], lambda name: name in SOME
    ),
)
def test_methods_on_doras_equal_methods_on_loras_of_the_same_deltas(
    method, sources, plain, base, tmp_path
):
    weights = (1.0, 0.6, 0.5) if method in ("slerp", "karcher", "regmean", "regspan") else WEIGHTS
    pick = slice(2) if method == "slerp" else slice(3)
    how = METHODS[method]
    settings = {k: v for k, v in how.items() if k != "density"} or None
    how = {"method": method, "density": how.get("density"), "settings": settings, "rank": 99}
    ours = combined(sources[pick], tmp_path / "ours", weights[pick], base=base, **how)
    theirs = combined(plain[pick], tmp_path / "theirs", weights[pick], **how)
    # float32 deltas: a threshold or a sign may fall on the other side for an element in a thousand
    tolerance = 1e-3 if members("combinations")[method].acts_on == "elements" else 1e-5
    for name, delta in theirs.items():
        assert float((ours[name] - delta).norm()) <= tolerance * float(delta.norm()) + 1e-9, name


@pytest.mark.parametrize("method", BY_FACTORS)
def test_methods_that_need_factors_refuse_doras(method, sources, base, tmp_path):
    with pytest.raises(Refused, match="needs b and a"):
        combined(sources, tmp_path / "out", method=method, base=base, rank=9, **METHODS[method])


@pytest.mark.parametrize("method", ["linear", "ties", "iso_c"])
def test_a_plan_knows_ranks_that_do_not_depend_on_values(method, sources, tmp_path):
    """Of an adapter beside itself a stacked sum has twice its rank, what is decomposed has not."""
    same, how = [sources[2]] * 2, {"method": method, **METHODS[method]}
    plan = adapterkit.combine(same, out=tmp_path / "out", dry_run=True, **how)
    told = {task.name: task.planned_metrics for shard in plan.shards for task in shard.tasks}
    found = adapterkit.combine(same, out=tmp_path / "out", **how).data["parameters"]
    ranks = {name: {"rank": metrics["rank"]} for name, metrics in found.items()}
    assert told == (dict.fromkeys(ranks) if method == "iso_c" else ranks)
    assert (ranks["fit"]["rank"] < 8) == (method != "linear")


@pytest.mark.parametrize("method", DRAWS)
def test_random_methods_depend_on_the_seed_alone(method, sources, base, tmp_path):
    first, again, other = (
        combined(
            sources, tmp_path / f"{i}", method=method, density=0.6, base=base, seed=seed, rank=99
        )
        for i, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "how", [{"method": "linear"}, {"method": "cat"}, {"method": "linear", "space": "factors"}]
)
def test_a_dora_needs_a_rank(how, sources, base, tmp_path):
    with pytest.raises(Refused, match="full rank"):
        adapterkit.combine(sources[:2], out=tmp_path / "out", base=base, **how)
    assert not (tmp_path / "out").exists()


def test_doras_without_base_or_with_pissa_are_refused(sources, base, tmp_path):
    with pytest.raises(Refused, match="--base"):
        adapterkit.combine(sources, out=tmp_path / "out", method="svd")
    pissa = oracle.edit_config(sources[0], tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(Refused, match="changed its base"):
        adapterkit.combine([pissa, sources[1]], out=tmp_path / "out", method="svd", base=base)
    other = tmp_path / "other"
    oracle.save_base(oracle.llama(), other)
    with pytest.raises(Refused) as caught:
        adapterkit.combine(sources, out=tmp_path / "out", method="svd", base=other)
    actual = [error.problem for error in caught.value.errors]
    # every module of the DoRAs, each once
    assert len(set(actual)) == len(actual) == 5 and all("no matrix" in text for text in actual)
    note = adapterkit.combine(sources[2:] * 2, out=tmp_path / "plain", method="svd", base=base)
    assert "not needed" in " ".join(note.data["notes"])


def test_the_command_with_a_base(sources, base, tmp_path):
    argv = [
        "combine",
        *map(str, sources),
        "--base",
        str(base),
        "--method",
        "svd",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    adapterkit.verify(tmp_path / "out")


# -- values trained whole --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("heads")
    result = lambda i, **more: trained(root / f"h{i}", i, target_modules=["fit"], **more)
    return [
        result(1, modules_to_save=["narrow", "norm"]),
        result(2, modules_to_save=["narrow", "norm"]),
        result(3),
    ]


def value(folder: Path, key: str = "narrow.weight") -> Tensor:
    return load_file(folder / "adapter_model.safetensors")[f"base_model.model.{key}"].double()


@pytest.mark.parametrize(
    ("how", "weights", "shares"),
    [
        ({"method": "mean"}, (1, 1, 1), (0.5, 0.5)),
        ({"method": "mean"}, (3, 1, 5), (0.75, 0.25)),
        ({"method": "ema", "settings": {"decay": 0.7}}, (1, 1, 1), (0.7, 0.3)),
        ({"method": "linear"}, (0.3, 0.7, 0.2), (0.3, 0.7)),
        ({"method": "svd"}, (1.5, -0.5, 0.2), (1.5, -0.5)),
        ({"method": "linear", "weight_for": ["narrow|norm=0.5"]}, (1, 1, 1), (0.5, 0.5)),
    ],
    ids=str,
)
def test_trained_modules_are_averaged_if_shares_add_up_to_one(
    how, weights, shares, heads, tmp_path
):
    combined(heads, tmp_path / "out", weights, **how)
    for key in ("narrow.weight", "norm.weight"):
        expected = sum(
            share * value(head, key) for share, head in zip(shares, heads[:2], strict=True)
        )
        assert torch.equal(value(tmp_path / "out", key), expected.float().double())


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({"method": "linear"}, (1, 1, 1)),
        ({"method": "ties", "density": 0.5}, (0.5, 0.5, 1)),
        ({"method": "knots", "density": 0.5}, (0.5, 0.5, 0)),
    ],
    ids=str,
)
def test_trained_modules_without_shares_are_refused_with_a_fix(how, weights, heads, tmp_path):
    with pytest.raises(Refused, match="add up to 1") as caught:
        combined(heads, tmp_path / "out", weights, **how)
    assert (
        "narrow.weight" in str(caught.value)
        and "norm.weight" in str(caught.value)
        and "h1 (weight" in str(caught.value)
    )


def test_token_rows_are_averaged_if_they_are_the_same_rows(tmp_path):
    rows = {"h1": [1, 3], "h2": [1, 3], "h3": [1, 4]}
    result = [
        trained(
            tmp_path / name, i, target_modules=["fit"], trainable_token_indices={"embed": indices}
        )
        for i, (name, indices) in enumerate(rows.items())
    ]
    combined(result[:2], tmp_path / "out", (0.5, 0.5), method="linear")
    key = "embed.token_adapter.trainable_tokens_delta"
    assert torch.allclose(
        value(tmp_path / "out", key), (value(result[0], key) + value(result[1], key)) / 2, rtol=1e-6
    )
    with pytest.raises(Refused, match="the same rows"):
        combined(result[1:], tmp_path / "no", (0.5, 0.5), method="linear")
