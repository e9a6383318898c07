"""What torch, transformers and accelerate do to a model works with adapters on it."""

import copy
import io
import pickle
import time

import pytest
import torch
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import Refused
from adapterkit.runtime import attach, load
from adapterkit.runtime.load.placing import factor_device
from tests.support.live import llama, on_meta, peft_of, tokens

CONFIG = LoraConfig(4, 8, ["q_proj", "v_proj", "down_proj"], init=False)
X = tokens(2, 6)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An adapter's folder, its output on the tiny llama, and the base's."""
    folder = tmp_path_factory.mktemp("reference") / "adapter"
    h = attach(model := llama(), CONFIG, seed=1)
    h.save(folder)
    return folder, model(X).logits, llama()(X).logits


def test_compiled_as_one_graph():
    """A graph for each set of active adapters, compiled once; the same outputs and gradients."""
    from torch._dynamo import testing

    torch._dynamo.reset()
    counter = testing.CompileCounter()
    h = attach(model := llama(num_hidden_layers=1), CONFIG, seed=1)
    h.attach(LoraConfig(2, 4, ["q_proj", "k_proj"], init=False), name="second", seed=2)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    sets = ["default", ["default", "second"], None]
    for names in sets * 2:
        h.activate(names)
        torch.testing.assert_close(compiled(X).logits, model(X).logits)
    h.activate("default")
    with h.disabled():
        torch.testing.assert_close(compiled(X).logits, model(X).logits)
    assert counter.frame_count == len(sets)
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        each(input_ids=X, labels=X).loss.backward()
        gradients.append([parameter.grad for parameter in h.parameters("default")])
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


def test_autocast_as_peft(reference):
    """bfloat16 on the CPU: the loss and the gradients bit for bit."""
    folder, *_ = reference
    h = load(model := llama(), folder, trainable=True)
    peft = peft_of(folder, llama())
    loss = {}
    for each in (model, peft):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss[each] = each(input_ids=X, labels=X).loss
        loss[each].backward()
    assert torch.equal(loss[model], loss[peft])
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    for site, part in h.state.adapters["default"].patches():
        for role, factor in (("a", "lora_A"), ("b", "lora_B")):
            other = gradients[f"base_model.model.{site.path}.{factor}.default.weight"]
            assert torch.equal(getattr(part, role).grad, other)


def test_to_other_dtypes(reference):
    """The adapter goes with the model."""
    folder, expected, _ = reference
    h = load(model := llama(), folder)
    parts = [part for _, part in h.state.adapters["default"].patches()]
    values = [p.clone() for part in parts for p in part.parameters()]
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 2e-2)):
        model.to(dtype)
        assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
        logits = model(X).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)
    parameters = [p.float() for part in parts for p in part.parameters()]
    assert not all(map(torch.equal, values, parameters))
    for pair in zip(values, parameters, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-3)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file]
)
def test_copies_are_independent(copied, reference):
    """A copy has a handle of its own, for its own adapters."""
    folder, expected, base = reference
    h = load(model := llama(), folder, trainable=True)
    twin = copied(model)
    other = twin._adapterkit
    assert other.model is twin and other.active == h.active
    assert torch.equal(twin(X).logits, expected)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.activate(None)
    assert torch.equal(twin(X).logits, base)
    assert torch.equal(model(X).logits, expected)
    other.activate("default")
    assert not torch.equal(twin(X).logits, expected)
    other.detach()
    assert torch.equal(twin(X).logits, base)
    assert torch.equal(model(X).logits, expected)


# ------------------------------------------------------------------------ accelerate


def test_device_map_with_offloading(reference, tmp_path):
    """Weights on disk: run, train and detach; merging them is refused."""
    from transformers import LlamaForCausalLM

    folder, expected, base = reference
    llama().save_pretrained(tmp_path / "base")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        device_map={**places, "model.layers.0": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    h = load(model, folder, trainable=True)
    assert torch.equal(model(X).logits, expected)
    model(input_ids=X, labels=X).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in h.parameters())
    with pytest.raises(Refused, match="offloaded"):
        h.merge()
    assert torch.equal(model(X).logits, expected)
    h.detach()
    assert torch.equal(model(X).logits, base)


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_after_attach(kind, reference, tmp_path):
    """accelerate brings back the base's weights from its state dict; the factors stay."""
    import accelerate

    folder, expected, base = reference
    h = load(model := llama(), folder, trainable=True)
    if kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        places = {"model": "cpu", "lm_head": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(model(X).logits, expected)
    model(input_ids=X, labels=X).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in h.parameters())
    h.detach()
    assert torch.equal(model(X).logits, base)


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("first", ["adapter", "hooks"])
@pytest.mark.parametrize("go_first", ["adapter", "hooks"])
def test_hooks_that_replace_forward(first, go_first, reference):
    """accelerate's: added before or after the adapter, removed before or after it."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    folder, expected, base = reference

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    def add(model):
        for module in linears(model):
            add_hook_to_module(module, Count())

    model = llama()
    if first == "hooks":
        add(model)
    h = load(model, folder)
    if first == "adapter":
        add(model)
    assert torch.equal(model(X).logits, expected) and Count.calls == 15
    if go_first == "adapter":
        h.detach()
        assert torch.equal(model(X).logits, base) and Count.calls == 30
    for module in linears(model):
        remove_hook_from_module(module)
    if go_first == "hooks":
        assert torch.equal(model(X).logits, expected)
        h.detach()
    assert torch.equal(model(X).logits, base)
    assert not hasattr(model.lm_head, "_old_forward")
    load(model, folder)
    assert torch.equal(model(X).logits, expected)


def test_home_of_an_offloaded_module():
    """Factors live where the module runs."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    module = nn.Linear(2, 2, device="meta")
    assert factor_device(module) == torch.device("cpu")
    for hook in (AlignDevicesHook("cuda:1"), SequentialHook(AlignDevicesHook("cuda:1"))):
        module._hf_hook = hook
        assert factor_device(module) == torch.device("cuda:1")
    assert factor_device(nn.Linear(2, 2)) == torch.device("cpu")


