"""Adapters on quantized bases: as PEFT's in outputs, gradients, merges and training."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.runtime import attach, load, prepare_for_kbit_training, register_quantized
from adapterkit.runtime.quantized import REGISTERED, weight_of
from tests.support import oracle, quantized_llama
from tests.support.bnb import KINDS, loaded, wide
from tests.support.live import tokens

NAMES = ["0", "2"]
LAYERS: dict[str, dict[str, Any] | None] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4"},
    "int8": None,
}
X = torch.linspace(-2, 2, 5 * 64).sin().view(5, 64)


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """Both sides compute with the weights as they are, on every CPU."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


def network(kind: str, compute_dtype: torch.dtype = torch.float32, middle: int = 96) -> nn.Module:
    torch.manual_seed(0)

    def layer(columns: int, rows: int, bias: bool) -> nn.Module:
        how = LAYERS[kind]
        if how is None:
            return bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False).to("cpu")
        return bnb.nn.Linear4bit(columns, rows, bias, compute_dtype=compute_dtype, **how).to("cpu")

    net = nn.Sequential(layer(64, middle, True), nn.Tanh(), layer(middle, 32, False))
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "int8", kind != "int8"
    return net.requires_grad_(False)


def by_peft(net: nn.Module, folder: Path, **settings: Any) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": NAMES} | settings)
    model = peft.get_peft_model(net, config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def forward_and_backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_bitsandbytes(kind, dora, tmp_path):
    theirs = by_peft(network(kind), tmp_path / "peft", use_dora=dora).train()
    ours = network(kind).train()
    before = state(ours)
    adapters = load(ours, tmp_path / "peft", trainable=True)
    results = [forward_and_backward(model, X) for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    layers = [theirs.base_model.model[int(name)] for name in NAMES]
    for layer, (_, part) in zip(layers, adapters.state.adapters["default"].patches(), strict=True):
        torch.testing.assert_close(part.a.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(part.b.grad, layer.lora_B["default"].weight.grad)
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(part.magnitude.grad, magnitude.grad)
    adapters.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(network(kind), tmp_path / "ours")
    unmerged = ours.eval()(X)
    torch.testing.assert_close(unmerged, again.eval()(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merging loses precision
        theirs.eval().merge_adapter()
    adapters.merge()
    for layer, name in zip(layers, NAMES, strict=True):
        assert torch.equal(ours[int(name)].weight, layer.base_layer.weight)
    merged = ours(X)
    torch.testing.assert_close(merged, theirs(X))
    with adapters.disabled():
        base = ours(X)
    assert torch.equal(ours(X), merged)
    adapters.unmerge()
    assert torch.equal(ours(X), unmerged)
    adapters.activate(None)
    assert torch.equal(ours(X), base)
    adapters.detach()
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_computes_as_peft_in_bfloat16(tmp_path):
    """The base in the layer's dtype, the factors in float32, one rounding to the input's (PEFT
    rounds the update too)."""
    layer = by_peft(network("nf4", torch.bfloat16), tmp_path).base_model.model[0]
    ours = network("nf4", torch.bfloat16)
    load(ours, tmp_path)
    x = X.bfloat16()
    base, update = layer.base_layer(x), layer.lora_B["default"](layer.lora_A["default"](x.float()))
    y = ours[0](x)
    assert torch.equal(y, (base.float() + update * layer.scaling["default"]).bfloat16())
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x), atol=2**-8, rtol=2**-7)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_dora_next_to_a_merged_adapter_has_the_norms_of_the_base(dora, tmp_path):
    """Merged or not, an adapter beside it gives the same, but for the second quantization."""
    net = network("int8")
    by_peft(network("int8"), tmp_path / "first")
    by_peft(network("int8"), tmp_path / "second", use_dora=dora)
    adapters = load(net, tmp_path / "first", name="first")
    adapters.load(tmp_path / "second", name="second")
    adapters.activate(["first", "second"])
    expected = net(X)
    adapters.merge("first")
    torch.testing.assert_close(net(X), expected, atol=0.05, rtol=0)
    second = [part for _, part in adapters.state.adapters["second"].patches()]
    norms = [part.row_norms(part.host) for part in second]
    adapters.unmerge()
    for part, merged in zip(second, norms, strict=True):
        part.norms.squares.reset()
        part.norms.projected.reset()
        assert torch.equal(part.row_norms(part.host), merged)


def test_a_quantized_weight_that_two_layers_share():
    """Merged, each has its own scales, also where the codes are the same."""
    net = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, False).to("cpu") for _ in range(2)))
    net[1].weight = net[0].weight
    weight = weight_of(net[0])
    adapters = attach(net, LoraConfig(64, alpha=64, targets=["0", "1"]), seed=0)
    second = [part for _, part in adapters.state.adapters["default"].patches()][1]
    with torch.no_grad():
        second.a.copy_(weight)
        second.b.copy_(torch.eye(64))
    adapters.merge()
    merged = [net[number].weight for number in (0, 1)]
    assert torch.equal(merged[0].data, merged[1].data)
    functional = bnb.functional
    values = [functional.dequantize_4bit(one.data, one.quant_state) for one in merged]
    torch.testing.assert_close(values, [weight, 2 * weight], rtol=1e-2, atol=1e-3)
    adapters.unmerge()
    assert net[1].weight is net[0].weight


