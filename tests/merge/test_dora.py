"""DoRA: W' = magnitude ⊙ (W + Δ) / ‖W + Δ‖, by output, for linear, transposed, embedding and
convolution layers."""

import pytest
import torch

from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    DTYPES,
    LINEAR,
    assert_all_rounded,
    assert_rounded,
    exact,
    load,
    merged,
    peft_merged,
    peft_model,
)

CASES = {
    "llama": (oracle.llama, {"target_modules": LINEAR}),
    "llama-head": (oracle.llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    "gpt2": (oracle.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2-embedding": (oracle.gpt2, {"target_modules": ["wpe", "c_attn"]}),
    "convolutions": (
        oracle.net,
        {"target_modules": ["image", "tall", "point", "square", "volume", "line", "fit"]},
    ),
    "embedding": (oracle.net, {"target_modules": ["embed"]}),
    "bert": (
        oracle.bert,
        {"target_modules": ["query", "dense"], "use_rslora": True, "rank_pattern": {"query": 2}},
    ),
    "clip-patches": (oracle.clip, {"target_modules": ["patch_embedding", "fc1"]}),
}


@pytest.fixture(scope="session")
def made_case(cached_folder):
    def make(name: str, dtype: str):
        build, config = CASES[name]
        base = cached_folder(
            f"base-dora-{build.__name__}-{dtype}",
            lambda folder: oracle.save_base(build(), folder, dtype),
        )
        train = lambda folder: oracle.train(load(build, base), folder, use_dora=True, **config)
        return build, base, cached_folder(f"dora-{name}-{dtype}", train)

    return make


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(CASES, "llama", "net"))
def test_is_the_rounded_float64_value(name, dtype, made_case, tmp_path):
    build, base, adapter = made_case(name, dtype)
    oracle.merge(base, adapter, out=tmp_path / "out")
    expected = exact(peft_model(load(build, base), adapter))
    assert_all_rounded(merged(tmp_path / "out", build), expected, load(build, base).state_dict())


def assert_near(ours, theirs, name):
    """Equal but for a few elements that float32 arithmetic in another order puts on the other side
    of a boundary."""
    if ours.dtype != torch.float32:
        assert int((ours != theirs).sum()) <= 2 + 1e-3 * ours.numel(), name
    unit = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(ours.dtype, 2.0**-22)
    least = max(
        2.0**-22 * float(theirs.abs().max()), 2.0**-24 if ours.dtype == torch.float16 else 0
    )
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=unit, atol=least, msg=name)


@pytest.mark.parametrize(("name", "dtype"), oracle.in_dtypes(CASES, "llama", "net"))
def test_agrees_with_peft(name, dtype, made_case, tmp_path):
    """PEFT takes its norms in float32: ours, in float64, differ in the last bit of a float32."""
    build, base, adapter = made_case(name, dtype)
    oracle.merge(base, adapter, out=tmp_path / "out", compat="peft")
    ours, theirs = merged(tmp_path / "out", build), peft_merged(load(build, base), adapter)
    for name, tensor in theirs.items():
        assert_near(ours[name], tensor, name)