def test_prepared_by_accelerate(reference):
    """As the plain loop, bit for bit."""
    from accelerate import Accelerator

    folder, *_ = reference
    table = []
    for prepared in (False, True):
        h = load(model := llama(), folder, trainable=True)
        optimizer = torch.optim.AdamW(h.parameters(), lr=1e-2)
        run, backward = model, lambda loss: loss.backward()
        if prepared:
            accelerator = Accelerator(cpu=True)
            run, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward
        losses = []
        for _ in range(3):
            loss = run(input_ids=X, labels=X).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        table.append(losses)
    assert table[0] == table[1] and table[0][-1] < table[0][0]


# ------------------------------------------------------------------------ meta device


@pytest.mark.parametrize("arrival", ["to_empty", "assign", "assign parameters"])
@pytest.mark.parametrize("how", ["attach", "load"])
def test_a_base_that_arrives_later(how, arrival, reference):
    """The adapter's values stay as they were; detaching gives the base's flags back."""
    folder, expected, base = reference
    model = on_meta()
    h = load(model, folder) if how == "load" else attach(model, CONFIG, seed=1)
    weights = llama().state_dict()
    if arrival == "to_empty":
        model.to_empty(device="cpu").load_state_dict(weights)
    else:
        if arrival == "assign parameters":
            weights = {key: nn.Parameter(value) for key, value in weights.items()}
        model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = llama().model.rotary_emb  # has buffers that no state dict has
    assert torch.equal(model(X).logits, expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".weight" in name)
    h.detach()
    assert torch.equal(model(X).logits, base)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_to_empty_is_distinguished_from_moves_although_memory_is_reused():
    """New memory holds what was freed before: here the probes of earlier moves."""
    h = attach(
        model := nn.Sequential(nn.Linear(4, 4, bias=False)), LoraConfig(2, 4, ["0"], init=False)
    )
    part = next(part for _, part in h.state.adapters["default"].patches())
    expected, freed = part.a.clone(), []

    def move(tensor):
        if tensor.ndim == 1:  # no parameter of this model's adapter
            freed.append(tensor.clone())
        return tensor.clone()

    def empty_like(tensor):
        return freed.pop(0) if len(freed) else torch.zeros_like(tensor)

    model._apply(move)
    assert torch.equal(part.a, expected) and len(freed) == 2
    model._apply(empty_like)
    assert torch.equal(part.a, expected)


def test_merging_on_meta_is_refused(reference):
    folder, *_ = reference
    h = load(on_meta(), folder)
    with pytest.raises(Refused, match="meta"):
        h.merge()


def test_a_large_model_on_meta_in_two_seconds(tmp_path):
    """The shape of Llama 7B, all linear layers, rank 16 (processor time)."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    model = on_meta(**sizes, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)
    start = time.process_time()
    h = attach(model, LoraConfig(16, 32, "all-linear"))
    attached = time.process_time()
    assert len(h.state.sites) == 7 * 32
    h.save(tmp_path / "adapter")
    h.detach()
    begin = time.process_time()
    h = load(model, tmp_path / "adapter")
    loaded = time.process_time()
    assert len(h.state.sites) == 7 * 32
    assert attached - start < 2 and loaded - begin < 2
