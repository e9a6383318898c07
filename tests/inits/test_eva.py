"""EVA: its laws, and PEFT's from the same batch."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.errors import Refused, Unrecoverable
from adapterkit.verbs.init.methods.eva import Eva, distribute
from tests.support import oracle
from tests.support.input_statistics import (
    inputs_of,
    linear_modules,
    matrix,
    save_statistics,
    statistics_of,
)

LLAMA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")


def batch() -> dict:
    """One batch with padding and masked labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (8, 40), generator=generator)
    mask = (torch.arange(40) < torch.tensor([40, 33, 40, 20, 40, 40, 9, 40])[:, None]).long()
    labels = torch.where((torch.arange(40) < 5) | (mask == 0), -100, ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def statistics(model, modules) -> dict[str, dict[str, Tensor]]:
    return {n: statistics_of(x) for n, x in inputs_of(model, modules, [batch()]).items()}


def used(kinds: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind: kinds[kind] for kind in Eva.needs}


def in_peft(model, ends, rank_pattern=None, **settings):
    """PEFT's on one batch, which it sees until nothing changes: then the components are exact."""
    config = peft.LoraConfig(
        r=8,
        lora_alpha=6,
        rank_pattern=rank_pattern or {},
        target_modules=list(ends),
        fan_in_fan_out="c_fc" in ends,
        init_lora_weights="eva",
        eva_config=EvaConfig(**settings),
        task_type="CAUSAL_LM",
    )
    with oracle.quiet():  # of memory
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    peft.initialize_lora_eva_weights(theirs, [batch()], show_progress_bar=False)
    return theirs


@pytest.mark.parametrize("build, ends", [(oracle.llama, LLAMA), (oracle.gpt2, GPT2)])
def test_components_as_peft(build, ends):
    """Rows but for their signs."""
    model = build()
    modules = linear_modules(model, ends)
    theirs, seen = in_peft(model, ends), statistics(model, modules)
    for name, module in modules.items():
        a = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
        mine, b = Eva().factors(matrix(module), len(a), 1.0, **used(seen[name]))
        torch.testing.assert_close((mine @ a.T).abs(), torch.eye(len(a)), atol=2e-3, rtol=0)
        assert not b.any() and b.shape == (len(matrix(module)), len(a))


def test_whitened_as_peft():
    """PEFT divides by √(σ √tokens), of all tokens of the two times that it went through the batch:
    once for each module with the same inputs, here q, k and v, which is wrong."""
    model = oracle.llama()
    modules = linear_modules(model, LLAMA)
    theirs, seen = in_peft(model, LLAMA, whiten=True), statistics(model, modules)
    tokens = 2 * len(inputs_of(model, modules, [batch()])["model.layers.0.mlp.up_proj"])
    for name, module in modules.items():
        a = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
        mine, _ = Eva(whiten=True).factors(matrix(module), len(a), 1.0, **used(seen[name]))
        std = seen[name]["variances"][: len(a)].sqrt()
        torch.testing.assert_close(mine, seen[name]["components"][: len(a)] / std.sqrt()[:, None])
        times = 3 if "attn" in name else 1
        singular = std * tokens**0.5
        torch.testing.assert_close(
            a.norm(dim=1)[:6], singular[:6] ** (-times / 2), rtol=2e-3, atol=0
        )


def test_whitening_leaves_directions_without_variance_finite():
    components, variances = torch.eye(4), torch.tensor([4.0, 1.0, 0.0, 0.0])
    given = {"components": components, "variances": variances, "variance": torch.tensor([5.0])}
    a, _ = Eva(whiten=True).factors(torch.empty(3, 4, device="meta"), 4, 1.0, **given)
    torch.testing.assert_close(a.diagonal()[:2], torch.tensor([2**-0.5, 1.0]))
    assert a.isfinite().all()
    zero = given | {"variances": torch.zeros(4), "variance": torch.zeros(1)}
    a, _ = Eva(whiten=True).factors(torch.empty(3, 4, device="meta"), 4, 1.0, **zero)
    assert a.isfinite().all()


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios, budget, ranks", [
    ([[0.5, 0.3], [0.4, 0.1]], 2, [1, 1]),
    ([[0.5, 0.3], [0.4, 0.1]], 3, [2, 1]),
    ([[0.5, 0.45], [0.4, 0.1]], 2, [2, 0]),
    ([[0.5, 0.3], [0.5, 0.3], [0.5, 0.3]], 4, [2, 1, 1]),  # equal: the first has the largest
    ([[0.5], []], 4, [1, 0]),  # fewer components than ranks
])  # fmt: skip
def test_ranks_are_distributed_by_explained_variance(ratios, budget, ranks):
    assert distribute(ratios, budget) == ranks


def test_nothing_to_distribute():
    with pytest.raises(Unrecoverable, match="no variance in any module"):
        distribute([[], []], 4)


def test_modules_with_the_same_inputs_have_as_many_candidates():
    modules = [("qkv", 8, 32), ("qkv", 2, 32), ("o", 3, 32), ("down", 20, 32)]
    assert Eva(rho=1.5).candidates(modules) == {"qkv": 12, "o": 4, "down": 30}
    assert Eva(rho=2.0).candidates(modules[3:]) == {"down": 32}


