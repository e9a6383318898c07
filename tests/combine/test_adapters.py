"""subtract, arrow, rebase and resize, file to file: against PEFT where PEFT is right, against
float64 everywhere."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.deltas import assert_close, deltas, trained, truncated, weighted

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    """Ranks, scales, patterns and modules that differ."""
    root = tmp_path_factory.mktemp("mixed")
    first = trained(
        root / "a0",
        1,
        r=4,
        lora_alpha=6,
        rank_pattern={"fit": 7},
        alpha_pattern={"fit": 3, "narrow": 1.5},
    )
    second = trained(root / "a1", 2, r=3, lora_alpha=5, use_rslora=True)
    third = trained(root / "a2", 3, r=2, lora_alpha=4, target_modules=["fit", "image", "embed"])
    return [first, second, third]


@pytest.fixture(scope="module")
def alike(tmp_path_factory) -> list[Path]:
    """Four adapters of one rank on linear layers alone; alphas differ."""
    root = tmp_path_factory.mktemp("alike")
    return [
        trained(root / f"e{i}", i, r=4, lora_alpha=4 + i, target_modules=["fit", "narrow"])
        for i in range(4)
    ]


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# -- subtract --------------------------------------------------------------------------------------


def test_subtract_is_the_exact_difference(mixed, tmp_path):
    """A module that one general adapter lacks counts as zero in the mean over both."""
    adapterkit.subtract([mixed[0]], general=mixed[1:], out=tmp_path / "out")
    assert_close(deltas(tmp_path / "out"), weighted(mixed, (1, -0.5, -0.5)))
    adapterkit.verify(tmp_path / "out")


def test_subtract_refits_on_request(mixed, tmp_path):
    receipt = adapterkit.subtract([mixed[0]], general=mixed[1:], out=tmp_path / "out", rank=2)
    best = {name: truncated(delta, 2) for name, delta in weighted(mixed, (1, -0.5, -0.5)).items()}
    assert_close(deltas(tmp_path / "out"), best, 1e-5)
    assert all(metric["rank"] == 2 for metric in receipt.data["parameters"].values())


def test_several_tasks_get_a_folder_each(mixed, tmp_path):
    adapterkit.subtract(mixed[:2], general=[mixed[2]], out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a0", "a1", "adapterkit.json"]
    for i in (0, 1):
        assert_close(deltas(tmp_path / "out" / f"a{i}"), weighted([mixed[i], mixed[2]], (1, -1)))
    adapterkit.verify(tmp_path / "out")
    twin = oracle.edit_config(mixed[1], tmp_path / "twin" / "a0")
    with pytest.raises(Refused, match="called a0"):
        adapterkit.subtract([mixed[0], twin], general=[mixed[2]], out=tmp_path / "no")


def test_subtraction_of_factors_is_pefts(alike, tmp_path):
    """PEFT's GenKnowSub: a minus the mean a, b minus the mean b; the task's scale stays."""
    adapterkit.subtract([alike[0]], general=alike[1:3], out=tmp_path / "out", space="factors")
    task, *general = (load_file(folder / WEIGHTS) for folder in alike[:3])
    actual = load_file(tmp_path / "out" / WEIGHTS)
    for key, tensor in task.items():
        expected = tensor - (general[0][key] + general[1][key]) / 2
        assert torch.allclose(
            actual[key],
            expected * (1.0 if "lora_A" in key else config_of(alike[0])["lora_alpha"] / 4),
            atol=1e-7,
        )


def test_a_subtraction_keeps_the_tasks_trained_values_and_refuses_the_generals(alike, tmp_path):
    headed = trained(tmp_path / "headed", 5, target_modules=["fit"], modules_to_save=["norm"])
    adapterkit.subtract([headed], general=[alike[1]], out=tmp_path / "out")
    key = "base_model.model.norm.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[key], load_file(headed / WEIGHTS)[key])
    with pytest.raises(Refused, match=r'(?s)fully trained.*--exclude "norm"'):
        adapterkit.subtract([alike[0]], general=[headed], out=tmp_path / "no")
    adapterkit.subtract([alike[0]], general=[headed], out=tmp_path / "without", exclude="norm")
    part = deltas(alike[0])["fit"] - deltas(headed)["fit"]
    torch.testing.assert_close(deltas(tmp_path / "without")["fit"], part, rtol=1e-5, atol=1e-6)
    assert key not in load_file(tmp_path / "without" / WEIGHTS)
    for space in ("delta", "factors"):  # a module that the option names stays as the task has it
        adapterkit.subtract(
            [alike[0]], general=[alike[1]], out=tmp_path / space, exclude="fit", space=space
        )
        torch.testing.assert_close(
            deltas(tmp_path / space)["fit"], deltas(alike[0])["fit"], rtol=1e-5, atol=1e-6
        )
    with pytest.raises(Refused, match="ranks"):
        adapterkit.subtract(
            [trained(tmp_path / "r2", 6, r=2, target_modules=["fit"])],
            general=[alike[0]],
            out=tmp_path / "no",
            space="factors",
        )


# -- arrow -----------------------------------------------------------------------------------------


def assert_parallel(actual: torch.Tensor, unit: torch.Tensor) -> None:
    assert abs(float(actual.norm()) - 1) < 1e-6
    assert float((actual.double() - unit * (actual.double() @ unit)).norm()) < 1e-6


def experts_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / "arrow.safetensors"), json.loads((folder / "arrow.json").read_text())


def test_arrow_stacks_experts_with_exact_prototypes(alike, tmp_path):
    receipt = adapterkit.arrow(alike, out=tmp_path / "out")
    tensors, config = experts_of(tmp_path / "out")
    assert (
        config["top_k"] == 3
        and config["experts"] == ["e0", "e1", "e2", "e3"]
        and config["arrow"] == 1
    )
    for module in ("fit", "narrow"):
        a, b, scale, prototype = (
            tensors[f"{module}.{x}"] for x in ("a", "b", "scale", "prototype")
        )
        for i, folder in enumerate(alike):
            delta = deltas(folder)[module]
            assert (
                float((scale[i] * b[i].double() @ a[i].double() - delta).norm() / delta.norm())
                < 1e-6
            )
            _, s, vh = torch.linalg.svd(delta)
            assert_parallel(prototype[i], vh[0])
            assert (
                prototype.dtype == torch.float32 and prototype[i][prototype[i].abs().argmax()] > 0
            )
            gap = receipt.data["parameters"][module]["gap"][i]
            assert gap == pytest.approx(float(1 - s[1] / s[0]), abs=1e-3)
    adapterkit.verify(tmp_path / "out")


def test_arrow_takes_ranks_modules_and_untrained_experts_that_differ(alike, tmp_path):
    small = trained(tmp_path / "small", 7, r=2, lora_alpha=3, target_modules=["fit"])
    blank = oracle.edit_config(alike[0], tmp_path / "blank")
    tensors = load_file(blank / WEIGHTS)
    save_file(
        {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()},
        blank / WEIGHTS,
    )
    receipt = adapterkit.arrow(
        [alike[0], small, blank], out=tmp_path / "out", top_k=1, temperature=0.5
    )
    tensors, config = experts_of(tmp_path / "out")
    assert (config["top_k"], config["temperature"]) == (1, 0.5)
    assert (
        tensors["fit.a"].shape == (3, 4, 16)
        and not tensors["fit.a"][1, 2:].any()
        and "fit.expert" not in tensors
    )
    assert tensors["narrow.expert"].tolist() == [0, 2] and tensors["narrow.scale"].shape == (2,)
    assert (
        not tensors["fit.prototype"][2].any() and receipt.data["parameters"]["fit"]["gap"][2] == 0
    )
    assert any("not in all experts" in note for note in receipt.data["notes"])


def test_arrow_subtracts_general_adapters_exactly(alike, tmp_path):
    adapterkit.arrow(alike[:2], general=alike[2:], out=tmp_path / "out")
    tensors, config = experts_of(tmp_path / "out")
    assert config["general"] == ["e2", "e3"]
    for i in (0, 1):
        expected = weighted([alike[i], *alike[2:]], (1, -0.5, -0.5))["fit"]
        actual = (
            tensors["fit.scale"][i] * tensors["fit.b"][i].double() @ tensors["fit.a"][i].double()
        )
        assert float((actual - expected).norm() / expected.norm()) < 1e-6
        vh = torch.linalg.svd(expected).Vh
        assert_parallel(tensors["fit.prototype"][i], vh[0])


@pytest.mark.parametrize("general", [False, True])
def test_compat_gives_pefts_prototypes(general, alike, tmp_path):
    """PEFT's own layer, run on the same factors."""
    tasks, others = (alike[:2], alike[2:]) if general else (alike, [])
    adapterkit.arrow(tasks, general=others, out=tmp_path / "out", compat="peft", seed=3)
    tensors, _ = experts_of(tmp_path / "out")
    settings = peft.ArrowConfig(top_k=2, rng_seed=3, use_gks=general)
    settings.task_adapter_names = [f"task_{i}" for i in range(len(tasks))]
    settings.gks_adapter_names = [f"gks_{i}" for i in range(len(others))]
    layer = ArrowLoraLinearLayer(16, settings)
    a, b = nn.ModuleDict(), nn.ModuleDict()
    for name, folder in zip(
        settings.task_adapter_names + settings.gks_adapter_names, [*tasks, *others], strict=True
    ):
        stored = load_file(folder / WEIGHTS)
        for table, key in ((a, "lora_A"), (b, "lora_B")):
            weight = stored[f"base_model.model.fit.{key}.weight"].clone()
            table[name] = nn.Linear(*weight.shape[::-1], bias=False)
            table[name].weight.data = weight
    with torch.no_grad():
        layer.gen_know_sub(a, b)
        layer.build_prototypes(a, b)
    assert torch.allclose(tensors["fit.prototype"], layer.prototypes, atol=1e-6)
    for i, name in enumerate(settings.task_adapter_names):
        assert torch.allclose(tensors["fit.a"][i], a[name].weight, atol=1e-7)
        assert torch.allclose(tensors["fit.b"][i], b[name].weight, atol=1e-7)


