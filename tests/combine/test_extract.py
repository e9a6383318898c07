"""extract: the adapter between two checkpoints, merged back or laid on the base by PEFT."""

import functools
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, Refused
from tests.support import architectures, oracle
from tests.support.deltas import truncated

BUILDS = {
    "llama": oracle.llama,
    "gpt2": oracle.gpt2,
    "bert": oracle.bert,
    "vit": oracle.vit,
    "t5": oracle.t5,
    "neox": oracle.neox,
}
MODEL = "adapter_model.safetensors"
NOT_LINEAR = ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def saved(cached_folder):
    """The tiny model of that name as a base."""

    def make(name: str, dtype: str = "fp32") -> Path:
        return cached_folder(
            f"extract-{name}-{dtype}",
            lambda folder: oracle.save_base(BUILDS[name](), folder, dtype),
        )

    return make


def tuned(base: Path, build, out: Path, change, **saving) -> Path:
    """A copy of the base whose parameters went through `change(name, tensor)`."""
    model = oracle.load(build, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter.detach().clone()))
    with oracle.quiet():
        model.save_pretrained(out, **saving)
    return out


def low_rank(rank: int, where=lambda name, t: t.dim() == 2 and "embed" not in name):
    """A change of that rank on every matrix that is no embedding."""
    generator = torch.Generator().manual_seed(7)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not where(name, tensor):
            return tensor
        left, right = (
            torch.randn(*shape, generator=generator)
            for shape in ((tensor.shape[0], rank), (rank, tensor[0].numel()))
        )
        return tensor + 0.05 * (left @ right).view_as(tensor).to(tensor.dtype)

    return change


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and not any(
        word in name
        for word in ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")
    )


@pytest.mark.parametrize("name", BUILDS)
def test_what_was_extracted_leads_back_to_the_fine_tune(name, saved, tmp_path):
    base = saved(name)
    after = tuned(
        base, BUILDS[name], tmp_path / "tuned", low_rank(3, linear), max_shard_size="40KB"
    )
    adapterkit.extract(base, after, out=tmp_path / "adapter", rank=3)
    adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "back")
    expected, found = (
        oracle.load(BUILDS[name], folder).state_dict() for folder in (after, tmp_path / "back")
    )
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=2e-6), key
    with oracle.quiet():
        theirs = oracle.peft_merged(oracle.load(BUILDS[name], base), tmp_path / "adapter")
    for key, tensor in expected.items():
        assert torch.allclose(theirs[key], tensor, atol=2e-6), key


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_smaller_rank_is_the_best_approximation_and_says_its_error(dtype, saved, tmp_path):
    base = saved("llama", dtype)
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(20))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=4)
    before, later, found = (
        oracle.stored(base),
        oracle.stored(after),
        load_file(tmp_path / "out" / MODEL),
    )
    for module, metric in receipt.data["parameters"].items():
        if "rank" not in metric:
            continue
        delta = later[module + ".weight"].double() - before[module + ".weight"].double()
        a, b = (found[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        best = truncated(delta, 4)
        assert float((b @ a - best).norm() / delta.norm()) < 1e-4, module
        assert metric["error"] == pytest.approx(
            float((delta - best).norm() / delta.norm()), abs=1e-4
        )


def test_an_energy_finds_the_rank(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(5))
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", energy=0.9999)
    ranks = {metric["rank"] for metric in receipt.data["parameters"].values() if "rank" in metric}
    assert ranks and max(ranks) <= 5
    for module, metric in receipt.data["parameters"].items():
        if "rank" in metric:
            assert metric["energy"] >= 0.9999 - 1e-6, module


def test_a_size_is_kept(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(12))
    adapterkit.extract(base, after, out=tmp_path / "out", max_size="30KB")
    assert 24_000 < (tmp_path / "out" / MODEL).stat().st_size <= 30_000
    assert len(set(config_of(tmp_path / "out")["rank_pattern"].values())) > 1
    with pytest.raises(Refused, match="rank 1 for each"):
        adapterkit.extract(base, after, out=tmp_path / "no", max_size="3KB")


def test_unchanged_layers_have_no_factors(saved, tmp_path):
    base = saved("llama")
    after = tuned(
        base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "q_proj" in name)
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["target_modules"] == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert len(load_file(tmp_path / "out" / MODEL)) == 4


def test_a_difference_of_rounding_is_none(saved, tmp_path):
    """A bfloat16 copy of a float32 base, one layer of it changed."""
    base = saved("llama")
    after = tuned(
        base, oracle.llama, tmp_path / "tuned", low_rank(2, lambda name, t: "down_proj" in name)
    )
    tensors = {
        key: tensor.bfloat16() for key, tensor in load_file(after / "model.safetensors").items()
    }
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    for name, sides in (("there", (base, after)), ("back", (after, base))):
        adapterkit.extract(*sides, out=tmp_path / name, rank=2, rest="refuse")
        assert all("down_proj" in module for module in config_of(tmp_path / name)["target_modules"])


def test_norms_embeddings_and_heads_are_saved_left_out_or_refused(saved, tmp_path):
    base = saved("llama")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor + 0.1 if "norm.weight" in name or "embed" in name else low_rank(2)(name, tensor)
        )

    after = tuned(base, oracle.llama, tmp_path / "tuned", change)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    saved_modules = config_of(tmp_path / "out")["modules_to_save"]
    assert "model.norm" in saved_modules and "model.embed_tokens" in saved_modules
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, found = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(found[key], tensor, atol=2e-6) for key, tensor in expected.items())
    receipt = adapterkit.extract(base, after, out=tmp_path / "dropped", rank=2, rest="drop")
    assert (
        "model.norm.weight" in receipt.data["left_out"]
        and config_of(tmp_path / "dropped")["modules_to_save"] is None
    )
    with pytest.raises(
        Refused, match=r"6 of one kind, such as\n  model\.embed_tokens\.weight differs"
    ):
        adapterkit.extract(base, after, out=tmp_path / "no", rank=2, rest="refuse")
    adapterkit.extract(
        base, after, out=tmp_path / "attention", rank=2, rest="refuse", include="self_attn"
    )


