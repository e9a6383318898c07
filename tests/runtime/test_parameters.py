"""LoRA on parameters: the values, gradients and files of PEFT."""

import copy
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.experts import (
    CASES,
    COMMON,
    EXPERTS,
    IMPLEMENTATIONS,
    MODELS,
    TOKENS,
    close,
    loss_of,
    parameters_of,
    peft_model,
    randomize,
    stored_gradients,
    tiny,
)


@pytest.mark.parametrize("kind, implementation", CASES)
def test_experts_as_in_peft(kind, implementation, tmp_path):
    """Values and gradients; nothing is summed on the way."""
    base = tiny(kind, implementation)
    other = peft_model(copy.deepcopy(base), parameters_of(kind))
    other.save_pretrained(tmp_path)
    want, want_embeddings = loss_of(other)
    handle = load(base, tmp_path, trainable=True)
    got, embeddings = loss_of(base)
    close(got, want)
    close(embeddings, want_embeddings)
    gradients = stored_gradients(handle)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in other.named_parameters()
        if "lora_" in name
    }
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(gradients[name], gradient)


@pytest.mark.parametrize("kind, parameters", [
    *((kind, parameters_of(kind)) for kind in MODELS),
    ("mixtral", ["down_proj"]),
    ("llama", ["q_proj.weight", "embed_tokens.weight"]),
    ("gpt2", ["c_attn.weight"]),
])  # fmt: skip
def test_peft_reads_what_is_saved(kind, parameters, tmp_path):
    base = tiny(kind)
    other = copy.deepcopy(base)
    config = LoraConfig(3, 5, [], parameters=parameters)
    handle = attach(base, config, seed=0)
    assert [p.shape for p in handle.parameters()]
    randomize(handle.parameters())
    want, _ = loss_of(base)
    handle.save(tmp_path)
    got, _ = loss_of(PeftModel.from_pretrained(copy.deepcopy(other), tmp_path))
    close(got, want)
    load(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, base(TOKENS).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_factors_on_a_bfloat16_base(implementation, tmp_path):
    """Against float64, experts alone; PEFT rounds the factors and the sum to bfloat16."""
    handle = attach(tiny("mixtral"), LoraConfig(3, 5, [], parameters=EXPERTS), seed=0)
    randomize(p.mul_(0.05) for p in handle.parameters())
    for _, part in handle.state.adapters["default"].patches():
        part.rescale(0.05)  # small against the weights, as a trained delta is
    handle.save(tmp_path)
    base = tiny("mixtral", implementation).bfloat16()
    other = copy.deepcopy(base)
    exact = copy.deepcopy(base).double()
    exact.set_experts_implementation("eager")
    handle = load(base, tmp_path)
    PeftModel.from_pretrained(other, tmp_path)
    for path, site in handle.state.sites.items():
        for part in site.patches["default"].values():
            assert part.a.dtype == torch.float32
            parameter = exact.get_submodule(path).get_parameter(part.leaf)
            parameter.data += part.delta()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    index, weights = torch.arange(128).view(64, 2) % 4, torch.full((64, 2), 0.5)

    @torch.no_grad()
    def run(model):
        experts = model.model.layers[0].mlp.experts
        dtype = next(experts.parameters()).dtype
        return experts(x.bfloat16().to(dtype), index, weights.to(dtype)).double()

    want = run(exact)
    assert (run(base) - want).norm() < (run(other) - want).norm()


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
def test_layouts_of_both_versions_of_peft(version, tmp_path):
    """Up to 0.18 PEFT took all experts as (in, out). gate_up_proj is (4, 64, 32), so shapes tell;
    down_proj (4, 32, 32) is square."""
    base = tiny("mixtral")
    handle = attach(copy.deepcopy(base), LoraConfig(3, 5, [], parameters=EXPERTS))
    randomize(handle.parameters())
    want = handle.model(TOKENS).logits
    handle.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["peft_version"] = version
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if version == "0.18.1":
        for key in [key for key in tensors if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            a, b = tensors[key].unflatten(0, (4, 3)), tensors[other].unflatten(1, (3, 4))
            tensors[key] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
            tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    if version is None:
        with pytest.raises(AdapterkitError, match="no peft_version"):
            load(base, tmp_path)
        return
    handle = load(base, tmp_path)
    close(base(TOKENS).logits, want)
    handle.save(tmp_path / "again")
    close(PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "again")(TOKENS).logits, want)


def refused(match, action, model):
    """The action is refused, and the model as it was."""
    before = {name: (type(m), m.__dict__.get("forward")) for name, m in model.named_modules()}
    with pytest.raises(AdapterkitError, match=match):
        action()
    after = {name: (type(m), m.__dict__.get("forward")) for name, m in model.named_modules()}
    assert before == after


def test_adapters_of_another_number_of_experts_are_refused(tmp_path):
    handle = attach(tiny("mixtral"), LoraConfig(3, 5, [], parameters=EXPERTS))
    handle.save(tmp_path)
    config = {**MODELS["mixtral"], "num_local_experts": 8}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **COMMON | config))
    refused("factors of", lambda: load(other, tmp_path), other)


@pytest.mark.parametrize("settings, match", [
    ({"parameters": EXPERTS, "dropout": 0.1}, "dropout"),
    ({"parameters": EXPERTS, "dora": True}, "dora"),
    ({"parameters": EXPERTS, "lora_bias": True}, "lora_bias"),
    ({"parameters": ["q_proj.weight"], "targets": ["q_proj"]}, "is a target"),
    ({"parameters": ["input_layernorm.weight"]}, "shape"),
    ({"parameters": ["no_such"]}, "no_such"),
    ({"parameters": ["outer", "inner"]}, "outer.*inner|inside"),
    ({"parameters": ["whole_numbers"]}, "int64"),
])  # fmt: skip
def test_settings_that_are_refused(settings, match):
    model = tiny("mixtral")
    layer = model.model.layers[0].self_attn
    layer.outer, layer.q_proj.inner = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    layer.o_proj.whole_numbers = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), False)
    settings = {"targets": [], **settings}
    refused(match, lambda: attach(model, LoraConfig(**settings)), model)


class Outer(nn.Module):
    """Parameters of its own, and a layer inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x @ self.first.T) @ self.second


def outer_model():
    model = nn.Module()
    model.outer = Outer()
    model.forward = lambda x: model.outer(x)
    return model.eval()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT, wrongly
@pytest.mark.parametrize("theirs", [False, True])
def test_targets_inside_a_module_with_parameters(theirs, tmp_path):
    """PEFT's keys have a `base_layer` for each of the outer parameters."""
    names = ["second", "first"]
    x = torch.randn(3, 6)
    if theirs:
        config = PeftConfig(
            r=3, lora_alpha=5, target_modules=["inner"], target_parameters=names,
            rank_pattern={"outer.second": 2}, alpha_pattern={"inner": 7},
        )  # fmt: skip
        model = get_peft_model(outer_model(), config)
        randomize(p for name, p in model.named_parameters() if "lora_" in name)
        want = model(x)
        model.save_pretrained(tmp_path)
        model = outer_model()
        load(model, tmp_path)
    else:
        settings = {"rank_pattern": {"outer.second": 2}, "alpha_pattern": {"inner": 7}}
        model = outer_model()
        handle = attach(model, LoraConfig(3, 5, ["inner"], parameters=names, **settings))
        randomize(handle.parameters())
        want = model(x)
        handle.save(tmp_path)
        model = PeftModel.from_pretrained(outer_model(), tmp_path)
        again = outer_model()
        load(again, tmp_path)
        assert torch.equal(again(x), want)
    close(model(x), want)
