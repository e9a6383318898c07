"""extract of stacks of experts."""

import pytest
import torch

import adapterkit
from tests.support import oracle
from tests.support.deltas import truncated
from tests.support.extraction import MODEL, MOES, check_both_ways, config_of, logits, moved
from tests.support.usual import usual


# Qwen's stacks are as Mixtral's
@pytest.mark.parametrize("kind", usual(MOES, lambda kind: not kind.startswith("qwen")))
def test_stacks_of_experts_get_factors(kind, experts, tmp_path):
    """All matrices of a mixture change: at full rank the adapter is the whole change, in PEFT's
    model too."""
    base, after, build = experts(kind, moved)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    config = config_of(tmp_path / "out")
    stacks = [n for n, p in build().named_parameters() if p.dim() == 3]
    assert stacks and set(stacks) <= set(config["target_parameters"]) and config["target_modules"]
    assert config["modules_to_save"] is None
    assert all(
        metric["error"] < 1e-3 for metric in receipt.data["parameters"].values() if "rank" in metric
    )
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)
    theirs = oracle.peft_model(oracle.load(build, base), tmp_path / "out")
    assert torch.allclose(logits(theirs), logits(oracle.load(build, after)), atol=1e-4)


@pytest.mark.parametrize(
    "only", ["gate_up_proj", "down_proj", "mlp.gate.weight", "shared_expert.up_proj"]
)
def test_parameters_that_changed_alone(only, experts, tmp_path):
    """Which of a module's parameters have factors decides the keys of the others."""
    base, after, build = experts("qwen2_moe", lambda name, t: moved(name, t) if only in name else t)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    config = config_of(tmp_path / "out")
    # PEFT takes no layer of this type for its experts
    key = "target_modules" if "shared" in only else "target_parameters"
    assert config[key] and all(only in name for name in config[key])
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


def test_ranks_of_their_own_for_stacks_and_layers(experts, tmp_path):
    """One expert of a stack has the largest rank, and gives the stack its own."""
    generator = torch.Generator().manual_seed(3)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        ranks = {
            "gate_up_proj": [1, 0, 5, 2],
            "down_proj": [2, 2, 2, 2],
            "mlp.gate.weight": [3],
            "q_proj": [4],
        }
        for part, wanted in ranks.items():
            if part in name:
                flat = tensor.view(len(wanted), *tensor.shape[-2:])
                for matrix, rank in zip(flat, wanted, strict=True):
                    left, right = (
                        torch.randn(len(matrix), rank),
                        torch.randn(rank, matrix.shape[1], generator=generator),
                    )
                    matrix += 0.05 * left @ right
        return tensor

    base, after, build = experts("mixtral", change)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", sv_ratio=1e4)
    layer = "model.layers.0."
    ranks = {
        name.removeprefix(layer): f["rank"]
        for name, f in receipt.data["parameters"].items()
        if name.startswith(layer) and "rank" in f
    }
    assert ranks == {
        "mlp.experts.gate_up_proj": 5,
        "mlp.experts.down_proj": 2,
        "mlp.gate": 3,
        "self_attn.q_proj": 4,
    }
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_smaller_rank_of_a_stack_is_the_best_of_each_expert(kind, experts, tmp_path):
    base, after, build = experts(kind, lambda name, t: moved(name, t) if t.dim() == 3 else t)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=3)
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    before, later, actual = (
        oracle.load(build, folder).state_dict() for folder in (base, after, tmp_path / "back")
    )
    for name, metric in receipt.data["parameters"].items():
        if "rank" in metric:
            delta = (later[name] - before[name]).double()
            best = torch.stack([truncated(matrix, 3) for matrix in delta])
            assert torch.allclose((actual[name] - before[name]).double(), best, atol=1e-5), name
            assert metric["error"] == pytest.approx(
                float((delta - best).norm() / delta.norm()), abs=1e-4
            )


def test_square_experts_are_read_back_as_they_were_written(experts, tmp_path):
    sizes = {"intermediate_size": 64}
    for kind in ("mixtral", "gpt_oss"):
        (tmp_path / kind).mkdir()
        base, after, build = experts(
            kind, lambda name, t: moved(name, t) if t.dim() == 3 else t, **sizes
        )
        assert any(p.shape[1] == p.shape[2] for p in build().parameters() if p.dim() == 3)
        adapterkit.extract(base, after, out=tmp_path / kind / "out", rank=1000)
        check_both_ways(base, tmp_path / kind / "out", after, build, tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_max_size_holds_with_stacks_and_fully_saved_modules(dtype, experts, tmp_path):
    """The wider of factors and saved values comes first in the file, and each gets the rank that is
    its own."""
    base, after, build = experts(
        "mixtral", lambda name, t: t + 0.1 if "norm" in name else moved(name, t)
    )
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", max_size="150KB", dtype=dtype)
    assert 100_000 < (tmp_path / "out" / MODEL).stat().st_size <= 150_000
    assert (
        len({metric["rank"] for metric in receipt.data["parameters"].values() if "rank" in metric})
        > 1
    )
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    oracle.peft_model(oracle.load(build, base), tmp_path / "out")


def test_stacks_are_never_completely_in_memory(experts, tmp_path, monkeypatch):
    """Experts are read one at a time, stored together or one by one."""
    from adapterkit.core.engine.reader import LocalReader

    sizes, tensor = [], LocalReader.tensor
    monkeypatch.setattr(
        LocalReader, "tensor", lambda self, spec: sizes.append(spec.shape) or tensor(self, spec)
    )
    for kind in ("mixtral", "gpt_oss"):
        (tmp_path / kind).mkdir()
        base, after, _ = experts(kind, lambda name, t: moved(name, t) if t.dim() == 3 else t)
        sizes.clear()
        adapterkit.extract(base, after, out=tmp_path / kind / "out", rank=2)
        assert sizes and all(len(shape) < 3 for shape in sizes)


def test_resize_keeps_targets_of_both_kinds(experts, tmp_path):
    """Stacks of experts, named as parameters, beside linear layers."""
    base, after, build = experts("mixtral", moved)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=8)
    adapterkit.resize(tmp_path / "out", out=tmp_path / "same", rank=8)
    before, config = (config_of(tmp_path / name) for name in ("out", "same"))
    assert config["target_modules"] == before["target_modules"] and any(
        "q_proj" in name for name in config["target_modules"]
    )
    assert sorted(config["target_parameters"]) == sorted(before["target_parameters"])
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "expected")
    check_both_ways(base, tmp_path / "same", tmp_path / "expected", build, tmp_path)