def test_biases_go_with_their_layers(saved, tmp_path):
    base = saved("bert")
    after = tuned(
        base,
        oracle.bert,
        tmp_path / "tuned",
        lambda n, t: t + 0.1 if n.endswith("query.bias") else low_rank(2, linear)(n, t),
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["bias"] == "lora_only"
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, found = oracle.stored(after), oracle.stored(tmp_path / "back")
    assert all(torch.allclose(found[key], tensor, atol=2e-6) for key, tensor in expected.items())


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FOUR = {"num_local_experts": 4}
MOES = {
    "mixtral": FOUR,
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },  # with a shared expert
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    },  # with a dense layer
    "gpt_oss": FOUR,  # stored transposed, with biases of experts and routers
    "llama4_text": FOUR
    | {
        "moe_layers": [1],
        "intermediate_size_mlp": 40,
    },  # stored transposed, dense layers, a shared expert
    "jetmoe": FOUR | {"kv_channels": 16},  # one stack a module
}


def mixture(kind: str, **sizes):
    """A tiny mixture of experts."""
    config = transformers.AutoConfig.for_model(kind, **(SIZES | MOES[kind] | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.05)
    return model


@pytest.fixture
def experts(cached_folder, tmp_path):
    """A base with stacks of experts, and a fine-tune of it that `change` makes."""

    def make(kind: str, change, **sizes) -> tuple[Path, Path, functools.partial]:
        build = functools.partial(mixture, kind, **sizes)
        base = cached_folder(
            f"extract-{kind}-{sizes}", lambda folder: oracle.save_base(build(), folder, "fp32")
        )
        return base, tuned(base, build, tmp_path / "tuned", change), build

    return make


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A change of full rank of all that is a matrix or a stack of some, and of the routers'
    biases."""
    if (tensor.dim() < 2 and "router.bias" not in name) or "embed" in name:
        return tensor
    generator = torch.Generator().manual_seed(len(name) + tensor.numel())
    return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)


def check_both_ways(base: Path, adapter: Path, after: Path, build, tmp_path: Path) -> None:
    """merge and PEFT both make the fine-tune of the base and the adapter."""
    adapterkit.merge(base, [adapter], out=tmp_path / "back", overwrite=True)
    check_state(oracle.load(build, tmp_path / "back").state_dict(), after, build)
    check_peft(base, adapter, after, build)


def check_peft(base: Path, adapter: Path, after: Path, build) -> None:
    with oracle.quiet():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        found = (
            peft.PeftModel.from_pretrained(oracle.load(build, base), adapter)
            .merge_and_unload()
            .state_dict()
        )
    check_state(found, after, build)


def check_state(found: dict[str, torch.Tensor], after: Path, build) -> None:
    expected = oracle.load(build, after).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=3e-6), key


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize("kind", MOES)
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
    assert config["target_parameters"] and all(only in name for name in config["target_parameters"])
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
    before, later, found = (
        oracle.load(build, folder).state_dict() for folder in (base, after, tmp_path / "back")
    )
    for name, metric in receipt.data["parameters"].items():
        if "rank" in metric:
            delta = (later[name] - before[name]).double()
            best = torch.stack([truncated(matrix, 3) for matrix in delta])
            assert torch.allclose((found[name] - before[name]).double(), best, atol=1e-5), name
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
def test_a_size_is_kept_with_stacks_and_what_is_saved_whole(dtype, experts, tmp_path):
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


def test_no_stack_is_whole_in_memory(experts, tmp_path, monkeypatch):
    """Experts are read one at a time, stored together or one by one."""
    from adapterkit.engines.local import Inputs

    sizes, tensor = [], Inputs.tensor
    monkeypatch.setattr(
        Inputs, "tensor", lambda self, spec: sizes.append(spec.shape) or tensor(self, spec)
    )
    for kind in ("mixtral", "gpt_oss"):
        (tmp_path / kind).mkdir()
        base, after, _ = experts(kind, lambda name, t: moved(name, t) if t.dim() == 3 else t)
        sizes.clear()
        adapterkit.extract(base, after, out=tmp_path / kind / "out", rank=2)
        assert sizes and all(len(shape) < 3 for shape in sizes)


def test_large_weights_are_read_in_blocks(saved, tmp_path, monkeypatch):
    from adapterkit.engines.local import Inputs

    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(3, linear))
    adapterkit.extract(base, after, out=tmp_path / "whole", rank=3)
    monkeypatch.setattr("adapterkit.tasks.difference.BLOCK", 100)
    sizes, tensor = [], Inputs.tensor
    monkeypatch.setattr(
        Inputs, "tensor", lambda self, spec: sizes.append(spec.shape) or tensor(self, spec)
    )
    adapterkit.extract(base, after, out=tmp_path / "blocks", rank=3)
    assert sizes and all(shape[0] <= 3 for shape in sizes if len(shape) == 2)
    assert (tmp_path / "whole" / MODEL).read_bytes() == (tmp_path / "blocks" / MODEL).read_bytes()


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_that_changed(stored, cached_folder, tmp_path):
    """They are saved once: loaded into the model itself, the value is the head's too."""
    base = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    change = lambda name, t: (
        t + 0.1 * torch.randn(t.shape) if "embed" in name else low_rank(2)(name, t)
    )
    after = tuned(base, oracle.tied_llama, tmp_path / "tuned", change)
    tensors = load_file(after / "model.safetensors")
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert [key for key in held if "lora" not in key] == [
        "base_model.model.model.embed_tokens.weight"
    ]
    check_both_ways(base, tmp_path / "out", after, oracle.tied_llama, tmp_path)
    assert oracle.stored(tmp_path / "back").keys() == oracle.stored(base).keys()
    expected = logits(oracle.load(oracle.tied_llama, after))
    theirs = oracle.peft_model(oracle.load(oracle.tied_llama, base), tmp_path / "out")
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    assert torch.allclose(
        logits(oracle.load(oracle.tied_llama, tmp_path / "back")), expected, atol=1e-5
    )


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


def test_embeddings_that_are_tied_threefold(saved, tmp_path):
    base = saved("t5")
    after = tuned(
        base,
        oracle.t5,
        tmp_path / "tuned",
        lambda n, t: t + 0.1 if "shared" in n else low_rank(2, linear)(n, t),
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert [key for key in load_file(tmp_path / "out" / MODEL) if "lora" not in key] == [
        "base_model.model.shared.weight"
    ]
    check_both_ways(base, tmp_path / "out", after, oracle.t5, tmp_path)


def test_what_cannot_be_extracted_is_refused(saved, tmp_path):
    base = saved("llama")
    with pytest.raises(Refused, match="nothing to extract"):
        adapterkit.extract(base, base, out=tmp_path / "out", rank=2, include="nowhere")
    with pytest.raises(Refused, match="alone"):
        adapterkit.extract(base, saved("gpt2"), out=tmp_path / "out", rank=2)
    with pytest.raises(Refused, match="rank"):
        adapterkit.extract(base, base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(saved, tmp_path):
    base = saved("llama")
    after = tuned(base, oracle.llama, tmp_path / "tuned", low_rank(3))
    argv = [
        "extract",
        str(base),
        str(after),
        "--rank",
        "3",
        "--dtype",
        "bf16",
        "--out",
        str(tmp_path / "out"),
    ]
    assert (
        CliRunner().invoke(main, [*argv, "--dry-run"]).exit_code == 0
        and not (tmp_path / "out").exists()
    )
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    adapterkit.verify(tmp_path / "out")


def everything(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A change of full rank of every parameter."""
    generator = torch.Generator().manual_seed(len(name) + tensor.numel())
    return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("name", architectures.BUILDS)
def test_a_full_fine_tune_answers_as_it_does_itself(name, cached_folder, tmp_path):
    """Every parameter has changed, bare ones beside modules too: at full rank PEFT's model and the
    merged one give the fine-tune's answers."""
    build = architectures.BUILDS[name]
    base = cached_folder(
        f"architectures-{name}", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    after = tuned(base, build, tmp_path / "tuned", everything)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    held = load_file(tmp_path / "out" / MODEL)
    assert (
        receipt.data["totals"]["tensors"] == receipt.data["totals"]["tensors_changed"] == len(held)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*adapter keys")
        theirs = peft.PeftModel.from_pretrained(oracle.load(build, base), tmp_path / "out").eval()
        left = peft.set_peft_model_state_dict(theirs, held).unexpected_keys
    assert not left
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, before = (
        architectures.answers(name, oracle.load(build, folder)) for folder in (after, base)
    )
    assert all(
        float((a - b).abs().max()) > 0.05 * float(a.abs().max())
        for a, b in zip(expected, before, strict=True)
    )
    for model in (theirs, oracle.load(build, tmp_path / "back")):
        for found, answer in zip(architectures.answers(name, model), expected, strict=True):
            torch.testing.assert_close(found, answer, rtol=0, atol=2e-5 * float(answer.abs().max()))


def test_names_that_others_end_with(cached_folder, tmp_path):
    """PEFT goes by the ends of names: the last norm of a bare model would be each layer's norm to
    it."""
    build = functools.partial(oracle.llama, cls="LlamaModel")
    base = cached_folder("extract-bare", lambda folder: oracle.save_base(build(), folder, "fp32"))
    after = tuned(
        base,
        build,
        tmp_path / "tuned",
        lambda name, t: everything(name, t) if "input_layernorm" not in name else t,
    )
    adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    assert "norm.weight" in config_of(tmp_path / "out")["modules_to_save"]
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


def test_targets_that_others_end_with(tmp_path):
    """A list would mean both towers; the regex means one."""
    from adapterkit.planning.extract import ExtractedAdapter

    others = frozenset({"layers.0.q", "encoder.layers.0.q", "layers.0", "encoder"})
    output = ExtractedAdapter([], [], {}, {}, "", others=others)
    assert output._modules({"encoder.layers.0.q"}) == ["encoder.layers.0.q"]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    model["encoder"] = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])}
    )
    with oracle.quiet():
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=output._modules({"layers.0.q"}))
        )
    assert [name for name, _ in wrapped.named_modules() if name.endswith(".lora_A")] == [
        "base_model.model.layers.0.q.lora_A"
    ]


