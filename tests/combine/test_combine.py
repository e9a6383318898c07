"""combine, file to file: against PEFT's `add_weighted_adapter` where PEFT is right, against float64
everywhere."""

import json
import math
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit import registry
from adapterkit.cli import main
from adapterkit.errors import Refused
from adapterkit.kernels import elementwise
from adapterkit.tasks.combined import DenseDeltas, Seeds
from tests.support import oracle
from tests.support.deltas import LAYERS, assert_close, deltas, net, trained, truncated, weighted

BEYOND_PEFT = ("line", "volume", "narrow")
WEIGHTS = (1.0, -0.4, 0.7)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    """Three adapters of one rank on every kind of layer, of different alphas."""
    root = tmp_path_factory.mktemp("three")
    return [
        trained(root / f"a{i}", seed=i, r=4, lora_alpha=alpha)
        for i, alpha in enumerate((6, 3.5, 8))
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    """Ranks, scales, patterns and modules that differ; bfloat16 factors in one."""
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
    tensors = {k: v.bfloat16() for k, v in load_file(third / "adapter_model.safetensors").items()}
    save_file(tensors, third / "adapter_model.safetensors")
    return [first, second, third]


def combined(sources: list[Path], out: Path, weights=WEIGHTS, **options) -> dict:
    """The receipt's metrics by module."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = [f"{source}={weight}" for source, weight in zip(sources, weights, strict=True)]
        return adapterkit.combine(named, out=out, **options).data["parameters"]


def peft_combined(
    sources: list[Path], out: Path, kind: str, weights=WEIGHTS, **options
) -> dict[str, torch.Tensor]:
    """PEFT's combination, saved: its tensors by key."""
    with oracle.quiet():
        model = oracle.peft_model(net(), *sources)
        names = [f"a{i}" for i in range(len(sources))]
        model.add_weighted_adapter(names, list(weights), "new", combination_type=kind, **options)
        model.save_pretrained(out, selected_adapters=["new"])
    return load_file(out / "new" / "adapter_model.safetensors")


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
    found = deltas(tmp_path / "out")
    for name, delta in weighted(mixed, WEIGHTS).items():
        assert metrics[name]["rank"] == min(rank, *delta.shape, 7 if name == "tall" else 99)
        best = truncated(delta, rank)
        assert float((found[name] - best).norm()) <= 1e-5 * float(delta.norm()), name
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


# -- PEFT's names ----------------------------------------------------------------------------------


def pairs_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """b @ a by module, of a file."""
    found = {}
    for key, a in tensors.items():
        if match := re.match(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?$", key):
            b = tensors[key.replace("_A", "_B")]
            found[match[1]] = b.double().flatten(1) @ a.double().flatten(1)
    return found


DELTA = [
    ("cat", None),
    ("svd", None),
    ("ties_svd", "total"),
    ("ties_svd", "frequency"),
    ("magnitude_prune_svd", None),
]
FACTORS = [("linear", None), ("ties", "total"), ("ties", "frequency"), ("magnitude_prune", None)]


@pytest.mark.parametrize(("kind", "majority"), DELTA)
def test_delta_space_agrees_with_peft(kind, majority, three, tmp_path):
    """PEFT decomposes no 1-D or 3-D kernel, and no layer of fewer rows than the rank: the other
    tests cover those."""
    options = {"density": 0.4} if "_svd" in kind else {}
    three = [narrowed(source, tmp_path) for source in three]
    theirs = options | ({"majority_sign_method": majority} if majority else {})
    options |= {"majority": majority} if majority else {}
    expected = pairs_of(peft_combined(three, tmp_path / "peft", kind, **theirs))
    combined(three, tmp_path / "out", method=kind, **options)
    ours = pairs_of(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert_close(ours, expected, 2e-5)


def narrowed(source: Path, folder: Path) -> Path:
    """The adapter without the layers that PEFT's svd cannot do."""
    out = oracle.edit_config(
        source, folder / source.name, target_modules=[n for n in LAYERS if n not in BEYOND_PEFT]
    )
    tensors = load_file(out / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if not any(f".{name}." in k for name in BEYOND_PEFT)}
    save_file(kept, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(("kind", "majority"), FACTORS)
def test_factor_space_is_pefts_arithmetic(kind, majority, three, tmp_path):
    options = {} if kind == "linear" else {"density": 0.4}
    theirs = options | ({"majority_sign_method": majority} if majority else {})
    options |= {"majority": majority} if majority else {}
    expected = peft_combined(three, tmp_path / "peft", kind, **theirs)
    combined(three, tmp_path / "out", method=kind, space="factors", **options)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_on_factors_is_pefts_with_the_same_draws(kind, three, tmp_path, monkeypatch):
    three = [narrowed(source, tmp_path) for source in three]
    with oracle.quiet():
        model = oracle.peft_model(net(), *three)
    names = [
        n.removeprefix("base_model.model.")
        for n, m in model.named_modules()
        if isinstance(m, oracle.peft_layers.LoraLayer)
    ]
    order = iter([(name, side, which) for name in names for side in "ab" for which in range(3)])

    def pruned(tensor, density, rescale):
        name, side, which = next(order)
        matrix = tensor.detach().flatten(1).clone()
        given = DenseDeltas([matrix])
        generator = Seeds(5, f"{name}/{side}")(which)
        for first, last in given.blocks():
            elementwise.drop(matrix[first:last], density, generator)
        return matrix.view_as(tensor)

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    expected = peft_combined(three, tmp_path / "peft", kind, density=0.6)
    assert next(order, None) is None
    combined(three, tmp_path / "out", method=kind, space="factors", density=0.6, seed=5)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in expected.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("clamp", [0.6, 0.95, 1.0])
def test_svd_clamp_holds_the_factors_below_a_quantile(clamp, mixed, tmp_path):
    """PEFT's rule on b = U s and a = Vᵀ, with the elements' negatives among them, so that no sign
    of a singular vector matters."""
    combined(mixed, tmp_path / "out", method="svd", svd_clamp=clamp)
    found = deltas(tmp_path / "out")
    for name, delta in weighted(mixed, WEIGHTS).items():
        rank = 7 if name == "fit" else min(4, *delta.shape)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        b, a = u[:, :rank] * s[:rank], vh[:rank]
        values = torch.cat([b.flatten(), a.flatten()])
        limit = float(torch.quantile(torch.cat([values, -values]), clamp))
        expected = b.clamp(-limit, limit) @ a.clamp(-limit, limit)
        assert float((found[name] - expected).norm()) <= 1e-4 * float(delta.norm()), name


# -- every method x refit --------------------------------------------------------------------------


NEEDS = {"density": 0.5, "decay": 0.9}


def options_of(method: str) -> dict:
    fields = registry.options(registry.members("combinations")[method])
    given = {name: value for name, value in NEEDS.items() if name in fields}
    decay = {"settings": {"decay": given.pop("decay")}} if "decay" in given else {}
    return given | decay


@pytest.mark.parametrize("method", sorted(set(registry.members("combinations")) - {"iso_c"}))
def test_weights_one_and_zero_give_the_first_adapter(method, mixed, tmp_path):
    """The law of every method but iso_c, which changes the strengths of even one; also for modules
    that one of them lacks."""
    options = options_of(method) | ({"density": 1.0} if "density" in options_of(method) else {})
    if method == "sce":
        options["settings"] = {"select": 1.0}
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        combined(mixed[:2], tmp_path / f"{number}", weights, method=method, energy=1.0, **options)
        found, alone = deltas(tmp_path / f"{number}"), deltas(mixed[number])
        for name, delta in found.items():
            expected = alone.get(name, torch.zeros_like(delta))
            assert float((delta - expected).norm()) <= 2e-6 * float(expected.norm()) + 1e-7, name


def test_slerp_says_t_once(mixed, tmp_path):
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


@pytest.mark.parametrize(
    "refit", [{}, {"rank": 2}, {"energy": 0.8}], ids=["default", "rank", "energy"]
)
@pytest.mark.parametrize("method", list(registry.members("combinations")))
def test_every_method_and_refit(method, refit, mixed, tmp_path):
    """The refit is the best approximation of what the method gives at full rank, and the bytes are
    the same every time."""
    sources, weights = (
        (mixed[:2], (1.0, 0.6)) if method in ("slerp", "karcher") else (mixed, WEIGHTS)
    )
    options = options_of(method)
    combined(sources, tmp_path / "whole", weights, method=method, energy=1.0, **options)
    metrics = combined(sources, tmp_path / "out", weights, method=method, **refit, **options)
    whole, found = deltas(tmp_path / "whole"), deltas(tmp_path / "out")
    for name, delta in whole.items():
        best = truncated(delta, metrics[name]["rank"])
        lost, least = (
            float((found[name] - delta).norm()),
            float((best - delta).norm()),
        )  # best is one of several where values are equal
        assert lost <= least + 5e-5 * float(delta.norm()) + 1e-9, name
        if "rank" in refit:
            assert metrics[name]["rank"] <= 2
        if "energy" in refit:
            assert float(best.norm() ** 2) >= (0.8 - 1e-5) * float(delta.norm() ** 2)
    combined(sources, tmp_path / "again", weights, method=method, **refit, **options)
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


# -- weights, modules, what is kept ----------------------------------------------------------------


def test_weight_for_replaces_a_weight(mixed, tmp_path):
    combined(
        mixed, tmp_path / "out", method="linear", weight_for=["fit=2", "1:^fit$=0.5", "3:image=0"]
    )
    first, second, third = (deltas(source) for source in mixed)
    expected = weighted(mixed, WEIGHTS)
    expected["fit"] = 0.5 * first["fit"] + 2 * second["fit"] + 2 * third["fit"]
    expected["image"] = first["image"] - 0.4 * second["image"]
    assert_close(deltas(tmp_path / "out"), expected)


def test_a_rule_that_matches_nothing_is_refused(mixed, tmp_path):
    for rule in ("nothing=1", "4:fit=1", "fit=x", "fit"):
        with pytest.raises(Refused, match="weight-for"):
            combined(mixed, tmp_path / "out", method="linear", weight_for=[rule])


def test_biases_follow_the_weights(tmp_path):
    sources = [
        trained(tmp_path / f"a{i}", i, target_modules=["fit"], lora_bias=True, lora_alpha=6 + i)
        for i in range(2)
    ]
    combined(sources, tmp_path / "out", (1.0, -0.5), method="linear")
    biases = [
        load_file(s / "adapter_model.safetensors")["base_model.model.fit.lora_B.bias"]
        for s in sources
    ]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.fit.lora_B.bias"
    ]
    assert torch.allclose(found, 6 / 4 * biases[0] - 0.5 * 7 / 4 * biases[1], rtol=1e-6)
    with pytest.raises(Refused, match="biases"):
        combined(sources, tmp_path / "ties", (1.0, 1.0), method="ties", density=0.5)


@pytest.mark.parametrize("verb", ["combine", "subtract"])
def test_every_module_has_a_bias_where_one_has(tmp_path, verb):
    """PEFT makes one for each module, and misses those that the file does not hold."""
    biased = trained(tmp_path / "biased", 1, target_modules=["fit"], lora_bias=True)
    plain = trained(tmp_path / "plain", 2, target_modules=["fit", "image", "line"])
    if verb == "combine":
        combined([biased, plain], tmp_path / "out", (1.0, 1.0), method="linear")
    else:
        adapterkit.subtract([plain], general=[biased], out=tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    biases = {key: value for key, value in state.items() if key.endswith("lora_B.bias")}
    assert len(biases) == 3 and sum(bool(value.any()) for value in biases.values()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(net(), tmp_path / "out")


def test_biases_beside_an_embedding_are_refused(tmp_path):
    biased = trained(tmp_path / "biased", 1, target_modules=["fit"], lora_bias=True)
    embedding = trained(tmp_path / "embedding", 2, target_modules=["embed"])
    with pytest.raises(Refused, match="embed beside biases"):
        combined([biased, embedding], tmp_path / "out", (1.0, 1.0), method="linear")


def test_a_trained_head_is_taken_from_the_one_that_has_it(tmp_path):
    head = trained(tmp_path / "head", 1, target_modules=["fit"], modules_to_save=["narrow"])
    plain = trained(tmp_path / "plain", 2, target_modules=["fit"])
    combined([plain, head], tmp_path / "out", (0.5, 1.0), method="linear")
    key = "base_model.model.narrow.weight"
    ours, theirs = (
        load_file(f / "adapter_model.safetensors")[key] for f in (tmp_path / "out", head)
    )
    assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "modules_to_save"
    ] == ["narrow"]
    with pytest.raises(Refused, match="weight 0.5"):
        combined([plain, head], tmp_path / "no", (1.0, 0.5), method="linear")
    other = trained(tmp_path / "other", 3, target_modules=["fit"], modules_to_save=["narrow"])
    with pytest.raises(Refused, match="head .*, other "):
        combined([head, other], tmp_path / "no", (1.0, 1.0), method="linear")
    twin = oracle.edit_config(head, tmp_path / "twin")
    combined([head, twin], tmp_path / "same", (0.5, 0.5), method="linear")


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 8, 6))


def test_stacks_of_experts_are_combined_expert_by_expert(tmp_path):
    sources = []
    for i, rank in enumerate((2, 3)):
        torch.manual_seed(0)
        model = nn.Module()
        model.mlp = Stacks()
        oracle.train(
            model,
            tmp_path / f"a{i}",
            seed=i,
            r=rank,
            lora_alpha=4,
            target_modules=[],
            target_parameters=["experts.up"],
        )
        sources.append(tmp_path / f"a{i}")
    combined(sources, tmp_path / "out", (1.0, 0.5), method="linear")

    def stack(folder: Path, rank: int, scale: float) -> torch.Tensor:
        tensors = load_file(folder / "adapter_model.safetensors")
        (a,), (b,) = ([t.double() for k, t in tensors.items() if f"lora_{x}" in k] for x in "AB")
        return scale * torch.einsum(
            "ore,eri->eoi", b.view(b.shape[0], rank, 3), a.view(3, rank, -1)
        )

    expected = stack(sources[0], 2, 4 / 2) + 0.5 * stack(sources[1], 3, 4 / 3)
    found = stack(tmp_path / "out", 5, 1.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    for refit in ({"rank": 2}, {"energy": 0.7}):
        folder = tmp_path / next(iter(refit))
        metrics = combined(sources, folder, (1.0, 0.5), method="linear", **refit)
        rank = next(iter(metrics.values()))["rank"]
        best = torch.stack([truncated(delta, rank) for delta in expected])
        assert float((stack(folder, rank, 1.0) - best).norm() / expected.norm()) < 1e-5


def test_a_zero_adapter_stays_zero(tmp_path):
    source = trained(tmp_path / "a", 1, target_modules=["fit"])
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()},
        source / "adapter_model.safetensors",
    )
    for method in ("linear", "svd", "ties"):
        options = {"density": 0.5} if method == "ties" else {}
        metrics = combined(
            [source, source], tmp_path / method, (1.0, 1.0), method=method, **options
        )
        assert metrics["fit"]["norm"] == 0 and metrics["fit"]["energy"] == 1
        assert not deltas(tmp_path / method)["fit"].any()
    metrics = combined(
        [source, source], tmp_path / "energy", (1.0, 1.0), method="linear", energy=0.9
    )
    assert metrics["fit"]["rank"] == 1


def tokenizer_files(**changes) -> dict[str, str]:
    """A fast tokenizer's files as a Trainer leaves them beside a checkpoint."""
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "model": {"type": "BPE", "vocab": {"a": 0}},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "model_max_length": 512,
            "padding_side": "right",
        },
        "special_tokens_map.json": {"eos_token": "</s>"},
        "chat_template.jinja": None,
    }
    for key, value in changes.items():
        name = {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}.get(key)
        if name:
            files[name] = files[name] | value
        else:
            files[{"map": "special_tokens_map.json", "template": "chat_template.jinja"}[key]] = (
                value
            )
    return {
        n: v if isinstance(v, str) else json.dumps(v) for n, v in files.items() if v is not None
    }


