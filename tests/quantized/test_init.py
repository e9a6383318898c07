"""init (PiSSA, QPiSSA), merging into the 16-bit original, and LoftQ's answers: against PEFT,
transformers and float64."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Refused
from adapterkit.core.registry import members
from tests.support import oracle, tiny
from tests.support.input_statistics import linear_modules, save_statistics

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    oracle.save_base(oracle.llama(**SIZES), folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    adapterkit.quantize(base, to="nf4", out=folder)
    return folder


def model(folder: Path, adapter: Path | None = None):
    with oracle.quiet():
        actual = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto")
        return actual if adapter is None else peft.PeftModel.from_pretrained(actual, adapter)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(folder, adapter)(input_ids=IDS).logits.float()


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """b @ a by module, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    actual = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            actual[name] = tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return actual


@pytest.mark.parametrize("options", [{}, {"alpha": 8}, {"alpha": 24, "rslora": True}], ids=str)
def test_pissa_is_the_principal_part_and_the_rest(options, base, tmp_path):
    adapterkit.init(base, method="pissa", rank=16, out=tmp_path / "out", **options)
    adapterkit.verify(tmp_path / "out")
    before, rest = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "base" / "model.safetensors"),
    )
    scale = options.get("alpha", 16) / (4 if options.get("rslora") else 16)
    for name, product in factors(tmp_path / "out" / "adapter").items():
        weight = before[f"{name}.weight"].double()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        best = (u[:, :16] * s[:16]) @ vh[:16]
        assert float((scale * product - best).norm()) <= 1e-5 * float(best.norm()), name
        assert float(
            (rest[f"{name}.weight"].double() + scale * product - weight).norm()
        ) <= 1e-6 * float(weight.norm()), name
    assert torch.allclose(
        logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter"), logits(base), atol=1e-4
    )


CHANGING = [name for name, init in members("inits").items() if init.changes_base]