def test_a_part_of_a_fused_bias_is_its_own_slice(cached_folder, tmp_path):
    """The file has one bias for q, k and v, of which k's part changed."""
    build = architectures.BUILDS["gte"]
    base = cached_folder(
        "architectures-gte", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    change = lambda name, t: t + 0.1 if name.endswith("layers.0.self_attn.k_proj.bias") else t
    after = tuned(base, build, tmp_path / "tuned", change)
    fused = [key for key in oracle.stored(after) if "qkv" in key and key.endswith("bias")]
    assert fused
    adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert [(key.split("layers.")[1], tuple(t.shape)) for key, t in held.items()] == [
        ("0.self_attn.k_proj.bias", (32,))
    ]
    check_both_ways(base, tmp_path / "out", after, build, tmp_path)


def test_other_widths_are_refused_all_together(cached_folder, tmp_path):
    build = lambda width: (
        lambda folder: oracle.save_base(oracle.llama(intermediate_size=width), folder)
    )
    bases = [cached_folder(f"extract-width-{width}", build(width)) for width in (48, 64)]
    with pytest.raises(Refused, match="shapes that differ") as caught:
        adapterkit.extract(*bases, out=tmp_path / "out", rank=2)
    text = str(caught.value)
    assert text.count("expected") == 1 and not (tmp_path / "out").exists()
    assert all(
        f"layers.{i}.mlp.{leaf}_proj.weight" in text
        for i in (0, 1)
        for leaf in ("gate", "up", "down")
    )
    assert "(48, 32) and (64, 32)" in text
    adapterkit.extract(*bases, out=tmp_path / "out", rank=2, exclude="mlp")


def test_a_grown_vocabulary_is_saved_whole(saved, tmp_path):
    base = saved("llama")
    model = oracle.load(oracle.llama, base)
    with oracle.quiet():
        model.resize_token_embeddings(88)
        model.save_pretrained(tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned", out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    expected, found = oracle.stored(tmp_path / "tuned"), oracle.stored(tmp_path / "back")
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )
    with oracle.quiet():
        grown = oracle.load(oracle.llama, base)
        grown.resize_token_embeddings(88)
        theirs = oracle.peft_model(grown, tmp_path / "out")
    assert torch.equal(logits(theirs), logits(oracle.load("LlamaForCausalLM", tmp_path / "tuned")))


def test_values_alone_make_an_adapter_without_factors(saved, tmp_path):
    """Norms and biases changed, no matrix did: no factors of zeros, and PEFT reads it."""
    base = saved("bert")
    change = lambda name, t: (
        t + 0.1 if "LayerNorm" in name or name.endswith("layer.1.attention.self.key.bias") else t
    )
    after = tuned(base, oracle.bert, tmp_path / "tuned", change)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / MODEL)
    assert held and not any("lora" in key for key in held)
    assert receipt.data["totals"]["tensors_changed"] == len(held)
    check_both_ways(base, tmp_path / "out", after, oracle.bert, tmp_path)


