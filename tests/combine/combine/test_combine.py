"""combine, file to file: against PEFT's `add_weighted_adapter` where PEFT is right, against float64
everywhere."""

import functools
import itertools
import json
import math
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core import registry
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.combining import WEIGHTS, combined, options_of, pairs_of
from tests.support.deltas import LAYERS, assert_close, deltas, trained, truncated, weighted
from tests.support.methods import METHODS, NOT_ITSELF
from tests.support.usual import usual

# -- the exact ones --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_is_the_weighted_sum(method, mixed, tmp_path):
    metrics = combined(mixed, tmp_path / "out", method=method)
    assert_close(deltas(tmp_path / "out"), weighted(mixed, WEIGHTS))
    # 4 + 3 factors of three rows
    assert metrics["fit"]["rank"] == 7 + 3 + 2 and metrics["narrow"]["rank"] == 3
    assert metrics["fit"]["energy"] == 1


def test_the_written_adapter_is_plain(mixed, tmp_path):
    combined(mixed, tmp_path / "out", method="linear")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["lora_alpha"] == config["r"]
        and not config["use_rslora"]
        and config["init_lora_weights"] is True
    )
    assert config["rank_pattern"] == config["alpha_pattern"] and all(
        key.startswith("^") for key in config["rank_pattern"]
    )
    assert all(
        t.dtype == torch.float32
        for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )
    adapterkit.verify(tmp_path / "out")


def whole_norm(deltas):
    return math.sqrt(sum(float(delta.norm()) ** 2 for delta in deltas.values()))


def test_the_strongest_is_the_strength_of_the_sum(mixed, tmp_path):
    """Over all modules, also with a module's own weight; what cancels is not made larger."""
    how = {"method": "linear", "settings": {"strength": "strongest"}}
    combined(mixed, tmp_path / "out", **how)
    plain, parts = (
        weighted(mixed, WEIGHTS),
        [weighted([s], [w]) for s, w in zip(mixed, WEIGHTS, strict=True)],
    )
    largest = max(map(whole_norm, parts))
    scale = largest / whole_norm(plain)
    assert 0.3 < scale < 0.999
    assert_close(deltas(tmp_path / "out"), {n: scale * d for n, d in plain.items()})
    assert whole_norm(deltas(tmp_path / "out")) == pytest.approx(largest)
    receipt = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    told = [one["weight"] for one in receipt["adapters"]]
    assert told == pytest.approx([scale * w for w in WEIGHTS])
    adapterkit.verify(tmp_path / "out")
    combined([mixed[0]] * 2, tmp_path / "less", (1.0, -0.9), **how)
    assert_close(deltas(tmp_path / "less"), weighted([mixed[0]], [0.1]))
    combined(mixed[:2], tmp_path / "own", (1.0, 1.0), weight_for=["fit=0"], **how)
    own = {n: 0 * d if n == "fit" else d for n, d in weighted(mixed[:2], (1.0, 1.0)).items()}
    parts = [{n: d for n, d in deltas(s).items() if n != "fit"} for s in mixed[:2]]
    scale = max(map(whole_norm, parts)) / whole_norm(own)
    assert_close(deltas(tmp_path / "own"), {n: scale * d for n, d in own.items()})


@pytest.mark.parametrize("how", [{"space": "factors"}, {"settings": {"strength": "weakest"}}])
def test_a_strength_that_is_none_is_refused(how, mixed, tmp_path):
    how = {"method": "linear", "settings": {"strength": "strongest"}} | how
    with pytest.raises(Refused, match="strength"):
        combined([mixed[0]] * 2, tmp_path / "out", (1.0, 1.0), **how)


def test_one_and_zero_give_the_first(mixed, tmp_path):
    combined(mixed[:2], tmp_path / "out", weights=(1, 0), method="linear")
    assert_close(deltas(tmp_path / "out"), deltas(mixed[0]))