def test_ratios_are_shares_of_all_variance():
    variances = torch.tensor([4.0, 2.0, 1.0, 1e-13])
    assert Eva().ratios(2, variances, torch.tensor([8.0])) == [0.5, 0.25]
    assert Eva().ratios(4, variances, torch.tensor([8.0])) == [0.5, 0.25, 0.125]  # without noise
    assert Eva().ratios(4, torch.zeros(4), torch.zeros(1)) == []


@pytest.mark.parametrize("settings, message", [
    ({"rho": 0.5}, "--rho 0.5(?s:.*)at least 1"),
    ({"rho": "many"}, "--rho 'many'"),
    ({"whiten": "perhaps"}, "--whiten 'perhaps'"),
    ({"adjust_scaling_factors": 2}, "--adjust-scaling-factors 2"),
])  # fmt: skip
def test_invalid_eva_settings_are_refused(settings, message):
    with pytest.raises(Refused, match=message):
        Eva(**settings)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stats:
        return stats.metadata()


# -- files ---------------------------------------------------------------------------------------


def save(model, modules, folder: Path) -> Path:
    """A base and its statistics."""
    stats = save_statistics(model, modules, [batch()], folder / "stats.safetensors")
    oracle.save_base(model, folder / "base", "fp32")
    return stats


@pytest.mark.parametrize("other_ranks", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("build, ends", [(oracle.llama, LLAMA), (oracle.gpt2, GPT2)])
def test_ranks_and_scales_as_peft(build, ends, adjust, other_ranks, tmp_path):
    model, pattern = build(), {ends[1]: 3, ends[2]: 2} if other_ranks else {}
    modules = linear_modules(model, ends)
    stats = save(model, modules, tmp_path)
    adapterkit.init(
        tmp_path / "base",
        method="eva",
        rank=8,
        alpha=6,
        rank_for=[f"{end}={rank}" for end, rank in pattern.items()],
        targets=",".join(ends),
        stats=stats,
        settings={"adjust_scaling_factors": adjust},
        out=tmp_path / "out",
    )
    theirs = in_peft(model, ends, pattern, adjust_scaling_factors=adjust)
    mine = oracle.peft_model(oracle.load(build, tmp_path / "base"), tmp_path / "out" / "adapter")
    for name in modules:
        layer, expected = (m.get_submodule(f"base_model.model.{name}") for m in (mine, theirs))
        assert hasattr(layer, "lora_A") == hasattr(expected, "lora_A"), name
        if not hasattr(layer, "lora_A"):
            continue
        for mine_of, theirs_of in ((layer.r, expected.r), (layer.scaling, expected.scaling)):
            assert list(mine_of.values()) == pytest.approx(list(theirs_of.values())), name
        a, b = (next(iter(x.lora_A.values())).weight for x in (layer, expected))
        # of fewer candidates PEFT's decomposition is coarser
        torch.testing.assert_close((a @ b.T).abs(), torch.eye(len(a)), atol=1e-2, rtol=0)
    ids = batch()
    with torch.no_grad():
        assert torch.equal(mine(**ids).logits, oracle.load(build, tmp_path / "base")(**ids).logits)


def test_modules_without_a_rank_are_left_out(tmp_path):
    """One module's inputs lie in one direction: it gets one rank; another's do not vary."""
    model = oracle.llama()
    modules = linear_modules(model, ("o_proj", "down_proj"))
    stats = save(model, modules, tmp_path)
    tensors = load_file(stats)
    names = sorted(modules)
    for name, variances in ((names[0], [1.0] + 15 * [1e-9]), (names[1], 16 * [0.0])):
        key = f"{name}.variances"
        tensors[key] = torch.tensor(variances + (len(tensors[key]) - 16) * [0.0])
        tensors[f"{name}.variance"] = torch.tensor([sum(variances)])
    save_file(tensors, stats, {"format": "pt"})
    receipt = adapterkit.init(
        tmp_path / "base",
        method="eva",
        rank=4,
        targets="o_proj,down_proj",
        stats=stats,
        out=tmp_path / "out",
    )
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    keys = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert len(keys) == 6 and not any(names[1] in key for key in keys)
    assert config["target_modules"] == sorted(n for n in names if n != names[1])
    assert next(len(t) for k, t in keys.items() if names[0] in k and "lora_A" in k) == 1
    assert sum(len(t) for k, t in keys.items() if "lora_A" in k) == 16
    assert any(names[1] in warning for warning in receipt.data["warnings"])
    oracle.peft_model(oracle.load(oracle.llama, tmp_path / "base"), tmp_path / "out" / "adapter")


def test_too_few_components(tmp_path):
    model = oracle.llama()
    stats = save(model, linear_modules(model, LLAMA), tmp_path)
    tensors, few = load_file(stats), ("components", "variances")
    tensors = {k: t[:12] if k.endswith(few) else t for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, stats, metadata_of(stats))
    options = {"targets": "q_proj,down_proj", "stats": stats, "out": tmp_path / "out"}
    with pytest.raises(
        Refused, match="12 components(?s:.*)at least 16: rank 8 times rho 2"
    ) as info:
        adapterkit.init(tmp_path / "base", method="eva", rank=8, **options)
    assert str(info.value).count("components") >= 4 and not (tmp_path / "out").exists()
    adapterkit.init(tmp_path / "base", method="eva", rank=6, **options)
