"""Inits from statistics on a live model, beside PEFT's from the same batches."""

import copy
import json
import math
from contextlib import nullcontext

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import save_file
from torch import nn

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError, MultipleErrors
from adapterkit.runtime import attach, collect, load
from tests.support import oracle
from tests.support.live import llama, peft_of, tokens

# PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (oracle.gpt2, ["c_attn", "mlp.c_proj"]),
}
KINDS = {"corda": "covariance", "eva": "pca", "lora_ga": "gradient"}
BATCHES = [
    {"input_ids": ids, "labels": ids.masked_fill(torch.arange(40) < 3, -100)}
    for ids in (tokens(1, 40, seed=seed) for seed in range(4))
]
BATCH = {
    "input_ids": tokens(4, 40),
    "attention_mask": (torch.arange(40) < torch.tensor([[40], [31], [40], [12]])).long(),
}


def run(model: nn.Module, *, backward: bool = False):
    def run_model():
        with torch.set_grad_enabled(backward):
            for batch in BATCHES:
                loss = model(**batch).loss
                if backward:
                    loss.backward()

    return run_model


def statistics(model: nn.Module, init: str, **options) -> dict[str, torch.Tensor]:
    return collect(model, run(model, backward=init == "lora_ga"), what=KINDS[init], **options)


def uneven(model: nn.Module) -> nn.Module:
    """The first layer's inputs lie close to a few directions."""
    with torch.no_grad():
        norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
        norm.weight.mul_(torch.logspace(0, -1.5, 32))
    return model


def parts_of(adapters) -> dict:
    return {site.path: part for site, part in adapters.state.adapters["default"].patches()}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, peft_layers.Linear)
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def in_peft(name: str, init: str, rank: int = 8, alpha: int = 6, **settings) -> nn.Module:
    build, targets = MODELS[name]
    model = uneven(build()) if init == "eva" else build()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=init,
        fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM", **settings,
    )  # fmt: skip
    if init == "corda":
        preprocess_corda(model, config, run(model))
    elif init == "lora_ga":
        for module in model.modules():  # PEFT trains in training mode
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        preprocess_loraga(model, config, run(model, backward=True))
    with oracle.quiet():
        model = peft.get_peft_model(model, config)
    if init == "eva":
        # one batch until nothing changes: then PEFT's components are exact
        peft.initialize_lora_eva_weights(model, [BATCH], show_progress_bar=False)
    return model.eval()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("name", MODELS)
