"""Adapters whose initial factors lie beside them: the base lacks these, and is never written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.runtime import load
from tests.support import oracle
from tests.support.live import SIZES, llama, peft_of, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def mixtral():
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


MODELS = {
    "llama": (llama, "all-linear"),
    "gpt2": (oracle.gpt2, "all-linear"),
    "experts": (mixtral, r".*(q_proj|experts\.(gate_up_proj|down_proj))"),
}


@pytest.fixture(params=MODELS)
def started(request, tmp_path) -> tuple:
    """A model, and an adapter of it by PiSSA with an implicit residual."""
    build, targets = MODELS[request.param]
    build().save_pretrained(tmp_path / "base")
    adapterkit.init(
        tmp_path / "base", method="pissa", rank=4, alpha=6, targets=targets,
        rank_for=[r".*\.0\..*=2"], residual="implicit", out=tmp_path / "new",
    )  # fmt: skip
    return build, tmp_path / "new" / "adapter", tmp_path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def train(adapters) -> None:
    optimizer = torch.optim.SGD(adapters.parameters(), lr=30.0)
    for _ in range(3):
        adapters.model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# PEFT does not look for parameters there
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_from_the_original_base_to_the_trained_model(started):
    """Equal to the base at the start; what is trained is saved for the original base, and merges to
    the trained logits, as the folder with its initial factors does."""
    build, folder, tmp_path = started
    expected = logits(build())
    adapters = load(build(), folder, trainable=True)
    torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-5, atol=1e-5)
    assert not any("initial" in name for name, _ in adapters.model.named_parameters())
    train(adapters)
    trained = logits(adapters.model)
    assert (trained - expected).abs().max() > 1e-3
    adapters.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert config["init_lora_weights"] is True
    again = load(build(), tmp_path / "saved")
    torch.testing.assert_close(logits(again.model), trained, rtol=1e-4, atol=1e-5)
    adapterkit.merge(tmp_path / "base", [tmp_path / "saved"], out=tmp_path / "merged")
    merged = type(build()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    adapters.merge()
    torch.testing.assert_close(logits(adapters.model), trained, rtol=1e-4, atol=1e-5)
    adapters.detach()
    assert torch.equal(logits(adapters.model), expected)
    theirs = peft_of(tmp_path / "saved", build())
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=1e-5)


def test_the_norm_is_of_the_change_from_the_start(started):
    build, folder, _ = started
    adapters = load(build(), folder)
    parts = [part for _, part in adapters.state.adapters["default"].patches()]
    assert all(part.norm() < 1e-5 * float((part.b @ part.a).norm()) for part in parts)
    assert all(part.delta().abs().max() < 1e-6 for part in parts)


def test_newer_factors_than_the_initial_ones_are_used(started):
    """The factors in the folder are newer than those beside them: the runtime, `merge` and `rebase`
    mean the same."""
    build, folder, tmp_path = started
    torch.manual_seed(0)
    tensors = load_file(folder / WEIGHTS)
    tensors = {key: value + 0.05 * torch.randn_like(value) for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    live = logits(load(build(), folder).model)
    assert (live - logits(build())).abs().max() > 1e-3
    adapterkit.merge(tmp_path / "base", [folder], out=tmp_path / "merged")
    merged = type(build()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-5)
    adapterkit.rebase(folder, out=tmp_path / "plain")
    plain = load(build(), tmp_path / "plain")
    torch.testing.assert_close(logits(plain.model), live, rtol=1e-4, atol=1e-5)


def test_initial_factors_have_a_scale_of_their_own(started):
    build, folder, _ = started
    file, config = folder / "initial" / WEIGHTS, folder / "initial" / CONFIG
    settings = json.loads(config.read_text())
    settings["lora_alpha"] *= 2
    settings["alpha_pattern"] = {key: 2 * x for key, x in settings["alpha_pattern"].items()}
    config.write_text(json.dumps(settings))
    tensors = load_file(file)
    halved = {key: value / (2 if "lora_B" in key else 1) for key, value in tensors.items()}
    save_file(halved, file, {"format": "pt"})
    adapters = load(build(), folder)
    torch.testing.assert_close(logits(adapters.model), logits(build()), rtol=1e-5, atol=1e-5)


def test_rows_and_swap(started):
    build, folder, _ = started
    expected = logits(build())
    adapters = load(build(), folder, name="one", trainable=True)
    train(adapters)
    trained = logits(adapters.model)
    adapters.state.select({"one": 1.0})
    with torch.no_grad(), adapters.rows(["one", None]):
        mixed = adapters.model(input_ids=tokens()).logits
    torch.testing.assert_close(mixed[0], trained[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], expected[1], rtol=1e-4, atol=1e-5)
    adapters.swap("one", folder)
    torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-5, atol=1e-5)


def test_without_the_initial_factors(started):
    build, folder, _ = started
    shutil.rmtree(folder / "initial")
    model = build()
    before = logits(model)
    with pytest.raises(Refused, match="without the folder initial/"):
        load(model, folder)
    assert torch.equal(logits(model), before) and not hasattr(model, "_adapterkit")


def test_initial_factors_of_other_modules_and_shapes(started):
    build, folder, _ = started
    file, config = folder / "initial" / WEIGHTS, folder / "initial" / CONFIG
    tensors, settings = load_file(file), json.loads(config.read_text())
    module = "self_attn.q_proj" if any("q_proj" in key for key in tensors) else "attn.c_attn"
    save_file({k: v for k, v in tensors.items() if module not in k}, file, {"format": "pt"})
    with pytest.raises(Refused, match=f"only one of .*{module}"):
        load(build(), folder)
    wrong = {k: v[:, 1:].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wrong, file, {"format": "pt"})
    with pytest.raises(Refused, match="for this model|shape"):
        load(build(), folder)
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(settings))
    assert load(build(), folder)


def test_a_folder_by_hand(tmp_path):
    """Any factors may be the initial ones."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "hand")
    model.save_pretrained(tmp_path / "hand" / "initial")
    settings = json.loads((tmp_path / "hand" / CONFIG).read_text())
    settings["init_lora_weights"] = "implicit_random"
    (tmp_path / "hand" / CONFIG).write_text(json.dumps(settings))
    adapters = load(llama(), tmp_path / "hand")
    torch.testing.assert_close(logits(adapters.model), logits(llama()), rtol=1e-5, atol=1e-6)