@pytest.fixture(scope="module")
def stats(base, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    llama, ids = model(base), torch.arange(60).view(3, 20)
    modules = linear_modules(llama, ("_proj",))
    return save_statistics(llama, modules, [{"input_ids": ids, "labels": ids}], file)


@pytest.mark.parametrize("method", CHANGING)
def test_base_and_adapter_are_the_original(method, base, stats, tmp_path):
    """W' + scale·b@a = W, of every init that changes the base; PEFT loads both."""
    options: dict = {}
    if set(members("inits")[method].needs) - {"weight"}:
        options = {"stats": stats}
    receipt = adapterkit.init(
        base, method=method, rank=6, alpha=9, targets="all-linear", out=tmp_path / "out", **options
    )
    before = load_file(base / "model.safetensors")
    rest = load_file(tmp_path / "out" / "base" / "model.safetensors")
    products = factors(tmp_path / "out" / "adapter")
    assert len(products) == 14 and receipt.data["parameters"]
    for name, product in products.items():
        weight = before[f"{name}.weight"].double()
        error = rest[f"{name}.weight"].double() + 1.5 * product - weight
        assert float(error.norm()) <= 1e-6 * float(weight.norm()), name
        assert float(product.norm()) > 1e-3 * float(weight.norm()), name
    whole = logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    assert torch.allclose(whole, logits(base), atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_inits_agree_with_peft(method, base, tmp_path):
    adapterkit.init(base, method=method, rank=8, alpha=12, out=tmp_path / "out")
    config = peft.LoraConfig(
        r=8, lora_alpha=12, target_modules="all-linear", init_lora_weights=method
    )
    with oracle.quiet():
        theirs = peft.get_peft_model(model(base), config)
    ours = factors(tmp_path / "out" / "adapter")
    rest = load_file(tmp_path / "out" / "base" / "model.safetensors")
    for name, product in ours.items():
        layer = theirs.base_model.model.get_submodule(name)
        expected = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert torch.allclose(product, expected.detach(), atol=2e-5), name
        assert torch.allclose(rest[f"{name}.weight"], layer.base_layer.weight, atol=2e-5), name


@pytest.mark.parametrize("target", ["nf4", "int8"])
def test_qpissa_quantizes_the_rest(target, base, tmp_path):
    receipt = adapterkit.init(
        base, method="pissa", rank=16, targets="all-linear", quantize=target, out=tmp_path / "out"
    )
    metrics = {
        key: metric for key, metric in receipt.data["parameters"].items() if "error_plain" in metric
    }
    assert len(metrics) == 14 and all(
        metric["error"] < metric["error_plain"] for metric in metrics.values()
    )
    adapterkit.dequantize(tmp_path / "out" / "base", out=tmp_path / "plain")
    before, rest = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    for name, product in factors(tmp_path / "out" / "adapter").items():
        weight = before[f"{name}.weight"].double()
        error = float((rest[f"{name}.weight"].double() + product - weight).norm() / weight.norm())
        assert error == pytest.approx(metrics[f"{name}.weight"]["error"], rel=1e-3)
    plain = adapterkit.quantize(base, to=target, out=tmp_path / target)
    assert plain.data["parameters"].keys() <= metrics.keys()
    close = logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter") - logits(base)
    assert float(close.norm()) < float((logits(tmp_path / target) - logits(base)).norm())


def test_rebase_brings_a_trained_pissa_back(base, tmp_path):
    adapterkit.init(base, method="pissa", rank=4, out=tmp_path / "out", targets="q_proj,down_proj")
    assert len(factors(tmp_path / "out" / "adapter")) == 4
    with oracle.quiet():
        tuned = model(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data += 0.01 * torch.randn_like(parameter)
        tuned.save_pretrained(tmp_path / "trained")
        expected = tuned(input_ids=IDS).logits
    adapterkit.rebase(
        tmp_path / "trained", initial=tmp_path / "out" / "adapter", out=tmp_path / "plain"
    )
    assert torch.allclose(logits(base, tmp_path / "plain"), expected, atol=1e-4)


def test_an_adapter_of_a_quantized_base_goes_into_the_original(base, packed, tmp_path):
    oracle.train(oracle.llama(**SIZES), tmp_path / "adapter", target_modules=["q_proj"])
    adapterkit.merge(packed, [tmp_path / "adapter"], original=base, out=tmp_path / "out")
    adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "same")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert "nf4" in " ".join(
        json.loads((tmp_path / "out" / "adapterkit.json").read_text())["notes"]
    )


def test_a_base_that_is_not_a_quantized_copy_of_the_original_is_refused(base, packed, tmp_path):
    oracle.train(oracle.llama(**SIZES), tmp_path / "adapter", target_modules=["q_proj"])
    into = lambda quantized, original: adapterkit.merge(
        quantized, [tmp_path / "adapter"], original=original, out=tmp_path / "no"
    )
    with pytest.raises(Refused, match="no quantized weights"):
        into(base, base)
    adapterkit.loftq(base, rank=4, iterations=1, out=tmp_path / "loftq")
    with pytest.raises(Refused, match="made by loftq"):
        into(tmp_path / "loftq" / "base", base)
    oracle.save_base(oracle.llama(), tmp_path / "other")
    with pytest.raises(Refused, match="the same weights"):
        into(packed, tmp_path / "other")
    with pytest.raises(Refused, match="this base is quantized"):
        into(packed, packed)
    assert not (tmp_path / "no").exists()


# -- answers to LoftQ ------------------------------------------------------------------------------


def test_factors_are_kept_or_rolled_back_one_after_the_other(base, packed, tmp_path):
    asked = []

    def accept(module, a, b):
        asked.append(module)
        return "mlp" in module and a.shape[0] == b.shape[1] == 4

    receipt = adapterkit.loftq(
        base, quantized_base=packed, rank=4, accept=accept, out=tmp_path / "out"
    )
    assert asked == sorted(asked) and len(asked) == 14
    for name, product in factors(tmp_path / "out").items():
        metric = receipt.data["parameters"][name]
        assert bool(product.any()) == metric["accepted"] == ("mlp" in name)
        assert (
            metric["error_after"] < metric["error"]
            if "mlp" in name
            else metric["error_after"] == metric["error"]
        )


def test_answers_need_a_quantized_base(base, tmp_path):
    with pytest.raises(Refused, match="give --quantized-base"):
        adapterkit.loftq(base, rank=2, accept=lambda module, a, b: True, out=tmp_path / "failed")


def test_quantize_dequantize_and_init_commands_run(base, tmp_path):
    for argv in [
        ["quantize", str(base), "--to", "nf4", "--double-quant", "--out", str(tmp_path / "nf4")],
        ["dequantize", str(tmp_path / "nf4"), "--dtype", "fp16", "--out", str(tmp_path / "fp16")],
        [
            "init",
            str(base),
            "--method",
            "pissa",
            "--rank",
            "4",
            "--quantize",
            "fp4",
            "--out",
            str(tmp_path / "init"),
        ],
        [
            "loftq",
            str(base),
            "--rank",
            "4",
            "--alpha",
            "8",
            "--iterations",
            "1",
            "--out",
            str(tmp_path / "loftq"),
        ],
    ]:
        dry = CliRunner().invoke(main, [*argv, "--dry-run"])
        assert dry.exit_code == 0 and not Path(argv[-1]).exists(), dry.output
        done = CliRunner().invoke(main, argv)
        assert done.exit_code == 0, done.output
        adapterkit.verify(argv[-1])


def _targeted(folder: Path) -> set[str]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}


TYPES = {
    "llama": oracle.llama,
    "gpt2": oracle.gpt2,
    "t5": oracle.t5,
    "classifier": oracle.bert_classifier,
    "bert": oracle.bert,
}


@pytest.mark.parametrize("kind", TYPES)
def test_all_linear_is_what_it_is_in_peft(kind, tmp_path):
    """All linear layers but the output head: T5's wo too, which quantizers leave alone, and no
    classifier."""
    oracle.save_base(TYPES[kind](), tmp_path / "base", "fp32")
    adapterkit.init(
        tmp_path / "base", method="pissa", rank=2, targets="All-Linear", out=tmp_path / "out"
    )
    task = "SEQ_CLS" if kind == "classifier" else None
    cls = getattr(
        transformers, json.loads((tmp_path / "base/config.json").read_text())["architectures"][0]
    )
    config = peft.LoraConfig(
        target_modules="all-linear", task_type=task, fan_in_fan_out=kind == "gpt2"
    )
    model = peft.LoraModel(cls.from_pretrained(tmp_path / "base"), config, "default")
    names = {
        name
        for name, layer in model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    tied = {"cls.predictions.decoder", "lm_head"}
    assert _targeted(tmp_path / "out/adapter") == names - tied


@pytest.mark.parametrize("verb", ["init", "loftq", "kept"])
def test_one_grammar_of_targets(verb, base, packed, tmp_path):
    def targets_of(targets, name="out"):
        how = {
            "init": {"method": "pissa"},
            "loftq": {"iterations": 1},
            "kept": {"quantized_base": packed},
        }[verb]
        out = tmp_path / name
        getattr(adapterkit, "init" if verb == "init" else "loftq")(
            base, rank=2, targets=targets, out=out, **how
        )
        return _targeted(out if verb == "kept" else out / "adapter")

    layer = "model.layers.1.self_attn."
    everything = targets_of("all-linear", "all")
    usual = ("q_proj", "v_proj") if verb == "init" else ("",)  # PEFT's for llama
    assert len(everything) == 14
    assert targets_of(None, "default") == {name for name in everything if name.endswith(usual)}
    assert targets_of("q_proj, 1.self_attn.k_proj", "names") == {
        "model.layers.0.self_attn.q_proj",
        layer + "q_proj",
        layer + "k_proj",
    }
    assert targets_of(["q_proj", "up_proj"], "list") == {
        name for name in everything if name.endswith(("q_proj", "up_proj"))
    }
    assert targets_of(r".*layers\.1\..*(q|k)_proj", "regex") == {layer + "q_proj", layer + "k_proj"}
    for wrong, words in [
        ("q_proj,nowhere,v", ["'nowhere'", "'v'"]),
        ("attn.q_proj", ["'attn.q_proj'"]),
        ("self_attn,q_proj", ["target model.layers.0.self_attn is a LlamaAttention"]),
        ("(nowhere|v)$", ["no module is a target"]),
        ("norm", ["target model.norm is a LlamaRMSNorm"]),
        *(
            [("lm_head", ["lm_head is not quantized"]), ("embed_tokens", ["is not quantized"])]
            if verb != "init"
            else []
        ),
    ]:
        with pytest.raises(Refused) as caught:
            targets_of(wrong, "no")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "no").exists()


def test_a_head_by_its_name(base, tmp_path):
    adapterkit.init(base, method="pissa", rank=2, targets="lm_head", out=tmp_path / "out")
    assert _targeted(tmp_path / "out/adapter") == {"lm_head"}
    one, two = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out/base"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == ["lm_head.weight"]


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "lm_head,embed_tokens"])
def test_a_tied_weight_is_untied(targets, tmp_path):
    """Only the sides with factors lose a part: the others keep W."""
    oracle.save_base(oracle.llama(tie=True), tmp_path / "tied", "fp32")
    out = tmp_path / "out"
    receipt = adapterkit.init(tmp_path / "tied", method="pissa", rank=2, targets=targets, out=out)
    assert "untied: lm_head.weight, model.embed_tokens.weight" in receipt.data["notes"][0]
    before, rest = (load_file(f / "model.safetensors") for f in (tmp_path / "tied", out / "base"))
    for name in ("lm_head", "model.embed_tokens"):
        same = torch.equal(rest[f"{name}.weight"], before["model.embed_tokens.weight"])
        assert same != (name.rpartition(".")[2] in targets)
    whole = logits(out / "base", out / "adapter")
    assert torch.allclose(whole, logits(tmp_path / "tied"), atol=1e-5)