def test_gradients_after_an_evaluation(monkeypatch, tmp_path):
    """bitsandbytes packs weights at the first forward without gradients on some CPUs, and passes no
    gradients on from then on."""
    monkeypatch.undo()
    net = network("nf4", middle=64)
    weight = weight_of(net[0])
    with torch.no_grad():
        net.eval()(X)
    torch.testing.assert_close(weight_of(net[0]), weight, rtol=2**-8, atol=0)
    adapters = attach(net, LoraConfig(4, targets=NAMES, init=False), seed=0)
    gradients = []
    for _ in range(2):
        _, gradient = forward_and_backward(net.train(), X)
        gradients.append([gradient, *(p.grad for p in adapters.parameters())])
        for parameter in adapters.parameters():
            parameter.grad = None
        with torch.no_grad():
            net.eval()(X)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


# -- other tools ----------------------------------------------------------------------------------


class Halves(nn.Module):
    """A layer that some tool might have made: codes of one byte and a scale."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.store(torch.randn(rows, columns))

    def store(self, weight: Tensor) -> None:
        self.scale = nn.Parameter(weight.abs().amax() / 127, requires_grad=False)
        codes = (weight / self.scale).round().to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)

    def weight(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


def requantize(module: Halves, weight: Tensor) -> dict[str, nn.Parameter]:
    other = Halves(module.in_features, module.out_features)
    other.store(weight)
    return dict(other.named_parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_bias_of_b_is_merged_with_its_scale(kind, tmp_path):
    """scale · bias; PEFT adds the bias without the scale."""
    with oracle.quiet():  # PEFT takes the bias for an incomplete factor, and merging rounds
        theirs = by_peft(network(kind), tmp_path / "peft", target_modules=["0"], lora_bias=True)
        added = theirs.base_model.model[0].lora_B["default"].bias.detach().double()
        theirs.eval().merge_adapter()
    ours = network(kind)
    before = ours[0].bias.double()
    load(ours, tmp_path / "peft").merge()
    torch.testing.assert_close(ours[0].bias.double(), before + 6 / 4 * added, rtol=1e-6, atol=1e-6)
    without_scale = theirs.base_model.model[0].base_layer.bias.double()
    torch.testing.assert_close(without_scale, before + added, rtol=1e-6, atol=1e-6)


@pytest.fixture
def registry():
    own = list(REGISTERED)
    yield
    REGISTERED[:] = own


def test_a_layer_that_nobody_knows_runs_unmerged(registry, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(Halves(64, 96), nn.Tanh(), Halves(96, 32))
    adapters = attach(net, LoraConfig(4, targets=NAMES, init=False), seed=0)
    plain = nn.Sequential(nn.Linear(64, 96, False), nn.Tanh(), nn.Linear(96, 32, False))
    for name in NAMES:
        plain[int(name)].weight.data = net[int(name)].weight()
    adapters.save(tmp_path)
    load(plain, tmp_path, trainable=True)
    torch.testing.assert_close(forward_and_backward(net, X), forward_and_backward(plain, X))

    before = state(net)
    with pytest.raises(AdapterkitError, match="(?s)merged into 0, 2: .*register_quantized"):
        adapters.merge()
    assert adapters.merged == {} and all(
        torch.equal(net.state_dict()[k], before[k]) for k in before
    )
    with pytest.raises(AdapterkitError, match="(?s)DoRA on 0, 2: .*register_quantized"):
        adapters.attach(LoraConfig(4, targets=NAMES, dora=True), name="dora")
    assert adapters.names == ["default"]

    register_quantized("Halves", Halves.weight)
    with pytest.raises(AdapterkitError, match="cannot be quantized again"):
        adapters.merge()
    adapters.attach(LoraConfig(4, targets=NAMES, dora=True, init=False), name="dora")
    adapters.activate("dora")
    y = net(X)

    register_quantized(lambda module: isinstance(module, Halves), Halves.weight, requantize)
    adapters.merge()
    assert (net(X) - y).norm() < 0.03 * y.norm()
    assert not torch.equal(net.state_dict()["0.codes"], before["0.codes"])
    adapters.unmerge()
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


def test_layers_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    plain = copy.deepcopy(net)
    for name in NAMES:
        plain[int(name)].weight = nn.Parameter(weight_of(net[int(name)]))
    for dora in (False, True):
        results = []
        for model in (net, plain):
            config = LoraConfig(4, targets=NAMES, init=False, dora=dora)
            adapters = attach(model, config, seed=0)
            y, gradient = forward_and_backward(model, X)
            results.append([y, gradient, *(p.grad for p in adapters.parameters())])
            if model is net:
                with pytest.raises(AdapterkitError, match="cannot be quantized again"):
                    adapters.merge()
            adapters.detach()
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("form", ["int4", "fp8-channel"])
def test_layers_of_compressed_tensors(form, cached_folder):
    pytest.importorskip("compressed_tensors")
    folder = cached_folder(
        f"live-{form}", lambda folder: quantized_llama.base(quantized_llama.FORMS[form], folder)
    )

    def model():
        with oracle.quiet():
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", device_map="cpu"
            )

    ids = tokens()
    base, net = model(), model()
    expected = base(input_ids=ids).logits
    adapters = attach(net, LoraConfig(4, targets=["q_proj", "down_proj"], init=False), seed=0)
    net(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.parameters())
    assert not any(p.requires_grad for n, p in net.named_parameters() if "adapterkit" not in n)
    y = net(input_ids=ids).logits
    adapters.merge()
    torch.testing.assert_close(net(input_ids=ids).logits, y, atol=0.02, rtol=0)
    adapters.detach()
    assert torch.equal(net(input_ids=ids).logits, expected)


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Path:
    return cached_folder("live-llama", lambda folder: oracle.save_base(wide(), folder, "bf16"))


@pytest.fixture
def four_bits(cached_folder: Callable[..., Path], base: Path) -> Path:
    return cached_folder(
        "live-nf4", lambda folder: adapterkit.quantize(base, out=folder, **KINDS["nf4"][0])
    )


def by_peft_prepared(model: nn.Module, checkpoints: bool = True) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by old names
        return peft.prepare_model_for_kbit_training(
            model, checkpoints, gradient_checkpointing_kwargs={"use_reentrant": False}
        )


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_model_is_prepared_as_by_peft(four_bits, checkpoints):
    ours, theirs = loaded(four_bits), loaded(four_bits)
    assert prepare_for_kbit_training(ours, gradient_checkpointing=checkpoints) is ours
    by_peft_prepared(theirs, checkpoints)
    for (name, p), (other, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (name, p.dtype, p.requires_grad) == (other, q.dtype, q.requires_grad)
        assert torch.equal(p, q)
    for model in (ours, theirs):
        assert model.model.layers[0].gradient_checkpointing == checkpoints
    embedded = ours.get_input_embeddings()(tokens())
    assert embedded.requires_grad == checkpoints
    assert ours.model.norm.weight.dtype == torch.float32


def test_adapters_that_are_there_stay_trainable(four_bits):
    net = loaded(four_bits)
    adapters = attach(net, LoraConfig(4, targets="all-linear"), dtype=torch.bfloat16)
    prepare_for_kbit_training(net)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in adapters.parameters())


def test_a_model_without_checkpoints_is_refused():
    net = network("nf4")
    net.bias = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    with pytest.raises(Refused, match="gradient checkpointing"):
        prepare_for_kbit_training(net)
    assert net.bias.requires_grad and net.bias.dtype == torch.float16
    prepare_for_kbit_training(net, gradient_checkpointing=False)
    assert not net.bias.requires_grad and net.bias.dtype == torch.float32


def steps(model: nn.Module, parameters: list[nn.Parameter], count: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for step in range(count):
        ids = tokens(seed=step)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "source, dora", [("quantize", False), ("quantize", True), ("loftq", False)]
)
def test_qlora_is_pefts_step_by_step(source, dora, base, four_bits, cached_folder, tmp_path):
    """A base that the toolkit quantized; with loftq the adapter that belongs to it, too."""
    if source == "loftq":
        folder = cached_folder(
            "live-loftq", lambda folder: adapterkit.loftq(base, out=folder, rank=4, alpha=8)
        )
        quantized, start = folder / "base", folder / "adapter"
    else:
        quantized, start = four_bits, tmp_path / "start"
        by_name = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
        model = peft.get_peft_model(loaded(quantized), by_name)
        oracle.perturb(model, seed=1)
        model.save_pretrained(start)
    theirs = peft.PeftModel.from_pretrained(
        by_peft_prepared(loaded(quantized)), start, is_trainable=True
    ).eval()
    ours = prepare_for_kbit_training(loaded(quantized))
    adapters = load(ours, start, trainable=True)
    ids = tokens()
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    expected = steps(theirs, [p for p in theirs.parameters() if p.requires_grad])
    losses = steps(ours, list(adapters.parameters()))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[-1]

    adapters.save(tmp_path / "trained")
    y = ours.eval()(input_ids=ids).logits
    again = prepare_for_kbit_training(loaded(quantized))
    load(again, tmp_path / "trained")
    torch.testing.assert_close(again(input_ids=ids).logits, y)
    other = by_peft_prepared(loaded(quantized))
    other = peft.PeftModel.from_pretrained(other, tmp_path / "trained")
    torch.testing.assert_close(other.eval()(input_ids=ids).logits, y)