def test_arrow_refuses_what_cannot_be_routed(alike, mixed, tmp_path):
    for sources, options, what in [
        (alike, {"top_k": 5}, "top-k"),
        (alike, {"temperature": 0.0}, "temperature"),
        (alike, {"seed": 1}, "seed"),
        ([mixed[0]], {}, "linear layers"),
    ]:
        with pytest.raises(Refused, match=what):
            adapterkit.arrow(sources, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# -- rebase ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rebased_adapter_gives_the_trained_model_on_the_original_base(init, tmp_path):
    """PiSSA by PEFT itself: save before training, train, rebase, and load both."""
    with oracle.quiet():
        torch.manual_seed(0)
        model = peft.get_peft_model(
            oracle.llama(),
            peft.LoraConfig(
                r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init
            ),
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        oracle.perturb(model, 1, 0.05)
        # small steps from the init, not values of their own
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                start = load_file(tmp_path / "initial" / WEIGHTS)[name.replace(".default", "")]
                parameter.data = start + 0.05 * parameter.data
        model.save_pretrained(tmp_path / "trained")
        ids = torch.arange(12)[None]
        expected = model.eval()(input_ids=ids).logits
        adapterkit.rebase(
            tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "plain"
        )
        actual = oracle.peft_model(oracle.llama(), tmp_path / "plain")(input_ids=ids).logits
    assert torch.allclose(actual, expected, atol=2e-5)
    assert (
        config_of(tmp_path / "plain")["init_lora_weights"] is True
        and config_of(tmp_path / "plain")["r"] == 8
    )


def test_rebase_keeps_what_peft_drops(mixed, tmp_path):
    """Embeddings, patterns, rsLoRA, magnitudes, biases, trained modules."""
    settings = {
        "use_dora": True,
        "target_modules": ["fit", "embed", "image"],
        "modules_to_save": ["norm"],
        "use_rslora": True,
    }
    settings |= {"rank_pattern": {"fit": 6}, "r": 3, "lora_alpha": 5}
    initial, after = (
        trained(tmp_path / name, seed, **settings) for name, seed in (("before", 1), ("after", 2))
    )
    plain, after = (
        after,
        oracle.edit_config(after, tmp_path / "trained", init_lora_weights="pissa_niter_4"),
    )
    adapterkit.rebase(after, initial=initial, out=tmp_path / "plain")
    kept, actual = load_file(after / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    beside = {
        key
        for key in kept
        if "lora_A" not in key and "lora_B" not in key and "embedding_" not in key
    }
    assert any("magnitude" in key for key in beside) and any("norm" in key for key in beside)
    assert (
        all(torch.equal(actual[key], kept[key]) for key in beside)
        and config_of(tmp_path / "plain")["use_dora"]
    )
    assert_close(deltas(tmp_path / "plain"), weighted([plain, initial], (1, -1)))


def test_rebase_of_another_module_set_or_a_quantized_base_is_refused(mixed, tmp_path):
    pissa = oracle.edit_config(mixed[0], tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(Refused, match="lacks"):
        adapterkit.rebase(pissa, initial=mixed[2], out=tmp_path / "out")
    loftq = oracle.edit_config(mixed[0], tmp_path / "loftq", init_lora_weights="loftq")
    with pytest.raises(Refused, match="quantized"):
        adapterkit.rebase(loftq, initial=mixed[0], out=tmp_path / "out")


# -- resize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["rank", "keep"])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_resize_is_the_best_approximation_at_the_exact_rank(rank, alpha, mixed, tmp_path):
    receipt = adapterkit.resize(mixed[0], out=tmp_path / "out", rank=rank, alpha=alpha)
    for name, delta in deltas(mixed[0]).items():
        metric = receipt.data["parameters"][name]
        assert metric["rank"] == min(rank, 7 if name == "fit" else 4, *delta.shape)
        best = truncated(delta, metric["rank"])
        assert metric["error"] == pytest.approx(
            float((delta - best).norm() / delta.norm()), abs=1e-3
        )
    assert_close(
        deltas(tmp_path / "out"), {n: truncated(d, rank) for n, d in deltas(mixed[0]).items()}, 1e-5
    )
    assert config_of(tmp_path / "out")["lora_alpha"] == (
        6 if alpha == "keep" else config_of(tmp_path / "out")["r"]
    )


def test_the_factors_are_balanced(mixed, tmp_path):
    adapterkit.resize(mixed[0], out=tmp_path / "out", rank=3)
    actual = load_file(tmp_path / "out" / WEIGHTS)
    a, b = (actual[f"base_model.model.fit.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


def test_resize_by_energy_ratio_and_size(mixed, tmp_path):
    metrics = adapterkit.resize(mixed[0], out=tmp_path / "energy", energy=0.8).data["parameters"]
    for name, delta in deltas(mixed[0]).items():
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        assert metrics[name]["rank"] == int((shares < 0.8).sum()) + 1
    metrics = adapterkit.resize(mixed[0], out=tmp_path / "ratio", sv_ratio=1.5).data["parameters"]
    for name, delta in deltas(mixed[0]).items():
        s = torch.linalg.svdvals(delta)
        assert metrics[name]["rank"] == int((s >= s[0] / 1.5).sum())
    size = (mixed[0] / WEIGHTS).stat().st_size // 2
    metrics = adapterkit.resize(mixed[0], out=tmp_path / "size", max_size=str(size)).data[
        "parameters"
    ]
    assert 0.85 * size < (tmp_path / "size" / WEIGHTS).stat().st_size <= size
    assert all("spectrum" not in metric for metric in metrics.values())
    kept, dropped = [], []
    for name, delta in deltas(mixed[0]).items():
        s = torch.linalg.svdvals(delta)[:7]
        kept += s[1 : metrics[name]["rank"]].tolist()
        dropped += s[metrics[name]["rank"] :][s[metrics[name]["rank"] :] > 1e-6].tolist()
    # but for the last ones that did not fit, the larger values stay
    assert max(dropped) < 2 * min(kept)
    assert_close(
        deltas(tmp_path / "size"),
        {n: truncated(d, metrics[n]["rank"]) for n, d in deltas(mixed[0]).items()},
        1e-5,
    )


def test_resize_to_a_size_with_values_of_another_width(tmp_path):
    """Values of wider dtypes come first in the file: ranks must not go to the wrong modules for
    it."""
    source = trained(tmp_path / "a", 1, modules_to_save=["norm"])
    size = 4500
    metrics = adapterkit.resize(
        source, out=tmp_path / "size", max_size=str(size), dtype="bf16"
    ).data["parameters"]
    kept, dropped = [], []
    for name, delta in deltas(source).items():
        s = torch.linalg.svdvals(delta)[:4]
        kept += s[1 : metrics[name]["rank"]].tolist()
        dropped += s[metrics[name]["rank"] :][s[metrics[name]["rank"] :] > 1e-6].tolist()
    assert dropped and max(dropped) < 2 * min(kept)


def test_resize_keeps_all_else(tmp_path):
    source = trained(
        tmp_path / "a",
        1,
        target_modules=["fit"],
        use_dora=True,
        lora_bias=False,
        modules_to_save=["norm"],
        bias="lora_only",
    )
    adapterkit.resize(source, out=tmp_path / "out", rank=2)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(before) == set(after)
    assert all(
        torch.equal(after[key], before[key])
        for key in before
        if "lora_A" not in key and "lora_B" not in key
    )
    biased = trained(tmp_path / "b", 1, target_modules=["fit"], lora_bias=True, r=4, lora_alpha=6)
    adapterkit.resize(biased, out=tmp_path / "c", rank=2)
    key = "base_model.model.fit.lora_B.bias"
    assert torch.allclose(
        load_file(tmp_path / "c" / WEIGHTS)[key], 1.5 * load_file(biased / WEIGHTS)[key]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"rank": 2, "energy": 0.5},
        {"sv_ratio": 0.5},
        {"max_size": "many"},
        {"max_size": "1KB"},
        {"rank": 2, "alpha": "x"},
    ],
    ids=str,
)
def test_a_cut_that_makes_no_sense_is_refused(options, mixed, tmp_path):
    with pytest.raises(Refused):
        adapterkit.resize(mixed[0], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# -- the commands ----------------------------------------------------------------------------------


def test_subtract_arrow_rebase_and_resize_commands_write_verified_adapters(alike, tmp_path):
    names = list(map(str, alike))
    for argv in [
        ["subtract", names[0], "--general", names[1], "--rank", "2", "--out", str(tmp_path / "s")],
        ["arrow", *names[:3], "--general", names[3], "--top-k", "2", "--out", str(tmp_path / "a")],
        ["rebase", names[0], "--initial", names[1], "--out", str(tmp_path / "r")],
        ["resize", names[0], "--energy", "0.9", "--dtype", "bf16", "--out", str(tmp_path / "z")],
    ]:
        dry = CliRunner().invoke(main, [*argv, "--dry-run"])
        assert dry.exit_code == 0 and not Path(argv[-1]).exists(), dry.output
        done = CliRunner().invoke(main, argv)
        assert done.exit_code == 0 and "modules written" in done.stderr, done.output
        adapterkit.verify(argv[-1])