def test_layers_stored_fused(tmp_path):
    """Those without factors stay as they are in the tensor that holds all three."""
    tiny.model("nomic_bert").save_pretrained(tmp_path / "base")
    adapterkit.init(
        tmp_path / "base", method="pissa", rank=2, targets="q_proj,o_proj", out=tmp_path / "out"
    )
    products = factors(tmp_path / "out/adapter")
    assert {name.rpartition(".")[2] for name in products} == {"q_proj", "o_proj"}
    before, rest = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "out/base")
    )
    for number in range(2):
        key = f"encoder.layers.{number}.attn.Wqkv.weight"
        product = products[f"layers.{number}.self_attn.q_proj"]
        q, others = before[key].tensor_split([len(product)])
        part, same = rest[key].tensor_split([len(product)])
        assert torch.equal(same, others)
        assert torch.allclose(part + product, q.double(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unheard"},
        {"rank": 0},
        {"alpha": -1.0},
        {"quantize": "nf5"},
        {"targets": "nowhere"},
        {"block_size": 63, "quantize": "nf4"},
        {"skip": "q_proj"},
        {"double_quant": True},
    ],
    ids=str,
)
def test_an_init_that_makes_no_sense_is_refused(options, base, tmp_path):
    with pytest.raises(Refused):
        adapterkit.init(base, **({"method": "pissa", "rank": 4, "out": tmp_path / "out"} | options))
    assert not (tmp_path / "out").exists()