def test_over_several_chunks(tmp_path):
    """Norms over columns need the whole weight, which is read by chunks: an embedding of more rows
    than one chunk has."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.embed = torch.nn.Embedding(5000, 64)
    model.fit = torch.nn.Linear(4096, 96)
    (tmp_path / "base").mkdir()
    oracle.save_base(model, tmp_path / "base", "bf16")
    before = oracle.stored(tmp_path / "base")
    oracle.train(model, tmp_path / "adapter", target_modules=["embed", "fit"], use_dora=True)
    fresh = torch.nn.Sequential()
    fresh.embed, fresh.fit = torch.nn.Embedding(5000, 64), torch.nn.Linear(4096, 96)
    fresh.to(torch.bfloat16).load_state_dict(before)
    expected = exact(peft_model(fresh, tmp_path / "adapter"))
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    after = oracle.stored(tmp_path / "out")
    assert_all_rounded(after, expected, before)


def test_magnitudes_are_used(made_case, tmp_path):
    """The rows of the output have the magnitudes as their norms."""
    _, base, adapter = made_case("llama", "fp32")
    oracle.merge(base, adapter, out=tmp_path / "out")
    tensors = oracle.stored(adapter)
    for key, weight in oracle.stored(tmp_path / "out").items():
        magnitude = tensors.get(
            "base_model.model." + key.replace(".weight", ".lora_magnitude_vector")
        )
        if magnitude is not None:
            torch.testing.assert_close(weight.norm(dim=1), magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compat", [None, "peft"])
def test_a_dora_merges_together_with_another_adapter(
    compat, dtype, made_case, cached_folder, tmp_path
):
    """PEFT takes each DoRA's norm of the base and merges in order (peft.md 1.12); order matters, so
    by default it is refused."""
    build, base, adapter = made_case("llama", dtype)
    config = {"target_modules": ["q_proj", "up_proj"], "seed": 9, "r": 2}
    plain = cached_folder(
        f"dora-plain-other-{dtype}",
        lambda folder: oracle.train(load(build, base), folder, **config),
    )
    if compat is None:
        with pytest.raises(Refused, match=r"DoRA of .* and another adapter"):
            oracle.merge(base, adapter, plain, out=tmp_path / "out")
        return
    # in 16 bits PEFT finds the base's norm by taking the other adapter out and putting it in again,
    # which loses bits of W
    orders = [(adapter, plain), (plain, adapter)] if dtype == "fp32" else [(adapter, plain)]
    for i, order in enumerate(orders):
        oracle.merge(base, *order, out=tmp_path / f"out{i}", compat="peft")
        ours, theirs = merged(tmp_path / f"out{i}", build), peft_merged(load(build, base), *order)
        for name, tensor in theirs.items():
            assert_near(ours[name], tensor, f"{name} {i}")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_doras_in_pefts_order(name, made_case, cached_folder, tmp_path):
    build, base, adapter = made_case(name, "fp32")
    config = {
        "target_modules": ["q_proj", "up_proj", "c_attn"],
        "seed": 9,
        "r": 2,
        "use_dora": True,
    }
    other = cached_folder(
        f"dora-other-{name}", lambda folder: oracle.train(load(build, base), folder, **config)
    )
    oracle.merge(base, adapter, other, out=tmp_path / "out", compat="peft")
    ours, theirs = merged(tmp_path / "out", build), peft_merged(load(build, base), adapter, other)
    for name, tensor in theirs.items():
        assert_near(ours[name], tensor, name)


def test_weight_other_than_one_is_refused(made_case, tmp_path):
    _, base, adapter = made_case("llama", "bf16")
    with pytest.raises(Refused, match=r"DoRA with weight 0\.5"):
        oracle.merge(base, f"{adapter}=0.5", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_of_zeros(tmp_path):
    """A row whose norm is zero has no direction: PEFT writes NaN there; it is an error here."""
    model = torch.nn.Sequential()
    model.fit = torch.nn.Linear(8, 4, bias=False)
    model.fit.weight.data[2] = 0
    (tmp_path / "base").mkdir()
    oracle.save_base(model, tmp_path / "base", "fp32")
    oracle.train(model, tmp_path / "adapter", target_modules=["fit"], use_dora=True)
    tensors = oracle.stored(tmp_path / "adapter")
    key = "base_model.model.fit.lora_B.weight"
    tensors[key][2] = 0
    oracle.save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(oracle.adapterkit.core.errors.AdapterkitError, match="not finite"):
        oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_magnitudes_of_older_files(made_case, tmp_path):
    """Files of older PEFT name the magnitude `lora_magnitude_vector.weight`."""
    build, base, adapter = made_case("llama", "bf16")
    old = oracle.edit_config(adapter, tmp_path / "old")
    renamed = {
        k + ".weight" if "magnitude" in k else k: v for k, v in oracle.stored(adapter).items()
    }
    oracle.save_file(renamed, old / "adapter_model.safetensors")
    oracle.merge(base, old, out=tmp_path / "out")
    expected = exact(peft_model(load(build, base), adapter))
    for name, value in expected.items():
        assert_rounded(oracle.stored(tmp_path / "out")[name], value, name)
