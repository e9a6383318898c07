"""Arrow on a live model: against PEFT's create_arrow_model, and against the rule written out in
float64."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.kernels.routing import add_routed
from adapterkit.runtime import create_arrow_model, load, load_arrow
from adapterkit.runtime.site import CHILD
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
    model.save_pretrained(folder, save_embedding_layers=False)
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


def routed_by_the_rule(model, folder: Path, weight: float = 1.0):
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


@pytest.mark.parametrize("general, top_k, temperature", [(0, 2, 1.0), (2, 1, 1.0), (2, 4, 0.3)])
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


def test_experts_that_lack_modules_or_training_equal_the_rule(experts, tmp_path):
    small = adapter(tmp_path / "small", 7, r=2, target_modules=["q_proj", "up_proj"])
    blank = oracle.edit_config(experts[1], tmp_path / "blank")
    tensors = load_file(blank / "adapter_model.safetensors")
    zeroed = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(zeroed, blank / "adapter_model.safetensors")
    adapterkit.arrow([experts[0], small, blank], out=tmp_path / "arrow")  # top_k 3: all of them
    expected = logits(routed_by_the_rule(base(), tmp_path / "arrow"))
    model = base()
    h = load_arrow(model, tmp_path / "arrow", top_k=None)
    assert h.experts() == ["e0", "small", "blank"]
    assert torch.allclose(logits(model), expected, atol=2e-5)
    h = load_arrow(other := base(), tmp_path / "arrow", top_k=1, temperature=0.2)
    h.save(tmp_path / "again", name="arrow")
    assert json.loads((tmp_path / "again/arrow.json").read_text())["temperature"] == 0.2
    expected = logits(routed_by_the_rule(base(), tmp_path / "again"))
    assert torch.allclose(logits(other), expected, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("count, top_k", [(1, 1), (3, 3), (5, 2), (40, 3)])
@pytest.mark.parametrize("in_place, gradient", [(True, False), (False, False), (False, True)])
def test_each_way_of_adding_equals_the_rule(tokens, count, top_k, in_place, gradient):
    """One token and expert after the other, gathered, and all at once."""
    draw = torch.Generator().manual_seed(count)
    a, b, p, x, y = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((count, 3, 8), (count, 5, 3), (count, 8), (tokens, 8), (tokens, 5))
    )
    p[1:3] = 0  # equal similarities: top_k of them all the same
    b[1:3] = 0
    scales = torch.rand(count, generator=draw, dtype=torch.float64)
    expected = y.clone()
    for t in range(tokens):
        similarity = (p @ x[t]).abs()
        top = similarity.argsort(descending=True)[:top_k]
        for c, e in zip(torch.softmax(similarity[top] / 0.7, 0), top, strict=True):
            expected[t] += 0.5 * c * scales[e] * (b[e] @ (a[e] @ x[t]))
    x.requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        total = add_routed(
            y,
            x,
            torch.cat([a.flatten(0, 1), p]),
            b.transpose(1, 2).flatten(0, 1),
            scales,
            top_k=top_k,
            temperature=0.7,
            weight=0.5,
            in_place=in_place,
        )
    assert torch.allclose(total, expected, atol=1e-12)
    assert (total.data_ptr() == y.data_ptr()) == in_place
    if gradient:
        total.square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


# -- files -----------------------------------------------------------------------------------------


def same_router(one: Path, other: Path, *, names: bool = True) -> None:
    """Tensors byte for byte, and settings."""
    first, second = (load_file(folder / "arrow.safetensors") for folder in (one, other))
    assert set(first) == set(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key
    settings = [json.loads((folder / "arrow.json").read_text()) for folder in (one, other)]
    if not names:
        for each in settings:
            del each["experts"]
            each["sources"] = [source["header"] for source in each["sources"]]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_router_is_saved_as_it_was(dtype, experts, tmp_path):
    small = adapter(tmp_path / "small", 7, r=2, target_modules=["q_proj", "up_proj"])
    adapterkit.arrow(
        [experts[0], small, experts[1]], general=[experts[2]], out=tmp_path / "arrow", dtype=dtype
    )
    model = base()
    h = load_arrow(model, tmp_path / "arrow")
    h.save(tmp_path / "again")
    same_router(tmp_path / "arrow", tmp_path / "again")
    assert torch.equal(logits(load_arrow(base(), tmp_path / "again").model), logits(model))


@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("general", [0, 2])
def test_adding_and_removing_equal_a_new_router(general, compat, experts, tmp_path):
    options = {"general": experts[4 : 4 + general], "top_k": 2, "compat": compat}
    options |= {"seed": 3} if compat else {}
    model = base()
    h = create_arrow_model(model, experts[:2], **options)
    h.add_expert(experts[2], name="e2")
    h.add_expert(experts[3], name="e3")
    h.remove_expert("e1")
    assert h.experts() == ["e0", "e2", "e3"]
    h.save(tmp_path / "changed")
    adapterkit.arrow([experts[0], *experts[2:4]], out=tmp_path / "anew", **options)
    same_router(tmp_path / "anew", tmp_path / "changed")
    assert torch.equal(logits(model), logits(load_arrow(base(), tmp_path / "anew").model))


def test_experts_of_other_ranks_and_modules_come_and_go(experts, tmp_path):
    large = adapter(tmp_path / "large", 7, r=6, target_modules=["q_proj", "lm_head"])
    model = base()
    h = create_arrow_model(model, [experts[0], experts[1]], top_k=2)
    before = logits(model)
    h.add_expert(large, name="large")
    h.save(tmp_path / "added")
    adapterkit.arrow([experts[0], experts[1], large], top_k=2, out=tmp_path / "anew")
    same_router(tmp_path / "anew", tmp_path / "added")
    expected = logits(routed_by_the_rule(base(), tmp_path / "anew"))
    assert torch.allclose(logits(model), expected, atol=2e-5)
    h.remove_expert("large")
    assert CHILD not in dict(model.lm_head.named_children())
    assert torch.equal(logits(model), before)
    h.remove_expert("e1")
    h.save(tmp_path / "one")
    adapterkit.arrow([experts[0]], out=tmp_path / "only")
    same_router(tmp_path / "only", tmp_path / "one")


def test_a_loaded_router_requires_its_general_adapters(experts, tmp_path):
    adapterkit.arrow(experts[:2], general=experts[4:], out=tmp_path / "arrow")
    h = load_arrow(base(), tmp_path / "arrow")
    with pytest.raises(Refused, match=r"0 general adapters(.|\n)*2: e4, e5"):
        h.add_expert(experts[2], name="e2")
    other = adapter(tmp_path / "other", 8, r=3)
    with pytest.raises(Refused, match="general adapters other"):
        h.add_expert(experts[2], name="e2", general=[experts[4], other])
    h.save(tmp_path / "same")
    same_router(tmp_path / "arrow", tmp_path / "same")
    h.add_expert(experts[2], name="e2", general=experts[4:])
    h.save(tmp_path / "changed")
    adapterkit.arrow(experts[:3], general=experts[4:], out=tmp_path / "anew", top_k=2)
    same_router(tmp_path / "anew", tmp_path / "changed")


def test_names_of_experts_are_different(experts, tmp_path):
    for folder in ("one", "two"):
        shutil.copytree(experts[0], tmp_path / folder / "checkpoint-9")
    h = create_arrow_model(
        base(), [tmp_path / "one/checkpoint-9", tmp_path / "two/checkpoint-9"], top_k=1
    )
    assert h.experts() == ["checkpoint-9", "checkpoint-9-2"]
    h.remove_expert("checkpoint-9-2")
    assert h.experts() == ["checkpoint-9"]


# -- beside other adapters -------------------------------------------------------------------------


def test_loaded_adapters_are_sources(experts, tmp_path):
    model = base()
    h = load(model, experts[0], name="law")
    h.load(experts[1], name="med")
    h.load(experts[4], name="english")
    assert create_arrow_model(model, ["law", "med"], general=["english"], top_k=1) is h
    assert h.active == {"law": 1.0} and h.experts() == ["law", "med"]
    h.add_expert(experts[2], name="e2", general=["english"])
    with pytest.raises(Refused, match="0 general adapters"):
        h.add_expert(experts[3], name="e3")
    h.activate("arrow")
    anew = base()
    create_arrow_model(anew, experts[:3], general=[experts[4]], top_k=1)
    assert torch.allclose(logits(model), logits(anew), atol=1e-6)
    with pytest.raises(Refused, match="routes between experts"):
        h.add_expert("arrow", name="itself", general=["english"])


def test_a_new_adapter_is_trained_next_to_a_router_and_added(experts):
    model = base()
    h = create_arrow_model(model, experts[:3], top_k=2)
    h.attach(LoraConfig(rank=4, targets=ALL), name="new", seed=0)
    h.activate(["arrow", "new"])  # the router acts in all layers while the new one is trained
    model.train()
    optimizer = torch.optim.Adam(h.parameters("new"), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    router = h.state.adapters["arrow"]
    assert all(p.grad is None for _, part in router.patches() for p in part.parameters())
    h.add_expert("new", name="new")
    h.activate("arrow")
    assert h.experts() == ["e0", "e1", "e2", "new"]
    assert logits(model).isfinite().all()


def test_gradients_pass_as_through_pefts(experts):
    """Those of the embeddings, through all routers."""
    expected, actual = base(), base()
    wrapped = by_peft(expected, experts[:4], top_k=2, rng_seed=3)
    h = create_arrow_model(actual, experts[:4], top_k=2, compat="peft", seed=3)
    gradients = []
    for model, run in ((expected, wrapped), (actual, actual)):
        model.get_input_embeddings().weight.requires_grad_(True)
        run(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].any() and torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert h.active == {"arrow": 1.0}


def test_a_router_and_an_adapter_are_summed(experts, tmp_path):
    adapterkit.arrow(experts[:4], out=tmp_path / "arrow", top_k=2)
    expected = base()
    for module in routed_by_the_rule(expected, tmp_path / "arrow").modules():
        assert CHILD not in dict(module.named_children())
    load(expected, experts[4])  # within the hooks
    model = base()
    h = load(model, experts[4], name="plain")
    load_arrow(model, tmp_path / "arrow")
    assert h.active == {"plain": 1.0}
    h.activate({"plain": 1.0, "arrow": 1.0})
    both = logits(model)
    assert torch.allclose(both, logits(expected), atol=2e-5)
    h.activate({"arrow": 1.0, "plain": 1.0})
    assert torch.allclose(logits(model), both, atol=1e-5)


def test_rows_of_a_batch_are_routed_or_not(experts):
    model = base()
    h = create_arrow_model(model, experts[:4], top_k=2)
    h.load(experts[5], name="plain")
    tokens = torch.cat([TOKENS, TOKENS[:1]])
    with torch.no_grad(), h.rows(["arrow", None, "plain"]):
        mixed = model(input_ids=tokens).logits
        with pytest.raises(Refused, match="inside rows"):
            h.remove_expert("e0")
        with pytest.raises(Refused, match="inside rows"):
            h.add_expert(experts[4], name="e4")
        with pytest.raises(Refused, match="inside rows"):
            create_arrow_model(model, experts[:4], name="second")
    for row, name in enumerate(["arrow", None, "plain"]):
        h.activate(name)
        assert torch.allclose(mixed[row], logits(model, tokens[row : row + 1])[0], atol=1e-5)


def test_a_router_is_scaled_reported_deleted_and_detached(experts, tmp_path):
    model = base()
    state = copy.deepcopy(model.state_dict())
    h = create_arrow_model(model, experts[:4], top_k=2)
    assert list(model.state_dict()) == list(state)
    row = next(row for row in h.report() if row.module == "model.layers.0.self_attn.q_proj")
    factors = load_file(experts[1] / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{row.module}.lora_{x}.weight"].double() for x in ("A", "B"))
    share = row.adapters[1]
    assert (share.name, share.rank, share.scale) == ("arrow: e1", 4, 1.5)
    assert share.norm == pytest.approx(1.5 * float((b @ a).norm()))
    once = logits(model)
    h.rescale(0.5, name="arrow")
    h.save(tmp_path / "halved")
    halved = logits(model)
    h.rescale(2, name="arrow")
    h.activate({"arrow": 0.5})
    assert torch.allclose(logits(model), halved, atol=1e-6)
    assert torch.allclose(logits(load_arrow(base(), tmp_path / "halved").model), halved, atol=1e-6)
    h.activate("arrow")
    assert torch.equal(logits(model), once)
    with pytest.raises(Refused, match="active"):
        h.delete("arrow")
    h.activate(None)
    h.delete("arrow")
    assert h.names == [] and not h.state.sites
    load_arrow(model, tmp_path / "halved").detach()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(base()))


# -- bases -----------------------------------------------------------------------------------------


def test_arrow_on_gpt2_equals_peft(tmp_path):
    """Conv1D stores its weight transposed."""
    targets = ["c_attn", "c_proj", "c_fc"]
    sources = [
        adapter(tmp_path / str(i), i, oracle.gpt2, target_modules=targets, fan_in_fan_out=True)
        for i in range(3)
    ]
    expected = logits(by_peft(oracle.gpt2(), sources, top_k=2, rng_seed=1))
    model = oracle.gpt2()
    create_arrow_model(model, sources, top_k=2, compat="peft", seed=1)
    assert torch.allclose(logits(model), expected, atol=2e-5)


def test_arrow_on_a_bf16_base_rounds_once_per_layer(experts, tmp_path):
    """Routing and factors in float32, one rounding at each layer."""
    adapterkit.arrow(experts[:4], out=tmp_path / "arrow", top_k=2)
    expected = logits(routed_by_the_rule(base().bfloat16(), tmp_path / "arrow"))
    model = base().bfloat16()
    h = load_arrow(model, tmp_path / "arrow")
    assert all(p.dtype == torch.float32 for _, part in h.state.adapters["arrow"].patches()
               for p in part.parameters())  # fmt: skip
    assert logits(model).dtype == torch.bfloat16
    assert torch.allclose(logits(model).float(), expected.float(), atol=2e-2)
    model.to(torch.float64)  # all with it
    assert logits(model).dtype == torch.float64
    model.bfloat16()
    assert logits(model).isfinite().all()


def test_autocast_does_not_round_the_routing(experts, tmp_path):
    adapterkit.arrow(experts[:4], out=tmp_path / "arrow", top_k=2)
    model, reference = base(), routed_by_the_rule(base(), tmp_path / "arrow")
    load_arrow(model, tmp_path / "arrow")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = logits(model), logits(reference)
    assert torch.allclose(actual.float(), expected.float(), atol=5e-2)


def test_4_bit_base(experts, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def four_bit():
        model = base(hidden_size=64, intermediate_size=128)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if not isinstance(linear, torch.nn.Linear):
                        continue
                    quantized = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                        compute_dtype=torch.float32,
                    )  # fmt: skip
                    quantized.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    setattr(block, name, quantized.to("cpu"))
        return model

    def wide():
        return base(hidden_size=64, intermediate_size=128)

    sources = [adapter(tmp_path / str(i), i, wide) for i in range(4)]
    expected = logits(by_peft(four_bit(), sources, top_k=2, rng_seed=1))
    model = four_bit()
    h = create_arrow_model(model, sources, top_k=2, compat="peft", seed=1)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert not torch.allclose(logits(model), logits(wide()), atol=1e-3)
    h.detach()
    assert torch.equal(logits(model), logits(four_bit()))


def test_compiles_as_one_graph(experts):
    model = base()
    h = create_arrow_model(model, experts[:4], top_k=2)
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (x, x[:1, :1]):
            assert torch.allclose(compiled(tokens), block(tokens), atol=1e-5)
        h.activate({"arrow": 0.25})
        assert torch.allclose(compiled(x), block(x), atol=1e-5)
    torch.compiler.reset()


# -- misuse ----------------------------------------------------------------------------------------


def test_misuse_is_refused_before_anything_changes(experts, tmp_path):
    adapterkit.arrow(experts[:3], out=tmp_path / "arrow")
    model = base()
    for run, problem in [
        (lambda: create_arrow_model(model, experts[:2]), "top-k is 3"),
        (lambda: create_arrow_model(model, []), "no adapter|adapters"),
        (lambda: create_arrow_model(model, experts[:3], seed=1), "seed"),
        (lambda: create_arrow_model(model, experts[:3], temperature=0.0), "temperature"),
        (lambda: create_arrow_model(model, [tmp_path / "none"], top_k=1), "no such"),
        (lambda: create_arrow_model(model, experts[:3], name=""), "name"),
        (lambda: load_arrow(model, tmp_path / "arrow", top_k=4), "top_k 4"),
        (lambda: load_arrow(model, tmp_path / "arrow", top_k=0), "top-k 0"),
        (lambda: load_arrow(model, tmp_path / "arrow", temperature=-1), "temperature"),
        (lambda: load_arrow(model, tmp_path / "none"), "no such"),
        (lambda: load_arrow(model, experts[0]), r"no arrow.json(.|\n)*create_arrow_model"),
        (lambda: load_arrow(base(hidden_size=64), tmp_path / "arrow"), "shape"),
        (lambda: load_arrow(oracle.gpt2(), tmp_path / "arrow"), "no module"),
    ]:
        with pytest.raises(AdapterkitError, match=problem):
            run()
        assert not any(CHILD in dict(m.named_children()) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    h = load_arrow(model, tmp_path / "arrow")
    h.load(experts[3], name="plain")
    before = logits(model)
    for run, problem in [
        (lambda: load_arrow(model, tmp_path / "arrow"), "there already"),
        (lambda: h.add_expert(experts[3], name="e0"), "name 'e0'"),
        (lambda: h.add_expert(experts[3], name=""), "name ''"),
        (lambda: h.add_expert(experts[3], name="x", arrow="plain"), "plain is no router"),
        (lambda: h.add_expert(experts[3], name="x", arrow="nothing"), "no adapter nothing"),
        (lambda: h.add_expert(experts[3], name="x", general=[experts[4]]), "1 general"),
        (lambda: h.add_expert(tmp_path / "none", name="x"), "no such"),
        (lambda: h.remove_expert("e7"), "no expert e7"),
        (lambda: h.experts("plain"), "no router"),
        (lambda: h.merge("arrow"), "depends on the token"),
        (lambda: h.combine({"arrow": 1.0, "plain": 1.0}, name="c"), "routes between experts"),
    ]:
        with pytest.raises(AdapterkitError, match=problem):
            run()
    assert h.names == ["arrow", "plain"] and h.experts() == ["e0", "e1", "e2"]
    assert torch.equal(logits(model), before)
    h.remove_expert("e0")
    h.remove_expert("e1")
    with pytest.raises(Refused, match="only expert"):
        h.remove_expert("e2")


@pytest.mark.parametrize("change, problem", [
    ({"arrow": 2}, "format 2"),
    ({"top_k": 9}, "top_k 9"),
    ({"top_k": "many"}, "top_k = 'many'"),
    ({"temperature": 0}, "temperature = 0"),
    ({"experts": []}, "experts"),
    ({"experts": ["e0"], "top_k": 1}, "experts"),
])  # fmt: skip
def test_settings_that_cannot_be(change, problem, experts, tmp_path):
    adapterkit.arrow(experts[:3], out=tmp_path / "arrow")
    path = tmp_path / "arrow" / "arrow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterkitError, match=problem):
        load_arrow(base(), tmp_path / "arrow")


def test_tensors_that_cannot_be(experts, tmp_path):
    adapterkit.arrow(experts[:3], out=tmp_path / "arrow")
    path = tmp_path / "arrow" / "arrow.safetensors"
    tensors = load_file(path)
    q = "model.layers.0.self_attn.q_proj"
    for changed, problem in [
        ({f"{q}.scale": None}, r"q_proj with a, b, prototype"),
        ({f"{q}.prototype": tensors[f"{q}.prototype"][:2]}, "with shapes"),
        ({f"{q}.b": tensors[f"{q}.b"][:, :, :2].contiguous()}, "with shapes"),
        ({f"{q}.expert": torch.tensor([0, 1, 3], dtype=torch.int32)}, r"experts \[0, 1, 3\]"),
        ({f"{q}.a": tensors[f"{q}.a"] * torch.nan}, "not finite"),
        (dict.fromkeys(tensors), "no tensors"),
    ]:
        values = {key: value for key, value in (tensors | changed).items() if value is not None}
        save_file(values, path)
        with pytest.raises(AdapterkitError, match=problem):
            load_arrow(base(), tmp_path / "arrow")