def test_corda_equals_peft(name: str, method: str):
    build, targets = MODELS[name]
    theirs = layers_of(in_peft(name, "corda", corda_config=CordaConfig(corda_method=method)))
    model = build()
    stats = statistics(model, "corda", targets=targets, compat="peft")
    config = LoraConfig(8, 6, targets, init="corda", init_options={"corda_method": method})
    adapters = attach(model, config, stats=stats)
    torch.testing.assert_close(logits(model), logits(build()), rtol=1e-5, atol=1e-5)
    ours = parts_of(adapters)
    assert ours.keys() == theirs.keys()
    for path, part in ours.items():
        expected = theirs[path].get_delta_weight("default").detach()
        delta = (part.dense(part.a, part.b) * part.scale).detach()
        torch.testing.assert_close(delta, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


@pytest.mark.parametrize("settings", [
    {}, {"direction": "A2rBr", "scale": "gd_scale"}, {"direction": "ArBr", "scale": "unit"},
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_lora_ga_equals_peft(name: str, settings: dict):
    """Rows of a and columns of b but for their signs, which are free. PEFT takes the wrong side of
    a Conv1D for its `stable` scale."""
    build, targets = MODELS[name]
    theirs = layers_of(in_peft(name, "lora_ga", lora_ga_config=LoraGAConfig(**settings)))
    model = build()
    stats = statistics(model, "lora_ga", targets=targets)
    config = LoraConfig(8, 6, targets, init="lora_ga", init_options=settings)
    adapters = attach(model, config, stats=stats)
    torch.testing.assert_close(logits(model), logits(build()), rtol=1e-4, atol=1e-4)
    ours = parts_of(adapters)
    assert ours.keys() == theirs.keys()
    for path, part in ours.items():
        a, b = (theirs[path].get_submodule(f"lora_{x}.default").weight.detach() for x in "AB")
        if name == "gpt2" and not settings:
            b = b * (part.b.shape[0] / part.a.shape[1]) ** 0.25
        for own, other in (part.a, a), (part.b.T, b.T):
            signs = (own * other).sum(1, keepdim=True).sign()
            largest = float(other.abs().max())
            torch.testing.assert_close(own * signs, other, rtol=1e-2, atol=2e-3 * largest)


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_eva_equals_peft(name: str, adjust: bool):
    """Ranks and scales, and the rows of a but for their signs; padding does not count."""
    build, targets = MODELS[name]
    eva_config = EvaConfig(rho=4.0, adjust_scaling_factors=adjust)
    theirs = in_peft(name, "eva", rank=4, eva_config=eva_config)
    model = uneven(build())

    def run_model():
        with torch.no_grad():
            model(**BATCH)

    stats = collect(model, run_model, what="pca", targets=targets)
    options = {"rho": 4.0, "adjust_scaling_factors": adjust}
    adapters = attach(
        model, LoraConfig(4, 6, targets, init="eva", init_options=options), stats=stats
    )
    assert torch.equal(logits(model), logits(uneven(build())))
    ours, expected = parts_of(adapters), layers_of(theirs)
    assert {p: part.rank for p, part in ours.items()} == {
        p: layer.r["default"] for p, layer in expected.items()
    }
    assert len({part.rank for part in ours.values()}) > 1
    assert sum(part.rank for part in ours.values()) == 4 * len(stats) // 3
    for path, part in ours.items():
        assert math.isclose(part.scale, expected[path].scaling["default"])
        a = expected[path].lora_A["default"].weight
        torch.testing.assert_close((part.a @ a.T).abs(), torch.eye(len(a)), atol=2e-3, rtol=0)
        assert not part.b.any()


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
                                     r".*_proj", "all-linear"], ids=str)  # fmt: skip
@pytest.mark.parametrize("rslora", [False, True])
def test_modules_without_a_rank_get_no_adapter(targets, rslora: bool, tmp_path):
    """The budget stays; what is saved has the modules that are left, in PEFT too."""
    model = llama()
    stats = statistics(model, "eva")
    config = LoraConfig(1, 2, targets, init="eva", rslora=rslora, init_options={"rho": 4})
    adapters = attach(model, config, stats=stats)
    parts = parts_of(adapters)
    count = 10 if isinstance(targets, list) else 14
    assert 0 < len(parts) < count and sum(part.rank for part in parts.values()) == count
    for part in parts.values():
        assert math.isclose(part.scale, 2 * part.rank / (part.rank**0.5 if rslora else part.rank))
    optimizer = torch.optim.SGD(adapters.parameters(), lr=30.0)
    for _ in range(2):
        model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
    trained = logits(model)
    assert (trained - logits(llama())).abs().max() > 1e-3
    adapters.save(tmp_path / "saved")
    theirs = peft_of(tmp_path / "saved", llama())
    assert layers_of(theirs).keys() == parts.keys()
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=1e-5)
    again = load(llama(), tmp_path / "saved")
    torch.testing.assert_close(logits(again.model), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", KINDS)
def test_a_file_is_as_good_as_a_mapping(init: str, tmp_path):
    """With shared statistics (`out=`), or each module's own (`save_file`); and as offline."""
    model, factors = llama(), []
    targets = ["q_proj", "v_proj"]
    stats = statistics(model, init, out=tmp_path / "shared.safetensors")
    save_file(stats, tmp_path / "own.safetensors")
    for source in (stats, tmp_path / "shared.safetensors", str(tmp_path / "own.safetensors")):
        config = LoraConfig(4, 6, targets, init=init)
        adapters = attach(model, config, stats=source)
        parts = parts_of(adapters).items()
        factors.append({path: torch.cat([part.a, part.b.T], 1).detach() for path, part in parts})
        adapters.detach()
    for other in factors[1:]:
        assert other.keys() == factors[0].keys()
        assert all(torch.equal(other[path], factors[0][path]) for path in other)
    model.save_pretrained(tmp_path / "base")
    adapterkit.init(
        tmp_path / "base", method=init, rank=4, alpha=6, targets="q_proj,v_proj",
        stats=tmp_path / "shared.safetensors", out=tmp_path / "new",
    )  # fmt: skip
    wrong = nullcontext() if init == "eva" else pytest.warns(UserWarning, match="has no mark of")
    with wrong:  # the original, because only factors are compared
        loaded = load(model, tmp_path / "new" / "adapter")
    for path, part in parts_of(loaded).items():
        offline = torch.cat([part.a, part.b.T], 1)
        torch.testing.assert_close(offline, factors[0][path], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", KINDS)
def test_saved_for_the_original_base(init: str, tmp_path):
    model = llama()
    adapters = attach(model, LoraConfig(4, 6, init=init), stats=statistics(model, init))
    optimizer = torch.optim.SGD(adapters.parameters(), lr=3.0)
    for _ in range(2):
        model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
    trained = logits(model)
    adapters.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not any(config[f"{name}_config"] for name in KINDS)
    theirs = peft_of(tmp_path / "saved", llama())
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=1e-4)
    adapters.detach()
    assert torch.equal(logits(model), logits(llama()))


FIRST = {"eva": "rho", "corda": "corda_method", "lora_ga": "scale"}


def test_options_are_pefts():
    """A config that PEFT wrote has its options; those of how it collected are left out."""
    for init, config in {
        "eva": EvaConfig(rho=3.0, tau=0.9, whiten=True),
        "corda": CordaConfig(corda_method="kpm"),
        "lora_ga": LoraGAConfig(direction="ArBr", scale="unit"),
    }.items():
        settings = {f"{init}_config": config, "init_lora_weights": init}
        stored = peft.LoraConfig(target_modules=["q_proj"], **settings).to_dict()
        stored = json.loads(
            json.dumps(stored, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        )
        ours = LoraConfig.from_peft(stored, "adapter_config.json")
        assert ours.init == init
        for key, value in ours.init_options.items():
            assert getattr(config, key) == value
        assert LoraConfig.from_peft(ours.to_peft(), "adapter_config.json") == ours
        theirs = getattr(peft.LoraConfig(**ours.to_peft()), f"{init}_config")
        assert all(getattr(theirs, key) == value for key, value in ours.init_options.items())
        assert {"eva": "rho", "corda": "corda_method", "lora_ga": "scale"}[
            init
        ] in ours.init_options


REFUSALS = {
    "none given": ({"init": "corda"}, None, 'stats=collect.model, run_model, what="covariance"'),
    "none needed": ({"init": "pissa"}, {}, "init pissa with statistics"),
    "other kind": ({"init": "lora_ga"}, "eva", "no model.layers.0.self_attn.q_proj.gradient"),
    "no module": ({"init": "eva", "targets": ["q_proj"]}, {}, "no model.layers.0.*components"),
    "no file": ({"init": "eva"}, "nowhere.safetensors", "no such path: nowhere"),
    "too few": ({"init": "eva", "rank": 5, "init_options": {"rho": 4}}, "few", "6 components of"),
    "value": ({"init": "eva", "init_options": {"rho": 0.5}}, "eva", "rho"),
    "rank": ({"init": "lora_ga", "rank": 17}, "lora_ga", "rank 17 for"),
    "not numbers": ({"init": "eva"}, {"x": 3}, "x are no tensors of floats"),
    "dtype": ({"init": "eva"}, {"x": torch.ones(2).bool()}, "x are no tensors of floats"),
    "not finite": ({"init": "corda"}, "nan", "not finite"),
    "no covariance": ({"init": "corda"}, "zero", "statistics of model.layers.0.self_attn.q_proj"),
    "width": ({"init": "corda"}, "width", r"\(31, 31\)"),
    "embedding": ({"init": "corda", "targets": ["embed_tokens"]}, "corda", "linear layers"),
    "invocation": ({"init": "corda", "invocation_tokens": [1]}, "corda", "activated LoRA"),
}


DAMAGE = {
    "nan": lambda value: value * torch.nan,
    "zero": lambda value: value * 0,
    "width": lambda value: value[1:, 1:].contiguous(),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_invalid_statistics_are_refused_and_leave_the_model(case: str):
    settings, stats, message = REFUSALS[case]
    model = llama()
    before = logits(model)
    if isinstance(stats, str) and stats in KINDS:
        stats = statistics(model, stats)
    elif isinstance(stats, str) and stats == "few":
        stats = statistics(model, "eva", components=6)
    elif stats in ("nan", "zero", "width"):
        how = {
            "nan": lambda x: x * torch.nan,
            "zero": lambda x: x * 0,
            "width": lambda x: x[1:, 1:],
        }
        stats = {k: how[stats](value) for k, value in statistics(model, "corda").items()}
    with pytest.raises(AdapterkitError, match=message) as caught:
        attach(
            model,
            LoraConfig(**{"rank": 4, "targets": ["q_proj", "v_proj"]} | settings),
            stats=stats,
        )
    if case in ("other kind", "width", "too few"):  # of each module
        assert isinstance(caught.value, MultipleErrors) and len(caught.value.errors) == 4
    assert torch.equal(logits(model), before) and not hasattr(model, "_adapterkit")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_trained_by_peft_and_not_converted(init: str, tmp_path):
    """The factors lack what PEFT took out of its base, which nothing here can compute again."""
    configs = {"corda": CordaConfig(), "lora_ga": LoraGAConfig()}
    theirs = in_peft("llama", init, **{f"{init}_config": configs[init]})
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterkitError, match="adapterkit rebase"):
        load(llama(), tmp_path / "theirs")


def test_a_quantized_base():
    """Statistics and the weight as it is decoded; the base itself stays."""
    import bitsandbytes as bnb

    from adapterkit.runtime.quantized import weight_of

    torch.manual_seed(0)
    layers = [
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        for _ in range(2)
    ]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1]).train().requires_grad_(False)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    expected = net(x)
    stats = collect(net, lambda: net(x), targets=["0", "2"])
    middle = torch.tanh(layers[0](x))
    torch.testing.assert_close(stats["0.covariance"], x.T @ x / 200, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["2.covariance"], middle.T @ middle / 200, rtol=1e-4, atol=1e-5)
    adapters = attach(net, LoraConfig(4, 8, ["0", "2"], init="corda"), stats=stats)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    for name in ("0", "2"):
        plain.get_submodule(name).weight = nn.Parameter(weight_of(net.get_submodule(name)))
    of_plain = attach(plain, LoraConfig(4, 8, ["0", "2"], init="corda"), stats=copy.deepcopy(stats))
    for path, part in parts_of(of_plain).items():
        own = parts_of(adapters)[path]
        torch.testing.assert_close(own.b @ own.a, part.b @ part.a, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterkitError, match="gradients of 0, 2: quantized"):
        collect(net, lambda: net(x), what="gradient", targets=["0", "2"])