SAME_TOKENS = [
    {"config": {"model_max_length": 2048, "name_or_path": "/home/me/run"}},
    {"tokenizer": {"truncation": {"max_length": 9}, "padding": {"pad_id": 0}}},
    {"config": {"padding_side": "left"}},
    {"map": None},
]
OTHER_TOKENS = [
    {"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}},
    {"config": {"add_bos_token": True}},
    {"template": "{{ messages }}"},
    {"map": {"eos_token": "<end>"}},
]


@pytest.mark.parametrize("verb", ["combine", "subtract"])
@pytest.mark.parametrize("changes", [*SAME_TOKENS, *OTHER_TOKENS], ids=str)
def test_tokenizers_beside_the_adapters(changes, verb, tmp_path):
    """Settings that make no other tokens do not count; for others there is a way out."""
    sources = [trained(tmp_path / f"a{i}", i, target_modules=["fit"]) for i in range(2)]
    for source, files in zip(sources, (tokenizer_files(), tokenizer_files(**changes)), strict=True):
        for name, text in files.items():
            (source / name).write_text(text)

    def run(out: Path, **options):
        if verb == "combine":
            return adapterkit.combine(sources, out=out, method="linear", **options)
        return adapterkit.subtract(sources[:1], general=sources[1:], out=out, **options)

    if changes in SAME_TOKENS:
        notes = run(tmp_path / "out").data["notes"]
        assert (
            json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"]
            == 512
        )
        assert any("padding_side" in note for note in notes) == ("padding_side" in str(changes))
    else:
        with pytest.raises(Refused) as caught:
            run(tmp_path / "out")
        assert "different tokenizers" in str(caught.value) and "--tokenizer base" in str(
            caught.value
        )
    run(tmp_path / "base", tokenizer="base")
    assert not list((tmp_path / "base").glob("*token*"))


def test_a_chat_template_is_the_same_in_either_file(tmp_path):
    sources = [trained(tmp_path / f"a{i}", i, target_modules=["fit"]) for i in range(2)]
    files = (
        tokenizer_files(template="{{ x }}"),
        tokenizer_files(config={"chat_template": "{{ x }}"}),
    )
    for source, named in zip(sources, files, strict=True):
        for name, text in named.items():
            (source / name).write_text(text)
    combined(sources, tmp_path / "out", (1.0, 1.0), method="linear")


# -- refusals --------------------------------------------------------------------------------------


def test_all_that_is_not_linear_is_refused_at_once(tmp_path):
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
    assert "fit" in str(caught.value) and "narrow" in str(caught.value)
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
    with pytest.raises(adapterkit.errors.AdapterkitError, match="finite"):
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
    from adapterkit.combinations import ALIASES

    for name in (*registry.members("combinations"), *ALIASES):
        assert re.search(rf"\b{name}\b", text), name
