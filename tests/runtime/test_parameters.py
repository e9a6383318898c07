"""LoRA on parameters: the experts of mixture models, routers, and weights of plain layers."""

import copy
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from adapterkit import LoraConfig
from adapterkit.errors import AdapterkitError
from adapterkit.runtime import attach, load
from adapterkit.runtime.optimizers import LoraFA, Riemannian, loraplus

COMMON = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
        "intermediate_size_mlp": 32, "moe_layers": [0, 1], "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_shared_experts": 1, "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8,
        "num_key_value_heads": 4, "num_attention_heads": 8,
    },
}  # fmt: skip
ONE_IMPLEMENTATION = ("llama4_text", "jetmoe")
EXPERTS = ("gate_up_proj", "down_proj")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [
    (kind, implementation)
    for kind in MODELS
    for implementation in (IMPLEMENTATIONS[:1] if kind in ONE_IMPLEMENTATION else IMPLEMENTATIONS)
]
TOKENS = torch.tensor([[5, 9, 3, 17, 4, 30, 8], [6, 40, 11, 22, 9, 7, 12]])


def tiny(kind, implementation="eager"):
    config = AutoConfig.for_model(kind, **{**COMMON, **MODELS.get(kind, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation=implementation
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def parameters_of(kind):
    if kind == "jetmoe":
        return ["input_linear.weight", "mlp.output_linear.weight"]
    return list(EXPERTS)


def randomize(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3, generator=generator)


def peft_model(model, parameters, seed=0, **settings):
    config = PeftConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=parameters, **settings
    )
    model = get_peft_model(model, config)
    randomize((p for name, p in model.named_parameters() if "lora_" in name), seed)
    return model.eval()


def loss_of(model, inputs=TOKENS):
    embeddings = model.get_input_embeddings()(inputs).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    loss = logits.float().square().mean()
    loss.backward()
    return logits.detach(), embeddings.grad


def stored_gradients(handle, name="default"):
    """The gradients of an adapter by their keys in a file."""
    gradients = {}
    for site, part in handle.state.adapters[name].parts():
        values = part.a.data, part.b.data
        part.a.data, part.b.data = part.a.grad, part.b.grad
        gradients |= part.stored(site.path)
        part.a.data, part.b.data = values
    return {key.removeprefix("base_model.model."): g.detach() for key, g in gradients.items()}


def close(got, want):
    got, want = got.detach(), want.detach()
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * float(want.abs().max()))


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


def dense(handle, name, path, leaf):
    """scale·b·a of an adapter on a parameter, as a matrix or a stack."""
    return handle.state.sites[path].parts[name][f"weight:{leaf}"].delta()


def two_adapters(base, parameters=EXPERTS):
    handle = attach(base, LoraConfig(3, 5, [], parameters=parameters), name="first")
    handle.attach(LoraConfig(2, 3, [], parameters=parameters[-1:]), name="second")
    for seed, name in enumerate(handle.names):
        handle.activate(name)
        randomize(handle.parameters(name), seed)
    return handle


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_adapters_with_weights(implementation):
    """PEFT needs the same parameters in all of them, and has no weights."""
    base = tiny("mixtral", implementation)
    other = copy.deepcopy(base)
    handle = two_adapters(base)
    table = {"second": -0.3, "first": 0.7}
    handle.activate(table)
    with torch.no_grad():
        for path, site in handle.state.sites.items():
            for name, weight in table.items():
                for part in site.parts[name].values():
                    parameter = other.get_submodule(path).get_parameter(part.leaf)
                    parameter += weight * part.delta()
    close(base(TOKENS).logits, other(TOKENS).logits)


def test_a_module_and_its_weight_in_two_adapters():
    base = tiny("llama")
    want = copy.deepcopy(base)
    handle = attach(base, LoraConfig(3, 5, ["q_proj"]), name="module")
    handle.attach(LoraConfig(2, 3, [], parameters=["q_proj.weight"]), name="parameter")
    for name in handle.names:
        randomize(handle.parameters(name))
    handle.activate(["module", "parameter"])
    with torch.no_grad():
        for path, site in handle.state.sites.items():
            for parts in site.parts.values():
                for part in parts.values():
                    want.get_submodule(path).weight += part.delta()
    close(base(TOKENS).logits, want(TOKENS).logits)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator makes; views have their owner's memory."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.elements = max(self.elements, storage.nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("kind, implementation", [
    case for case in CASES if case[1] != "batched_mm"
])  # fmt: skip
def test_nothing_of_the_experts_size_is_made(kind, implementation):
    """In a training step; batched_mm itself gathers the weights of its tokens' experts."""
    base = tiny(kind, implementation)
    handle = attach(base, LoraConfig(2, 3, [], parameters=parameters_of(kind)))
    randomize(handle.parameters())
    stacks = [
        p.numel() for n, p in base.named_parameters() if p.ndim == 3 and "adapterkit" not in n
    ]
    with Largest(base) as largest:
        loss_of(base, TOKENS[:1, :2])
    assert largest.elements < min(stacks)
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_checkpointing(implementation, use_reentrant):
    base = tiny("mixtral", implementation).train()
    handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
    randomize(handle.parameters())
    loss_of(base)
    want = [p.grad.clone() for p in handle.parameters()]
    base.zero_grad()
    enable = getattr(base, "activation_checkpointing_enable", None)
    enable = enable or base.gradient_checkpointing_enable  # before transformers 5.20
    enable({"use_reentrant": use_reentrant})
    loss_of(base)
    for parameter, gradient in zip(handle.parameters(), want, strict=True):
        close(parameter.grad, gradient)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_factors_on_a_bfloat16_base(implementation, tmp_path):
    """Against float64, experts alone; PEFT rounds the factors and the sum to bfloat16."""
    handle = attach(tiny("mixtral"), LoraConfig(3, 5, [], parameters=EXPERTS), seed=0)
    randomize(p.mul_(0.05) for p in handle.parameters())
    for _, part in handle.state.adapters["default"].parts():
        part.rescale(0.05)  # small against the weights, as a trained delta is
    handle.save(tmp_path)
    base = tiny("mixtral", implementation).bfloat16()
    other = copy.deepcopy(base)
    exact = copy.deepcopy(base).double()
    exact.set_experts_implementation("eager")
    handle = load(base, tmp_path)
    PeftModel.from_pretrained(other, tmp_path)
    for path, site in handle.state.sites.items():
        for part in site.parts["default"].values():
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


