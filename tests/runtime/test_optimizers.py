"""Optimizers that know factors: equal to PEFT's step by step, to the formulas where PEFT's fail."""

import io
import math

import pytest
import torch

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import LoraFA, Riemannian, attach, load, loraplus
from adapterkit.runtime.training import optimizers
from tests.support.card import DEVICE, Card, installed, move
from tests.support.live import llama, peft_of, tokens

TARGETS = ["q_proj", "v_proj", "up_proj"]


def losses(model, optimizer, steps=5, scheduler=None):
    x, values = tokens(4, 8), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        values.append(loss.item())
    return values


@pytest.fixture
def folder(tmp_path):
    """An adapter with both factors random, rank 4, scale 2."""
    attach(llama(), LoraConfig(4, 8, TARGETS, init=False), seed=1).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def ours(name, h):
    if name == "lora+":
        return loraplus(h, torch.optim.AdamW, lr=1e-3, ratio=16, weight_decay=0.1)
    if name == "lora-fa":
        return LoraFA(h, lr=1e-2, weight_decay=0.1)
    return Riemannian(h, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def theirs(name, model):
    from peft import optimizers as peft

    if name == "lora+":
        settings = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
        return peft.create_loraplus_optimizer(model, torch.optim.AdamW, **settings)
    if name == "lora-fa":
        return peft.create_lorafa_optimizer(model, 4, 8, lr=1e-2, weight_decay=0.1)
    return peft.create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


NAMES = ["lora+", "lora-fa", "riemannian"]


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_peft_step_by_step(name, folder, monkeypatch):
    """Losses and factors, with a schedule. PEFT's LoRA-FA multiplies in bfloat16 where it can; its
    float32 path is the formula."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    h = load(model := llama(), folder, trainable=True)
    peft = peft_of(folder, llama())
    pairs = []
    for target, optimizer in ((model, ours(name, h)), (peft, theirs(name, peft))):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        pairs.append(losses(target, optimizer, scheduler=schedule))
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)
    assert pairs[0][-1] < pairs[0][0] - 1e-3
    trained = dict(peft.named_parameters())
    for _, part in h.state.adapters["default"].patches():
        path = next(path for path, site in h.state.sites.items() if part in site.children())
        for role, factor in (("a", "lora_A"), ("b", "lora_B")):
            other = trained[f"base_model.model.{path}.{factor}.default.weight"]
            torch.testing.assert_close(getattr(part, role), other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["lora+", "riemannian"])
@pytest.mark.parametrize("settings", [{"dora": True}, {"targets": ["q_proj", "embed_tokens"]}])
def test_magnitudes_and_embeddings_as_peft(name, settings, tmp_path):
    """PEFT's Riemannian leaves factors of embeddings as they are. Its LoRA-FA fails with both."""
    config = LoraConfig(4, 8, init=False, **{"targets": TARGETS, **settings})
    attach(llama(), config, seed=1).save(tmp_path)
    h = load(model := llama(), tmp_path, trainable=True)
    peft = peft_of(tmp_path, llama())
    expected = losses(peft, theirs(name, peft))
    assert losses(model, ours(name, h)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_file(name, folder):
    """Three steps, a file, three steps: as six steps, bit for bit."""
    h = load(model := llama(), folder, trainable=True)
    optimizer = ours(name, h)
    first = losses(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    h.save(folder.parent / "later")
    rest = losses(model, optimizer, 3)

    again = load(model := llama(), folder.parent / "later", trainable=True)
    optimizer = ours(name, again)
    optimizer.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert losses(model, optimizer, 3) == rest
    assert losses(model, ours(name, again), 3) != first


def adamw_of_paper(gradients, b, lr, betas=(0.9, 0.999), eps=1e-6):
    """AdamW's steps with these gradients, in float64."""
    m = v = torch.zeros_like(b)
    for t, gradient in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        rate = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        b = b - rate * m / (v.sqrt() + eps)
    return b


def projected(part):
    """ĝ in float64, group by group of a convolution."""
    groups = len(part.a) // part.b.shape[1]
    a = part.a.double().flatten(1).chunk(groups)
    gradients = part.b.grad.double().flatten(1).chunk(groups)
    products = []
    for one, gradient in zip(a, gradients, strict=True):
        gram = one @ one.T + 1e-8 * torch.eye(len(one), dtype=torch.double)
        products.append(gradient @ torch.linalg.pinv(gram) / part.scale**2)
    return torch.cat(products).reshape(part.b.shape)


def language_loss(model):
    x = tokens(4, 8)
    return model(input_ids=x, labels=x).loss


def check_lorafa(model, h, loss=language_loss, **options):
    """LoRA-FA's b's against the formula in float64, where a stays bit for bit."""
    parts = [part for adapter in h.state.adapters.values() for _, part in adapter.patches()]
    optimizer = LoraFA(h, lr=1e-2, **options)
    before = [(part.a.clone(), part.b.double()) for part in parts]
    gradients = [[] for _ in parts]
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        for part, row in zip(parts, gradients, strict=True):
            assert part.a.grad is None
            row.append(projected(part))
        optimizer.step()
    for part, (a, b), row in zip(parts, before, gradients, strict=True):
        assert torch.equal(part.a, a)
        torch.testing.assert_close(
            part.b.double(), adamw_of_paper(row, b, 1e-2), rtol=1e-4, atol=1e-5
        )
    return optimizer


def test_lorafa_of_two_adapters_with_their_own_scales(folder):
    """PEFT pairs parameters that follow each other and fails."""
    h = load(model := llama(), folder, trainable=True)
    h.attach(LoraConfig(2, 1, ["q_proj", "down_proj"], init=False), name="second", seed=2)
    h.activate({"default": 1.0, "second": 0.5})
    h.rescale(3.0, name="default")
    check_lorafa(model, h)


def test_lorafa_trains_what_is_no_factor(folder):
    """Biases of b by plain AdamW; PEFT fails."""
    h = attach(model := llama(), LoraConfig(4, 8, TARGETS, init=False, lora_bias=True), seed=1)
    check_lorafa(model, h)
    biases = [part.bias for _, part in h.state.adapters["default"].patches()]
    assert all(bias.abs().max() > 1e-3 for bias in biases)


@pytest.mark.parametrize("settings", [{"dora": True}, {"targets": ["q_proj", "embed_tokens"]}])
def test_lorafa_of_magnitudes_and_embeddings(settings):
    """PEFT fails with both."""
    config = LoraConfig(4, 8, init=False, **{"targets": TARGETS, **settings})
    h = attach(model := llama(), config, seed=1)
    magnitudes = [part.magnitude for _, part in h.state.adapters["default"].patches()]
    before = [value.clone() for value in magnitudes if value is not None]
    check_lorafa(model, h)
    assert not any(map(torch.equal, before, magnitudes))


def test_lorafa_of_convolutions():
    """Also in groups, each with its own factors."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=2))
    h = attach(model, LoraConfig(4, 8, ["0", "1"], init=False), seed=1)
    x = torch.randn(2, 4, 8, 8)
    check_lorafa(model, h, lambda model: model(x).square().mean())


def test_loraplus_of_embeddings_in_8_bits():
    """bitsandbytes' 8-bit Adam has 32-bit states for factors of embeddings, as for no others."""
    from bitsandbytes.optim import Adam8bit

    config = LoraConfig(64, 8, ["q_proj", "embed_tokens"], init=False)
    h = attach(model := llama(hidden_size=64), config, seed=1)
    optimizer = loraplus(h, Adam8bit, lr=1e-3, ratio=4, embedding_lr=1e-2)
    losses(model, optimizer, 2)
    dtypes = {"q_proj": set(), "embed_tokens": set()}
    for site, part in h.state.adapters["default"].patches():
        for parameter in (part.a, part.b):
            assert parameter.numel() >= 4096  # smaller ones have 32 bits anyway
            dtypes[site.path.split(".")[-1]].add(optimizer.state[parameter]["state1"].dtype)
    assert dtypes == {"q_proj": {torch.uint8}, "embed_tokens": {torch.float32}}
    rates = {group["lr"]: len(group["params"]) for group in optimizer.param_groups}
    assert rates == {1e-3: 2, 4e-3: 2, 1e-2: 2}


def test_lorafa_leaves_a_frozen_when_the_adapter_is_activated_again(folder):
    h = load(llama(), folder, trainable=True)
    optimizer = LoraFA(h, lr=1e-2)
    h.activate(None)
    h.activate("default")
    trained = [name for name, p in h.model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(".b") for name in trained)
    assert {*h.parameters()} == {*optimizer.param_groups[0]["params"]}


def test_lorafa_of_one_of_two_adapters(folder):
    h = load(model := llama(), folder, trainable=True)
    h.attach(LoraConfig(2, 4, ["q_proj"], init=False), name="second", seed=2)
    h.activate(["default", "second"])
    optimizer = LoraFA(h, lr=1e-2, names="second")
    assert {*optimizer.param_groups[0]["params"]} == {*h.parameters("second")}
    before = [p.clone() for p in h.parameters("default")]
    losses(model, optimizer, 1)
    assert all(map(torch.equal, before, h.parameters("default")))


def test_lorafa_uses_the_current_a(folder):
    """The product of a with itself is kept from step to step, and computed again for a new a."""
    h = load(model := llama(), folder, trainable=True)
    optimizer = LoraFA(h, lr=1e-2)
    losses(model, optimizer, 1)
    part = next(part for _, part in h.state.adapters["default"].patches())
    with torch.no_grad():
        part.a.mul_(2)
    optimizer.zero_grad()
    x = tokens(4, 8)
    model(input_ids=x, labels=x).loss.backward()
    actual = optimizer._projected([part.b])[part.b].double()
    torch.testing.assert_close(actual, projected(part), rtol=1e-4, atol=1e-7)


def test_loraplus_gives_b_its_own_learning_rate(folder):
    h = attach(llama(), LoraConfig(4, 8, TARGETS, lora_bias=True), seed=1)
    h.model.lm_head.requires_grad_(True)  # a part of the base that is trained too
    optimizer = loraplus(h, torch.optim.SGD, lr=0.5, ratio=8, weight_decay=0.25)
    groups = {(g["lr"], g["weight_decay"]): {*g["params"]} for g in optimizer.param_groups}
    parts = [part for _, part in h.state.adapters["default"].patches()]
    assert groups == {
        (0.5, 0.25): {*(part.a for part in parts), h.model.lm_head.weight},
        (4.0, 0.25): {part.b for part in parts},
        (4.0, 0.0): {part.bias for part in parts},
    }


def test_riemannian_of_two_adapters(folder):
    """Each pair by the formula; a step of SGD shows the gradient."""
    h = load(model := llama(), folder, trainable=True)
    h.attach(LoraConfig(2, 4, ["q_proj"], init=False), name="second", seed=2)
    h.activate(["default", "second"])
    parts = [part for adapter in h.state.adapters.values() for _, part in adapter.patches()]
    optimizer = Riemannian(h, torch.optim.SGD, lr=0.5, reg=0.1)
    x = tokens(4, 8)
    model(input_ids=x, labels=x).loss.backward()
    expected = []
    for part in parts:
        a, b, one = part.a.double(), part.b.double(), torch.eye(part.rank, dtype=torch.double)
        a_step = torch.linalg.solve(b.T @ b + 0.1 * one, part.a.grad.double())
        b_step = torch.linalg.solve(a @ a.T + 0.1 * one, part.b.grad.double(), left=False)
        expected.append((a - 0.5 * a_step, b - 0.5 * b_step))
    optimizer.step()
    for part, (a, b) in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.a.double(), a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part.b.double(), b, rtol=1e-5, atol=1e-6)


def stretched(value):
    """Random, of condition 1e4."""
    scales = torch.logspace(0, -4, min(value.shape))
    return value * (scales if value.shape[1] == len(scales) else scales[:, None])


@pytest.mark.parametrize("reg", [1e-2, 1e-6, 1e-30, 0.0])
@pytest.mark.parametrize("case", ["random", "stretched", "zeros", "one row"])
def test_damped_inverses_are_accurate_and_finite(case, reg):
    """The inverse in float64, or no more than float32 tells: never what is not finite."""
    torch.manual_seed(0)
    factors = torch.randn(5, 8, 40)
    if case == "stretched":
        factors = torch.stack([stretched(one) for one in factors])
    elif case != "random":
        factors[:, 1:] = 0
        factors[:, 0] *= case == "one row"
    inverses = optimizers.damped_inverses(factors, reg)
    assert bool(inverses.isfinite().all())
    grams = factors.double() @ factors.double().mT + reg * torch.eye(8, dtype=torch.double)
    if reg == 1e-2 or case == "random":
        torch.testing.assert_close(inverses.double(), torch.linalg.inv(grams), rtol=1e-4, atol=1e-4)


class Still(torch.optim.Optimizer):
    """An optimizer that leaves all as it is."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        pass


def stepped(name, layers, card=None):
    """A step's parameters and gradients, on a card if one is given; waits and launches there."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(layers)))
    h = attach(net, LoraConfig(4, 8, "all-linear", init=False), seed=1)
    if card is not None:
        move(net)
    optimizer = LoraFA(h, lr=1e-2) if name == "lora-fa" else Riemannian(h, Still, lr=1e-2)
    own = list(h.parameters())
    with torch.no_grad():
        for p in own:
            p.grad = torch.randn(p.shape).to("cpu" if card is None else DEVICE)
        for count in range(2):
            if count and card is not None:  # what is computed once, is
                card.waits = card.launches = 0
            optimizer.step()
        values = [value.detach().cpu() for p in own for value in (p, p.grad)]
    return values


@pytest.mark.parametrize("name", ["lora-fa", "riemannian"])
def test_a_gpu_is_launched_as_often_for_many_layers_and_never_waited_for(name):
    counts = []
    for layers in (2, 7):
        with installed(Card()) as card:
            there = stepped(name, layers, card)
            assert not card.races
        counts.append((card.waits - len(there), card.launches))
        torch.testing.assert_close(there, stepped(name, layers))
    assert counts[0] == counts[1] and counts[0][0] == 0
    assert counts[0][1] <= (10 if name == "lora-fa" else 36)


MISUSE = {
    "nothing trained": lambda h: (h.delete("default"), LoraFA(h, lr=1e-2)),
    "unknown adapter": lambda h: LoraFA(h, lr=1e-2, names="other"),
    "negative rate": lambda h: LoraFA(h, lr=-1.0),
    "betas": lambda h: LoraFA(h, lr=1e-2, betas=(0.9, 1.0)),
    "ratio": lambda h: loraplus(h, torch.optim.AdamW, lr=1e-2, ratio=0),
    "closure": lambda h: Riemannian(h, torch.optim.LBFGS, lr=1e-2),
    "closure at a step": lambda h: Riemannian(h, torch.optim.SGD, lr=1e-2).step(lambda: 0.0),
    "damping": lambda h: Riemannian(h, torch.optim.SGD, lr=1e-2, reg=-1.0),
}


@pytest.mark.parametrize("case", MISUSE)
def test_optimizers_of_wrong_models_are_refused(case, folder):
    h = load(llama(), folder, trainable=True)
    if case == "nothing trained":
        h.activate(None)
    flags = [p.requires_grad for p in h.parameters()]
    with pytest.raises(AdapterkitError):
        MISUSE[case](h)
    assert [p.requires_grad for p in h.parameters()] == flags[: len([*h.parameters()])]