def test_biases_of_unchanged_layers_are_not_written(saved, tmp_path):
    base = saved("bert")
    change = lambda name, t: (
        t + 0.1 if name.endswith(("layer.0.attention.self.query.weight", "self.query.bias")) else t
    )
    after = tuned(base, oracle.bert, tmp_path / "tuned", change)
    receipt = adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    query = "base_model.model.encoder.layer.{}.attention.self.query"
    factors = {
        f"{query.format(0)}.{leaf}"
        for leaf in ("lora_A.weight", "lora_B.weight", "base_layer.bias")
    }
    assert load_file(tmp_path / "out" / MODEL).keys() == factors | {f"{query.format(1)}.bias"}
    assert receipt.data["totals"]["tensors_changed"] == receipt.data["totals"]["tensors"] == 4
    check_both_ways(base, tmp_path / "out", after, oracle.bert, tmp_path)


def test_two_equal_models_have_no_difference(saved, tmp_path):
    with pytest.raises(AdapterkitError, match="no weight differs"):
        adapterkit.extract(saved("llama"), saved("llama"), out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_base_lacks(saved, tmp_path):
    """The fine-tune is a classifier; PEFT loads the adapter on the base with a fresh head."""
    base = saved("bert")
    with oracle.quiet():
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    low = low_rank(
        2, lambda name, t: t.dim() == 2 and "embed" not in name and "classifier" not in name
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(low(name, parameter.detach().clone()))
    with oracle.quiet():
        model.save_pretrained(tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned", out=tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"
    with oracle.quiet():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        fresh = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=3
        ).eval()
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    assert torch.allclose(logits(theirs), logits(model.eval()), atol=1e-5)
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    ours = oracle.load("BertForSequenceClassification", tmp_path / "back")
    assert torch.allclose(logits(ours), logits(model), atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_embedding_stored_twice(equal, cached_folder, tmp_path):
    base = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    after = tuned(
        base,
        oracle.tied_llama,
        tmp_path / "tuned",
        lambda name, t: t + 0.1 if "embed" in name else t,
    )
    tensors = load_file(after / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if equal else 0.1)
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    if equal:
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
        assert list(load_file(tmp_path / "out" / MODEL)) == [
            "base_model.model.model.embed_tokens.weight"
        ]
        return
    with pytest.raises(Refused, match="stored with two values"):
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tie_of_one_side(tied_first, saved, cached_folder, tmp_path):
    tied = cached_folder(
        "extract-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    base, after = (tied, saved("llama")) if tied_first else (saved("llama"), tied)
    builds = (oracle.tied_llama, oracle.llama) if tied_first else (oracle.llama, oracle.tied_llama)
    adapterkit.extract(base, after, out=tmp_path / "out", rank=1000)
    expected = logits(oracle.load(builds[1], after))
    theirs = oracle.peft_model(oracle.load(builds[0], base), tmp_path / "out")
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "back")
    assert torch.allclose(
        logits(oracle.load("LlamaForCausalLM", tmp_path / "back")), expected, atol=1e-5
    )


def test_what_its_own_reader_refuses_is_not_published(saved, tmp_path, monkeypatch):
    """As if the config did not speak of what was saved whole."""
    base = saved("vit")
    after = tuned(base, oracle.vit, tmp_path / "tuned", everything)
    monkeypatch.setattr("adapterkit.planning.extract.Extraction.settings", lambda self: {})
    with pytest.raises(AdapterkitError, match="of which the config does not speak"):
        adapterkit.extract(base, after, out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