def test_kernels_of_experts_get_tensors():
    """Another implementation may be a kernel, or compute its own gradients."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            assert isinstance(weight, torch.Tensor)
            ctx.save_for_backward(x, weight)
            return x @ weight.mT

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.mT @ x

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            where, which = torch.where(index == expert)
            gate, up = Product.apply(hidden[where], self.gate_up_proj[expert]).chunk(2, -1)
            out = Product.apply(self.act_fn(gate) * up, self.down_proj[expert])
            y = y.index_add(0, where, out * weights[where, which, None])
        return y

    results = []
    ExpertsInterface.register("kernel", forward)
    try:
        for implementation in ("eager", "kernel"):
            base = tiny("mixtral", implementation)
            handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
            randomize(handle.parameters())
            logits, _ = loss_of(base)
            results.append([logits, *(p.grad for p in handle.parameters())])
    finally:
        del ExpertsInterface._global_mapping["kernel"]
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_a_parameter_that_its_module_does_not_read_is_refused():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.holder = nn.Linear(4, 4)

        def forward(self, x):
            return self.holder(x)[..., :0].sum() + x @ self.holder.other

    model = Reader()
    model.holder.other = nn.Parameter(torch.ones(4, 2))
    attach(model, LoraConfig(2, 2, [], parameters=["other"]))
    with pytest.raises(AdapterkitError, match="Linear does not read other in its forward"):
        model(torch.ones(1, 4))


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


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama"])
def test_merge_and_unmerge(kind):
    base = tiny(kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = base(TOKENS).logits
    parameters = ["q_proj.weight"] if kind == "llama" else EXPERTS
    handle = two_adapters(base, parameters)
    handle.activate({"first": 0.7, "second": -0.3})
    want = base(TOKENS).logits
    handle.merge()
    close(base(TOKENS).logits, want)
    handle.unmerge()
    assert torch.equal(base(TOKENS).logits, want)
    with handle.disabled():
        assert torch.equal(base(TOKENS).logits, plain)
    handle.detach()
    assert torch.equal(base(TOKENS).logits, plain)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in base.parameters())


def test_report_and_rescale():
    base = tiny("gpt_oss")
    handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
    randomize(handle.parameters())
    handle.rescale(0.5, name="default")
    rows = handle.report()
    assert [row.module for row in rows][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert {row.kind for row in rows} == {"GptOssExperts"}
    (share,) = rows[0].adapters
    assert share.rank == 3 and share.scale == pytest.approx(5 / 6)
    delta = dense(handle, "default", "model.layers.0.mlp.experts", "gate_up_proj")
    assert share.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def refused(match, action, model):
    """The action is refused, and the model as it was."""
    before = {name: (type(m), m.__dict__.get("forward")) for name, m in model.named_modules()}
    with pytest.raises(AdapterkitError, match=match):
        action()
    after = {name: (type(m), m.__dict__.get("forward")) for name, m in model.named_modules()}
    assert before == after


def test_what_does_not_fit_is_refused(tmp_path):
    handle = attach(tiny("mixtral"), LoraConfig(3, 5, [], parameters=EXPERTS))
    handle.save(tmp_path)
    config = {**MODELS["mixtral"], "num_local_experts": 8}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **COMMON | config))
    refused("factors of", lambda: load(other, tmp_path), other)
    gpt_oss = tiny("gpt_oss")  # (in, out): the same sizes the other way round
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in list(tensors):
        if ".base_layer." in key:
            del tensors[key]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load(gpt_oss, tmp_path)


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


@pytest.mark.parametrize("parameters", [EXPERTS, ["mlp.gate.weight", "down_proj"]])
@pytest.mark.parametrize("kind, implementation", [
    *(("mixtral", implementation) for implementation in IMPLEMENTATIONS),
    ("qwen3_moe", "grouped_mm"), ("deepseek_v3", "eager"), ("gpt_oss", "eager"),
])  # fmt: skip
@torch.no_grad()
def test_mixed_rows(kind, implementation, parameters):
    """Experts run on the tokens of one adapter at a time; PEFT has no mixed batches here."""
    base = tiny(kind, implementation)
    if kind == "gpt_oss":
        parameters = [name.replace("mlp.gate.", "mlp.router.") for name in parameters]
    handle = two_adapters(base, parameters)
    for name in handle.names:
        for parameter in handle.state.adapters[name].parts():
            parameter[1].requires_grad_(False)
    names = ["second", None, "first", "second", "first"]
    tokens = torch.cat([TOKENS, TOKENS.flip(0), TOKENS[:1] + 3])
    want = []
    for name, row in zip(names, tokens, strict=True):
        handle.activate(name)
        want.append(base(row[None]).logits)
    handle.activate("first")
    with handle.rows(names):
        got = base(tokens).logits
    close(got, torch.cat(want))
    with handle.rows(["first", "second"]):
        mixed = base.generate(TOKENS, max_new_tokens=4, num_beams=2, do_sample=False)
    for name, row, generated in zip(["first", "second"], TOKENS, mixed, strict=True):
        handle.activate(name)
        alone = base.generate(row[None], max_new_tokens=4, num_beams=2, do_sample=False)[0]
        assert torch.equal(generated[: len(alone)], alone)


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe"])
def test_mixed_rows_of_regrouped_tokens_are_refused(kind):
    """These experts get the tokens by expert: nothing says which row one belongs to."""
    handle = attach(tiny(kind), LoraConfig(2, 3, [], parameters=parameters_of(kind)))
    with pytest.raises(AdapterkitError, match="routed to them"), handle.rows(["default", None]):
        raise AssertionError
    assert list(handle.active) == ["default"]


class Two(nn.Module):
    """Two linear layers: a stack of experts, or a module each."""

    def __init__(self, stacked):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(2, 6, 5, generator=generator)
        self.stacked = stacked
        if stacked:
            self.inner = nn.Module()
            self.inner.forward = self.run
            self.inner.weight = nn.Parameter(weight)
        else:
            self.inner = nn.ModuleList([nn.Linear(5, 6, bias=False) for _ in range(2)])
            for layer, matrix in zip(self.inner, weight, strict=True):
                layer.weight.data = matrix

    def run(self, x):
        return torch.stack([nn.functional.linear(x, self.inner.weight[e]) for e in range(2)])

    def forward(self, x):
        return self.inner(x) if self.stacked else torch.stack([layer(x) for layer in self.inner])


@pytest.mark.parametrize("optimizer", [
    lambda h: LoraFA(h, lr=0.1),
    lambda h: Riemannian(h, torch.optim.SGD, lr=0.1),
    lambda h: loraplus(h, torch.optim.AdamW, lr=0.1, ratio=4),
])  # fmt: skip
def test_optimizers_take_each_expert_as_a_layer(optimizer):
    """PEFT's LoRA-FA multiplies across experts."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    factors = []
    for stacked in (True, False):
        model = Two(stacked)
        settings = {"targets": [], "parameters": ["weight"]} if stacked else {"targets": ["0", "1"]}
        handle = attach(model, LoraConfig(2, 3, **settings), seed=0)
        parts = [part for _, part in handle.state.adapters["default"].parts()]
        steps = optimizer(handle)
        generator = torch.Generator().manual_seed(2)
        starts = (
            torch.randn(2, 2, 5, generator=generator),
            torch.randn(2, 6, 2, generator=generator),
        )
        with torch.no_grad():
            for name, start in zip("ab", starts, strict=True):
                for part, value in zip(parts, [start] if stacked else start, strict=True):
                    getattr(part, name).copy_(value)
        for _ in range(3):
            model(x).square().sum().backward()
            steps.step()
            steps.zero_grad()
        values = [torch.stack([getattr(part, n) for part in parts]).detach() for n in "ab"]
        factors.append([value[0] if stacked else value for value in values])
    for got, want in zip(*factors, strict=True):
        close(got, want)


def test_one_graph():
    """Nothing breaks the graph that does not in the base: its eager experts do."""
    base = tiny("mixtral", "grouped_mm")
    handle = attach(base, LoraConfig(3, 5, [], parameters=[*EXPERTS, "q_proj.weight"]))
    randomize(handle.parameters())
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    close(compiled(TOKENS).logits, base(TOKENS).logits)
