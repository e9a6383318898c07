"""Arrow on a live model: against PEFT's create_arrow_model, and against the rule written out in
float64."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit.runtime import create_arrow_model, load_arrow
from tests.support import oracle

ALL = oracle.LINEAR
TOKENS = torch.tensor([[5, 9, 1, 33, 20, 7, 7], [8, 2, 70, 41, 0, 3, 12]])


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """The matrices are tiny."""


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[Path]:
    """Six adapters of one rank on all linear layers; alphas differ."""
    return [adapter(tmp_path_factory.mktemp("experts") / f"e{i}", i) for i in range(6)]


def adapter(folder: Path, seed: int, build=oracle.llama, **config) -> Path:
    settings = {"r": 4, "lora_alpha": 4 + 2 * seed, "target_modules": ALL, "bias": "none"} | config
    with oracle.quiet():
        model = peft.get_peft_model(build(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, tokens=TOKENS) -> torch.Tensor:
    return model.eval()(input_ids=tokens).logits


def base(**changes):
    return oracle.llama(**changes)


def by_peft(model, experts, general=(), **settings):
    config = peft.ArrowConfig(use_gks=bool(general), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.create_arrow_model(
            model, [str(e) for e in experts], config, [str(g) for g in general] or None
        )


def routed_by_the_rule(model, folder: Path, weight: float = 1.0, expert=slice(None)):
    """The model with hooks that add, in float64, what the router's file says."""
    stored = load_file(folder / "arrow.safetensors")
    settings = json.loads((folder / "arrow.json").read_text())
    paths = sorted({key.rpartition(".")[0] for key in stored})

    def hook(path):
        a, b, scale, prototype = (
            stored[f"{path}.{role}"].double() for role in ("a", "b", "scale", "prototype")
        )

        def add(module, args, y):
            x = args[0].double()
            delta = torch.zeros_like(y, dtype=torch.float64)
            for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
                token = x[tuple(index)]
                similarity = (prototype @ token).abs()
                top = similarity.argsort(descending=True)[: settings["top_k"]]
                coefficients = torch.softmax(similarity[top] / settings["temperature"], 0)
                for coefficient, e in zip(coefficients, top, strict=True):
                    delta[tuple(index)] += coefficient * scale[e] * (b[e] @ (a[e] @ token))
            return (y.double() + weight * delta).to(y.dtype)

        return add

    for path in paths:
        model.get_submodule(path).register_forward_hook(hook(path))
    return model


# -- equal to PEFT, and to the rule ----------------------------------------------------------------


@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize("top_k, temperature", [(2, 1.0), (1, 1.0), (4, 0.3)])
def test_outputs_equal_pefts(general, top_k, temperature, experts):
    tasks, others = experts[:4], experts[4 : 4 + general]
    settings = {"top_k": top_k, "rng_seed": 3, "router_temperature": temperature}
    expected = logits(by_peft(base(), tasks, others, **settings))
    model = base()
    h = create_arrow_model(
        model, tasks, general=others, top_k=top_k, temperature=temperature, compat="peft", seed=3
    )
    assert h.active == {"arrow": 1.0} and h.names == ["arrow"]
    actual = logits(model)
    assert torch.allclose(actual, expected, atol=2e-5)
    with h.disabled():
        assert torch.equal(logits(model), logits(base()))
    assert not torch.allclose(actual, logits(base()), atol=1e-3)
    # decoding, in which few tokens read only their experts' factors
    one = TOKENS[:1, :1]
    peft_model = by_peft(base(), tasks, others, **settings)
    assert torch.allclose(logits(model, one), logits(peft_model, one), atol=2e-5)


@pytest.mark.parametrize("general", [0, 2])
def test_outputs_equal_the_rule(general, experts, tmp_path):
    options = {"top_k": 2, "temperature": 0.7, "general": experts[4 : 4 + general]}
    adapterkit.arrow(experts[:4], out=tmp_path / "arrow", **options)
    expected = logits(routed_by_the_rule(base(), tmp_path / "arrow"))
    model = base()
    h = load_arrow(model, tmp_path / "arrow")
    assert torch.allclose(logits(model), expected, atol=2e-5)
    h.activate({"arrow": 0.5})
    half = logits(routed_by_the_rule(base(), tmp_path / "arrow", 0.5))
    assert torch.allclose(logits(model), half, atol=2e-5)
    h.activate("arrow")
    created = base()
    create_arrow_model(created, experts[:4], **options)
    assert torch.equal(logits(created), logits(model))