def test_order_does_not_matter(mixed, tmp_path):
    combined(mixed, tmp_path / "one", method="linear")
    combined(mixed[::-1], tmp_path / "other", weights=WEIGHTS[::-1], method="linear")
    assert_close(deltas(tmp_path / "one"), deltas(tmp_path / "other"))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_gives_the_best_approximation(rank, mixed, tmp_path):
    metrics = combined(mixed, tmp_path / "out", method="linear", rank=rank)
    actual = deltas(tmp_path / "out")
    for name, delta in weighted(mixed, WEIGHTS).items():
        assert metrics[name]["rank"] == min(rank, *delta.shape, 7 if name == "tall" else 99)
        best = truncated(delta, rank)
        assert float((actual[name] - best).norm()) <= 1e-5 * float(delta.norm()), name
        assert math.isclose(
            metrics[name]["energy"], float(best.norm() / delta.norm()) ** 2, rel_tol=1e-5
        )
        assert math.isclose(metrics[name]["norm"], float(delta.norm()), rel_tol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_gives_the_smallest_rank_that_keeps_it(energy, mixed, tmp_path):
    metrics = combined(mixed, tmp_path / "out", method="linear", energy=energy)
    for name, delta in weighted(mixed, WEIGHTS).items():
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        assert metrics[name]["rank"] == int((shares < energy * (1 - 1e-12)).sum()) + 1
    assert_close(
        deltas(tmp_path / "out"),
        {n: truncated(d, metrics[n]["rank"]) for n, d in weighted(mixed, WEIGHTS).items()},
        1e-5,
    )


def test_cosines_are_those_of_the_deltas(mixed, tmp_path):
    metrics = combined(mixed, tmp_path / "out", method="linear")
    first, second, third = (deltas(source)["fit"].flatten() for source in mixed)
    pairs = [(first, second), (first, third), (second, third)]
    expected = [float(torch.cosine_similarity(x, y, dim=0)) for x, y in pairs]
    assert metrics["fit"]["cosines"] == pytest.approx(expected, abs=1e-5)


def test_bfloat16_factors_on_request(mixed, tmp_path):
    combined(mixed, tmp_path / "out", method="linear", dtype="bf16")
    assert {
        t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    } == {torch.bfloat16}
    assert_close(deltas(tmp_path / "out"), weighted(mixed, WEIGHTS), 1e-2)


@pytest.mark.parametrize("method", sorted(set(METHODS) - NOT_ITSELF))
def test_weights_one_and_zero_give_the_first_adapter(method, mixed, tmp_path):
    """The law of every method but those that change the strengths of even one; also for modules
    that one of them lacks."""
    options = options_of(method) | ({"density": 1.0} if "density" in options_of(method) else {})
    if method == "sce":
        options["settings"] = {"select": 1.0}
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        combined(mixed[:2], tmp_path / f"{number}", weights, method=method, energy=1.0, **options)
        actual, alone = deltas(tmp_path / f"{number}"), deltas(mixed[number])
        for name, delta in actual.items():
            expected = alone.get(name, torch.zeros_like(delta))
            assert float((delta - expected).norm()) <= 2e-6 * float(expected.norm()) + 1e-7, name


def test_slerp_notes_t_once(mixed, tmp_path):
    combined(mixed[:2], tmp_path / "t", (1.0, 1.0), method="slerp", settings={"t": 0.3})
    combined(mixed[:2], tmp_path / "w", (0.7, 0.3), method="slerp")
    assert_close(deltas(tmp_path / "t"), deltas(tmp_path / "w"))
    with pytest.raises(Refused, match="both are the position"):
        combined(mixed[:2], tmp_path / "no", (0.7, 0.3), method="slerp", settings={"t": 0.3})
    with pytest.raises(Refused, match="--weight-for"):
        combined(
            mixed[:2],
            tmp_path / "no",
            (1.0, 1.0),
            method="slerp",
            settings={"t": 0.3},
            weight_for=["1:fit=0.5"],
        )


def sources_of(method, mixed):
    """Two adapters for the methods that take two, with their weights."""
    pairs = method in ("slerp", "karcher", "regmean", "regspan")
    return (mixed[:2], (1.0, 0.6)) if pairs else (mixed, WEIGHTS)


@pytest.fixture(scope="module")
def at_full_rank(mixed, tmp_path_factory):
    """The deltas that a method gives, computed once."""

    @functools.cache
    def whole(method):
        out = tmp_path_factory.mktemp("whole") / "out"
        sources, weights = sources_of(method, mixed)
        combined(sources, out, weights, method=method, energy=1.0, **options_of(method))
        return deltas(out)

    return whole


@pytest.mark.parametrize(
    ("method", "refit"),
    # what chooses the rank knows no method
    usual(
        itertools.product(registry.members("combinations"), [{}, {"rank": 2}, {"energy": 0.8}]),
        lambda row: not row[1] or row[0] in ("linear", "ties"),
    ),
    ids=str,
)
def test_every_method_and_refit(method, refit, mixed, at_full_rank, tmp_path):
    """The refit is the best approximation of what the method gives at full rank, and the bytes are
    the same every time."""
    sources, weights = sources_of(method, mixed)
    options = options_of(method)
    metrics = combined(sources, tmp_path / "out", weights, method=method, **refit, **options)
    whole, actual = at_full_rank(method), deltas(tmp_path / "out")
    for name, delta in whole.items():
        best = truncated(delta, metrics[name]["rank"])
        if "output_error" in metrics[name]:  # the best in another norm: see test_lossy
            plain = metrics[name]["unweighted_output_error"]
            assert metrics[name]["output_error"] <= plain + 1e-6
            continue
        lost, least = (
            float((actual[name] - delta).norm()),
            float((best - delta).norm()),
        )  # best is one of several where values are equal
        assert lost <= least + 5e-5 * float(delta.norm()) + 1e-9, name
        if "rank" in refit:
            assert metrics[name]["rank"] <= 2
        if "energy" in refit:
            assert float(best.norm() ** 2) >= (0.8 - 1e-5) * float(delta.norm() ** 2)
    if refit:
        return
    combined(sources, tmp_path / "again", weights, method=method, **options)
    files = [
        (tmp_path / folder / "adapter_model.safetensors").read_bytes()
        for folder in ("out", "again")
    ]
    assert files[0] == files[1]


def test_a_seed_decides_what_is_drawn(three, tmp_path):
    for seed in (1, 1, 2):
        folder = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        combined(three, folder, method="dare_linear", density=0.5, seed=seed)
    one, same, other = (
        (tmp_path / f"s{i}" / "adapter_model.safetensors").read_bytes() for i in range(3)
    )
    assert one == same != other


def test_dare_keeps_the_mean(three, tmp_path):
    """Over many seeds the average is the linear combination."""
    total: dict = {}
    for seed in range(40):
        combined(
            three, tmp_path / str(seed), method="dare_linear", density=0.5, seed=seed, energy=1.0
        )
        for name, delta in pairs_of(
            load_file(tmp_path / str(seed) / "adapter_model.safetensors")
        ).items():
            total[name] = total.get(name, 0) + delta / 40
    for name, delta in weighted(three, WEIGHTS).items():
        assert float((total[name] - delta).norm()) < 0.6 * float(delta.norm()), name


# -- refusals --------------------------------------------------------------------------------------


def test_nonlinear_adapters_are_refused_together(tmp_path):
    dora = trained(tmp_path / "dora", 1, target_modules=["fit"], use_dora=True)
    pissa = oracle.edit_config(
        trained(tmp_path / "p", 2, target_modules=["fit"]),
        tmp_path / "pissa",
        init_lora_weights="pissa",
    )
    with pytest.raises(Refused) as caught:
        combined([dora, pissa], tmp_path / "out", (1.0, 1.0), method="linear")
    assert (
        "DoRA" in str(caught.value)
        and "pissa" in str(caught.value)
        and "rebase" in str(caught.value)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unheard"},
        {"method": "ties"},
        {"method": "ties", "density": 1.5},
        {"method": "linear", "density": 0.5},
        {"method": "linear", "space": "elsewhere"},
        {"method": "linear", "rank": 0},
        {"method": "linear", "energy": 1.5},
        {"method": "linear", "rank": 2, "energy": 0.5},
        {"method": "svd", "space": "factors"},
        {"method": "knots", "space": "factors", "density": 0.5},
        {"method": "linear", "space": "factors", "rank": 2},
        {"method": "linear", "svd_clamp": 2.0},
        {"method": "linear", "dtype": "int8"},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, three, tmp_path):
    with pytest.raises(Refused):
        combined(three, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shapes_and_ranks_that_differ_are_refused(mixed, tmp_path):
    with pytest.raises(Refused, match="ranks") as caught:
        combined(mixed[:2], tmp_path / "out", (1.0, 1.0), method="linear", space="factors")
    named = " ".join(error.problem for error in caught.value.errors)
    assert "fit" in named and "narrow" in named
    tensors = load_file(mixed[0] / "adapter_model.safetensors")
    wide = oracle.edit_config(mixed[0], tmp_path / "wide")
    key = "base_model.model.fit.lora_A.weight"
    save_file(tensors | {key: torch.randn(7, 20)}, wide / "adapter_model.safetensors")
    with pytest.raises(Refused, match="one shape"):
        combined([mixed[0], wide], tmp_path / "out", (1.0, 1.0), method="linear")


def test_one_adapter_is_not_a_combination(three, tmp_path):
    with pytest.raises(Refused, match="two or more"):
        combined(three[:1], tmp_path / "out", (1.0,), method="linear")


def test_values_that_overflow_are_an_error(three, tmp_path):
    with pytest.raises(adapterkit.core.errors.AdapterkitError, match="finite"):
        combined(three, tmp_path / "out", (1e12, 1e12, 1.0), method="linear", dtype="fp16")
    assert not (tmp_path / "out").exists()


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_plans_and_resumes(three, tmp_path):
    argv = [
        "combine",
        *map(str, three),
        "--method",
        "ties",
        "--density",
        "0.5",
        "--out",
        str(tmp_path / "out"),
    ]
    planned = CliRunner().invoke(main, [*argv, "--dry-run", "--json"])
    plan = json.loads(planned.stdout)
    assert (
        planned.exit_code == 0
        and len(plan["computed"]) == len(LAYERS)
        and not (tmp_path / "out").exists()
    )
    done = CliRunner().invoke(main, [*argv, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["parameters"]["fit"]["conflict"] > 0
    again = CliRunner().invoke(main, [*argv, "--resume"])
    assert again.exit_code == 0 and "nothing to do" in again.stderr
    unknown = CliRunner().invoke(
        main, ["combine", str(three[0]), "--method", "linear", "--set", "x", "--out", "y"]
    )
    assert unknown.exit_code == 2


def test_the_help_names_every_method_and_alias():
    text = CliRunner().invoke(main, ["combine", "--help"]).output
    from adapterkit.verbs.combine.methods import ALIASES

    for name in (*registry.members("combinations"), *ALIASES):
        assert re.search(rf"\b{name}\b", text), name
