"""The laws of every init: W' + scale·b@a = W, zero deltas leave W, the same seed gives the same
factors; on every kind of layer, with every rule of scales."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.registry import members
from adapterkit.verbs.init.methods.protocol import ComputedInit, DrawnInit, RedistributingInit
from adapterkit.verbs.shared.statistics_file import KINDS as STATISTICS
from tests.support import initialized, oracle
from tests.support.initialized import KINDS, base_of, fits, methods, needs_statistics
from tests.support.input_statistics import linear_modules, save_statistics
from tests.support.usual import usual

ALL = methods()
CHANGING = methods(changes_base=True)
ZERO = [name for name in methods(changes_base=False) if name != "random"]
DRAWN = methods(needs=())
ROUNDING = 2e-7  # relative to a weight's norm, of float32
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALES = {
    "rank": ({}, lambda name: 1.0),
    "alpha": ({"alpha": 12.0}, lambda name: 3.0),
    "rslora": ({"alpha": 12.0, "rslora": True}, lambda name: 6.0),
    "rank-for": (
        {"alpha": 12.0, "rank_for": [r"layers\.0\..*q_proj=2", r"layers\.1\..*=3"]},
        lambda name: 12 / (3 if "layers.1." in name else 2 if "q_proj" in name else 4),
    ),
    "alpha-for": (
        {"rslora": True, "rank_for": ["v_proj=2"], "alpha_for": ["v_proj$=7.5"]},
        lambda name: 7.5 / math.sqrt(2) if "v_proj" in name else 2.0,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inits")


@pytest.fixture(scope="module")
def bases(folder) -> dict[str, Path]:
    """A Llama in three dtypes, and in shards."""
    for dtype in TYPES:
        oracle.save_base(oracle.llama(), folder / dtype, dtype)
    oracle.save_base(oracle.llama(), folder / "sharded", "fp32", max_shard_size="40KB")
    return {name: folder / name for name in (*TYPES, "sharded")}


@pytest.fixture(scope="module")
def stats(folder) -> Path:
    model, ids = oracle.llama(), torch.arange(60).view(3, 20)
    modules, batch = linear_modules(model, ("_proj",)), {"input_ids": ids, "labels": ids}
    return save_statistics(model, modules, [batch], folder / "stats.safetensors")


@pytest.fixture
def start(stats, tmp_path):
    """Start an adapter by a method; its folder."""

    def start(base: Path, method: str, name: str = "out", **options) -> Path:
        if needs_statistics(method):
            options["stats"] = stats
        options = {"rank": 4, "targets": "q_proj,v_proj,down_proj"} | options
        adapterkit.init(base, method=method, out=tmp_path / name, **options)
        return tmp_path / name

    return start


def files(out: Path) -> dict[str, bytes]:
    """The weights of an output, byte for byte."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}