def test_floats_in_files_of_a_size(base, packed, tmp_path):
    adapterkit.dequantize(packed, out=tmp_path / "one")
    adapterkit.dequantize(packed, max_shard_size="100KB", out=tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = oracle.stored(tmp_path / "one"), oracle.stored(tmp_path / "many")
    assert all(torch.equal(one[key], many[key]) for key in one) and one.keys() == many.keys()
    assert torch.equal(logits(tmp_path / "many"), logits(tmp_path / "one"))
    oracle.train(oracle.llama(**SIZES), tmp_path / "adapter", target_modules=["q_proj"])
    merge = lambda name, **how: adapterkit.merge(
        packed, [tmp_path / "adapter"], out=tmp_path / name, dequantize=True, **how
    )
    merge("merged", dtype="fp32", max_shard_size="100KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(files)
    merge("whole", dtype="fp32")
    assert torch.equal(logits(tmp_path / "merged"), logits(tmp_path / "whole"))
    receipt = merge("halves")  # what the help promises, although its library computes in float32
    assert any("written in bf16" in note for note in receipt.data["notes"])
    assert {value.dtype for value in oracle.stored(tmp_path / "halves").values()} == {
        torch.bfloat16
    }
    config = json.loads((tmp_path / "halves" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_an_adapter_of_a_classifier_loads(tmp_path):
    """By the task type of one, PEFT would look for weights of the head."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    config = transformers.LlamaConfig(**sizes, pad_token_id=0)
    oracle.save_base(
        oracle._model("LlamaForSequenceClassification", config), tmp_path / "base", "fp32"
    )
    adapterkit.init(tmp_path / "base", method="pissa", rank=4, out=tmp_path / "out")
    load = transformers.LlamaForSequenceClassification.from_pretrained
    with oracle.quiet():
        whole = peft.PeftModel.from_pretrained(
            load(tmp_path / "out" / "base"), tmp_path / "out" / "adapter"
        )
        assert torch.allclose(
            whole(input_ids=IDS).logits, load(tmp_path / "base")(input_ids=IDS).logits, atol=1e-4
        )