def values_of(out: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Its tensors by file and key."""
    return {(name, k): v for name, data in files(out).items() for k, v in load(data).items()}


LLAMA = type(oracle.llama())


def test_every_init_says_what_it_is():
    for name, init in members("inits").items():
        assert init.name == name and init.source and isinstance(init.changes_base, bool)
        assert isinstance(init.needs, tuple) and set(init.needs) <= {"weight", *STATISTICS}
        assert issubclass(init, ComputedInit if init.needs else DrawnInit)
    assert {*CHANGING, *ZERO, "random"} == {*ALL}


@pytest.mark.parametrize("name", ["triplets_per_ranks", "redraw", "zerob"])
@pytest.mark.parametrize("method", ALL)
def test_a_misspelt_attribute_is_refused(method, name):
    init = members("inits")[method]
    with pytest.raises(TypeError, match=f"Other has attributes that no init has: {name}"):
        type("Other", init.__bases__, {"name": "other", "source": "a test", name: 1})


@pytest.mark.parametrize(
    ("method", "rule"),
    [(method, "rank-for") for method in CHANGING]
    + [("pissa", rule) for rule in SCALES if rule != "rank-for"],
)
def test_the_rest_and_the_part_are_the_weight(method, rule, bases, start):
    options, scale_of = SCALES[rule]
    out = start(bases["fp32"], method, **options)
    before, rest = (load_file(f / "model.safetensors") for f in (bases["fp32"], out / "base"))
    parts = initialized.products(out / "adapter")
    assert len(parts) == 6
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        if name not in parts:
            assert torch.equal(rest[key], weight), key
            continue
        whole = rest[key].double() + scale_of(name) * parts[name]
        assert float((whole - weight).norm()) <= ROUNDING * float(weight.norm()), name
        assert float(parts[name].norm()) > 1e-4 * float(weight.norm()), name
    # PEFT reads the same scales from the config
    actual = initialized.rebuilt(LLAMA, out / "base", out / "adapter")
    initialized.assert_close(actual, initialized.load(LLAMA, bases["fp32"]).state_dict(), 1e-6)


@pytest.mark.parametrize(
    ("base", "factors"), [("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")]
)
@pytest.mark.parametrize("method", CHANGING)
def test_factors_as_they_are_written_define_the_rest(method, base, factors, bases, start):
    """W' is W - scale·b@a in float32, rounded once, whatever the dtype of a and b."""
    out = start(bases[base], method, alpha=6, dtype=factors)
    before, rest = (load_file(f / "model.safetensors") for f in (bases[base], out / "base"))
    stored = load_file(out / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {TYPES[factors]}
    for name, product in initialized.products(out / "adapter").items():
        weight, actual = before[f"{name}.weight"], rest[f"{name}.weight"]
        assert actual.dtype == TYPES[base]
        exact = weight.double() - 1.5 * product
        oracle.assert_rounded(
            actual, oracle.Exact(exact, weight.double().abs() + 1.5 * product.abs(), 8), name
        )


@pytest.mark.parametrize("method", ZERO)
def test_a_zero_delta_leaves_the_model_as_it_is(method, bases, start):
    out = start(bases["fp32"], method, alpha=6)
    assert not (out / "base").exists() and not (out / "adapter/initial").exists()
    ids = torch.arange(12)[None]
    plain = initialized.load(LLAMA, bases["fp32"])
    started = initialized.load(LLAMA, bases["fp32"], out / "adapter")
    with torch.no_grad():
        expected, actual = plain(input_ids=ids).logits, started(input_ids=ids).logits
    pairs = load_file(out / "adapter/adapter_model.safetensors")
    if method == "orthogonal":  # both factors are set, their product is zero to rounding
        assert all(tensor.any() for tensor in pairs.values())
        assert torch.allclose(actual, expected, atol=1e-5)
        return
    assert torch.equal(actual, expected)
    for product in initialized.products(out / "adapter").values():
        assert not product.any()
    for side in ("lora_A", "lora_B"):
        zero = {not tensor.any() for key, tensor in pairs.items() if side in key}
        assert zero == {side == ("lora_A" if method == "mica" else "lora_B")}


@pytest.mark.parametrize("method", ALL)
def test_the_same_seed_gives_the_same_factors(method, bases, start):
    one, same = (start(bases["fp32"], method, name, seed=3) for name in ("one", "same"))
    assert files(one) == files(same)
    other = start(bases["fp32"], method, "other", seed=4)
    values, others = values_of(one), values_of(other)  # headers of a changed base differ
    assert values.keys() == others.keys()
    assert (method in DRAWN) != all(torch.equal(values[key], others[key]) for key in values)


@pytest.mark.parametrize(
    "method", [m for m in ALL if not issubclass(members("inits")[m], RedistributingInit)]
)
def test_other_modules_do_not_matter(method, bases, start):
    many = load_file(start(bases["fp32"], method, "many") / "adapter/adapter_model.safetensors")
    few = start(bases["fp32"], method, "few", targets="v_proj", layers="1")
    few = load_file(few / "adapter/adapter_model.safetensors")
    assert len(few) == 2
    for key, tensor in few.items():
        assert torch.equal(tensor, many[key])


@pytest.mark.parametrize("method", ALL)
def test_shards_and_workers_do_not_matter(method, bases, start, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {*range(8)})
    plain = start(bases["fp32"], method, "plain")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    sharded = start(bases["sharded"], method, "sharded", memory="1MB")
    pairs = [oracle.stored(out / "adapter") for out in (plain, sharded)]
    if method in CHANGING:
        assert len(list((sharded / "base").glob("*.safetensors"))) > 2
        assert (sharded / "base/model.safetensors.index.json").exists()
        pairs += [oracle.stored(out / "base") for out in (plain, sharded)]
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# -- kinds of layers -------------------------------------------------------------------------------


# other kernels of convolutions and other experts are as these
@pytest.fixture(
    scope="module", params=usual(KINDS, lambda name: name not in ("conv3d", "qwen3_moe"))
)
def of_kind(request, folder):
    """(its record, its class, its base, its weights)"""
    kind = KINDS[request.param]
    model, base = kind.build(), folder / f"kind-{request.param}"
    with oracle.quiet():
        model.save_pretrained(base)
    return kind, type(model), base, initialized.load(type(model), base).state_dict()


# a method knows the matrix of a layer, not its kind: each meets every fourth kind
@pytest.mark.parametrize("every_method", usual([False, True], {False}))
def test_on_every_kind_of_layer(of_kind, every_method, tmp_path):
    """PEFT's merge of the adapter into the base is the original, all weights of the model."""
    kind, cls, base, expected = of_kind
    tried = [method for method in ALL if fits(method, kind)]
    assert {"pissa", "default"} <= {*tried}
    if not every_method:
        position = [*KINDS.values()].index(kind)
        tried = [
            "pissa",
            *(m for n, m in enumerate(tried) if (n + position) % 4 == 0 and m != "pissa"),
        ]
    for method in tried:
        out = tmp_path / method
        options = {"rank": 2, "alpha": 3, "targets": kind.targets}
        receipt = adapterkit.init(base, method=method, out=out, **options)
        assert receipt.data["modules"] == kind.modules
        actual = initialized.rebuilt(cls, base_of(out, base), out / "adapter")
        if method == "random":
            changed = [name for name in expected if not torch.equal(actual[name], expected[name])]
            # PEFT adds to the tied weight itself
            assert len(changed) == kind.modules + (kind.build is oracle.tied_llama)
        else:
            initialized.assert_close(actual, expected, 5e-7)
    adapterkit.verify(out)


def test_implicit_on_every_kind_of_layer(of_kind, tmp_path):
    """No base: the initial factors are the adapter's, and a merge takes them out."""
    kind, _, base, _ = of_kind
    out, before = tmp_path / "out", oracle.stored(base)
    options = {"rank": 2, "alpha": 3, "targets": kind.targets, "residual": "implicit"}
    adapterkit.init(base, method="pissa", out=out, **options)
    assert not (out / "base").exists()
    stored, initial = (oracle.stored(out / n) for n in ("adapter", "adapter/initial"))
    assert stored.keys() == initial.keys() and len(stored) == 2 * kind.modules
    assert all(torch.equal(stored[key], initial[key]) for key in stored)
    adapterkit.merge(base, [out / "adapter"], out=tmp_path / "merged")
    merged = oracle.stored(tmp_path / "merged")
    initialized.assert_close({key: merged[key] for key in before}, before, 5e-7)


def test_layers_that_a_method_does_not_support_are_refused(folder, stats, tmp_path):
    base = folder / "convolutions"
    with oracle.quiet():
        KINDS["conv2d"].build().save_pretrained(base)
    limited = [name for name in ALL if "conv" not in members("inits")[name].kinds]
    assert "orthogonal" in limited and "eva" in limited
    for method in limited:
        options = {"stats": stats} if needs_statistics(method) else {}
        with pytest.raises(AdapterkitError, match=f"{method} on .*, of kind conv") as caught:
            adapterkit.init(
                base, method=method, rank=2, targets="convolution", out=tmp_path / "no", **options
            )
        assert "9" in str(caught.value)  # all of them
    assert not (tmp_path / "no").exists()


# -- quantized bases -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHANGING)
def test_on_a_quantized_base(method, stats, tmp_path):
    """The base's own format is kept: the decoded weights lose the part and are encoded again."""
    base, packed, out = (tmp_path / name for name in ("base", "packed", "out"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = oracle.llama(**sizes)
    oracle.save_base(model, base, "fp32")
    adapterkit.quantize(base, to="nf4", out=packed)
    options: dict = {"rank": 8, "targets": "q_proj,down_proj"}
    if needs_statistics(method):
        ids = torch.arange(60).view(3, 20)
        modules, batch = linear_modules(model, ("_proj",)), {"input_ids": ids, "labels": ids}
        options["stats"] = save_statistics(model, modules, [batch], tmp_path / "s.safetensors")
    receipt = adapterkit.init(packed, method=method, out=out, **options)
    assert json.loads((out / "base/config.json").read_text())["quantization_config"]
    for name in ("packed", "out/base"):
        adapterkit.dequantize(tmp_path / name, dtype="fp32", out=tmp_path / f"plain/{name}")
    before, rest = (oracle.stored(tmp_path / "plain" / name) for name in ("packed", "out/base"))
    parts = initialized.products(out / "adapter")
    assert len(parts) == 4
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        if name not in parts:
            assert torch.equal(rest[key], weight), key
            continue
        error = float((rest[key].double() + parts[name] - weight).norm() / weight.double().norm())
        assert error < 0.12  # of nf4
        assert receipt.data["parameters"][key]["error"] == pytest.approx(error, rel=1e-3)


# -- the receipt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("method", CHANGING)
def test_the_receipt_has_the_error_of_each_module(method, base, bases, start):
    out = start(bases[base], method, alpha=6)
    metrics = json.loads((out / "adapterkit.json").read_text())["parameters"]
    before, rest = (load_file(f / "model.safetensors") for f in (bases[base], out / "base"))
    for name, product in initialized.products(out / "adapter").items():
        weight = before[f"{name}.weight"].double()
        whole = rest[f"{name}.weight"].double() + 1.5 * product
        error = float((whole - weight).norm() / weight.norm())
        assert metrics[f"{name}.weight"]["error"] == pytest.approx(error, rel=0.05, abs=2e-8)
        taken = float(1.5 * product.norm() / weight.norm())
        assert metrics[name]["taken"] == pytest.approx(taken, rel=1e-4)
        assert (metrics[name]["rank"], metrics[name]["alpha"]) == (4, 6)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in ALL if members("inits")[m].needs])
def test_a_rank_above_the_weights_is_refused_with_all_of_them(method, bases, start, tmp_path):
    with pytest.raises(AdapterkitError) as caught:
        start(bases["fp32"], method, rank=17, targets=".*_proj", rank_for=["down_proj=16"])
    text = str(caught.value)
    for layer, leaf in itertools.product(range(2), ("k_proj", "v_proj")):
        assert f"rank 17 for model.layers.{layer}.self_attn.{leaf} (16, 32)" in text
    assert "down_proj" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_for": ["nowhere=2", "q_proj=2"], "alpha_for": ["gone=1"]}, ["'nowhere'", "'gone'"]),
        ({"rank_for": ["q_proj=two", "=3", "q_proj=0"]}, ["two", "'=3'", "q_proj=0"]),
        ({"alpha_for": ["q_proj=inf", "q_proj"]}, ["q_proj=inf", "'q_proj'"]),
        ({"targets": "q_proj,nowhere,gone"}, ["'nowhere'", "'gone'"]),
        ({"exclude": "nowhere"}, ["--exclude 'nowhere' matches none"]),
        ({"exclude": ".*proj"}, ["no module is a target"]),
        ({"layers": "0-5"}, ["--layers: no target in layer 2", "in layer 4"]),
        ({"layers": "1-0"}, ["--layers '1-0'"]),
        ({"layers": "0,x"}, ["--layers 'x'"]),
        ({"residual": "nothing"}, ["residual"]),
        ({"settings": {"niter": "many"}}, ["niter"]),
        ({"settings": {"unheard": 1}}, ["unheard"]),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, words, bases, start, tmp_path):
    with pytest.raises(AdapterkitError) as caught:
        start(bases["fp32"], "pissa", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_type_without_usual_targets_is_refused(bases, start, tmp_path):
    base = oracle.edit_config(bases["fp32"], tmp_path / "other", model_type="olmo2")
    with pytest.raises(Refused, match="no usual targets of model type olmo2"):
        start(base, "default", targets=None)


def test_exclude_and_layers_leave_modules_out(bases, start):
    out = start(
        bases["fp32"], "pissa", targets=".*_proj", exclude=".*mlp.*|.*[kv]_proj", layers="1"
    )
    names = {f"model.layers.1.self_attn.{leaf}" for leaf in ("q_proj", "o_proj")}
    assert initialized.products(out / "adapter").keys() == names
