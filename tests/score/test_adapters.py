"""The loss of a model with adapters is that of PEFT's forward on the float model."""

import warnings

import peft
import pytest
import torch
import transformers

import adapterkit
from tests.support import gguf_files, oracle, quantized_llama
from tests.support.experts import tiny
from tests.support.scoring import assert_losses, in_jsonl, measured, random_rows
from tests.support.texts import write_rows
from tests.support.usual import usual

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ["q_proj", "v_proj", "down_proj"]
LORA = {
    "lora": {"target_modules": oracle.LINEAR},
    "rslora": {"target_modules": SOME, "use_rslora": True},
    "dora": {"target_modules": SOME, "use_dora": True},
    "patterns": {"target_modules": SOME, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"target_modules": ["lm_head", "q_proj"]},
    "a trained head": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "trained embeddings": {"target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"target_modules": SOME, "trainable_token_indices": [7, 9, 30]},
    "lora bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "layers": {"target_modules": SOME, "layers_to_transform": [1]},
}
OTHERS = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=SOME),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=SOME),
    "oft": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=SOME),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "hra": peft.HRAConfig(r=2, target_modules=SOME),
    "ia3": peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_modules=SOME, total_step=10),
}


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", *in_jsonl(random_rows()))


def bases(kind):
    models = {
        "llama": lambda: oracle.llama(initializer_range=0.2),
        "tied": lambda: oracle.llama(tie=True, initializer_range=0.2),
        "biased": lambda: oracle.llama(initializer_range=0.2, attention_bias=True),
        "gpt2": oracle.gpt2,
        "neox": oracle.neox,
        "t5": oracle.t5,
    }
    model = models[kind]()
    if kind == "t5":
        model.config.decoder_start_token_id = 1
    return model


def saved(model, folder):
    with oracle.quiet():
        model.float().save_pretrained(folder)
    return folder


def with_peft(model, *adapters, weights=()):
    """PEFT's model with the adapters active, each scaled by its weight."""
    wrapped = oracle.peft_model(model, *adapters)
    for module in wrapped.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            for number, weight in enumerate(weights):
                if f"a{number}" in module.scaling:
                    module.scaling[f"a{number}"] *= weight
    return wrapped


def assert_as_peft(base, given, data, wrapped, plain, rows):
    """The model's own loss, and that with the adapters, which differs."""
    alone, live = measured(base, data=data, adapters=given).values()
    with torch.no_grad():
        assert_losses(alone, plain, rows)
        assert_losses(live, wrapped, rows)
    assert float((alone[:, 1] - live[:, 1]).abs().max()) > 1e-2


def loaded(kind, folder):
    with oracle.quiet():
        return type(bases(kind)).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("base, name", usual([
    *(("llama", name) for name in LORA if "bias" not in name), ("tied", "embeddings"),
    ("tied", "lora"), ("tied", "trained tokens"), ("biased", "lora bias"), ("biased", "biases"),
], lambda row: row[1] not in ("layers", "patterns")))  # fmt: skip
def test_the_loss_with_a_lora_is_that_of_pefts_forward(base, name, data, large, tmp_path):
    folder, adapter = saved(bases(base), tmp_path / "base"), tmp_path / "adapter"
    oracle.train(loaded(base, folder), adapter, size=0.4, **LORA[name])
    wrapped = with_peft(loaded(base, folder), adapter)
    assert_as_peft(folder, [adapter], data, wrapped, loaded(base, folder), random_rows())


@pytest.mark.parametrize("base, targets", [
    ("gpt2", ["c_attn", "c_proj"]), ("neox", ["query_key_value", "dense"]), ("t5", ["q", "wo"]),
])  # fmt: skip
def test_the_loss_of_another_kind_of_model_with_a_lora(base, targets, large, tmp_path):
    folder, adapter = saved(bases(base), tmp_path / "base"), tmp_path / "adapter"
    fan = {"fan_in_fan_out": True} if base == "gpt2" else {}
    oracle.train(loaded(base, folder), adapter, size=0.4, target_modules=targets, **fan)
    rows = random_rows(decoder=base == "t5")
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    wrapped = with_peft(loaded(base, folder), adapter)
    assert_as_peft(folder, [adapter], data, wrapped, loaded(base, folder), rows)


@pytest.mark.parametrize("name", usual(OTHERS, ("loha", "lokr", "oft", "ia3")))
def test_the_loss_with_another_kind_of_adapter_is_that_of_pefts_forward(
    name, data, large, tmp_path
):
    folder, adapter = saved(bases("llama"), tmp_path / "base"), tmp_path / "adapter"
    with oracle.quiet():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(loaded("llama", folder), OTHERS[name])
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        wrapped.save_pretrained(adapter)
    wrapped = with_peft(loaded("llama", folder), adapter)
    assert_as_peft(folder, [adapter], data, wrapped, loaded("llama", folder), random_rows())


@pytest.mark.parametrize("kind", usual(["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"],
                                       ("qwen3_moe", "gpt_oss")))  # fmt: skip
def test_the_loss_with_a_lora_on_experts_is_that_of_pefts_forward(kind, large, tmp_path):
    model = tiny(kind)
    folder, adapter = saved(model, tmp_path / "base"), tmp_path / "adapter"
    with oracle.quiet():
        load = lambda: type(model).from_pretrained(folder, dtype=torch.float32).eval()
        oracle.train(
            load(),
            adapter,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        wrapped, plain = with_peft(load(), adapter), load()
    rows = random_rows(vocabulary=48)
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    assert_as_peft(folder, [adapter], data, wrapped, plain, rows)


def test_several_adapters_act_with_their_weights(data, tmp_path):
    folder = saved(bases("llama"), tmp_path / "base")
    paths = [tmp_path / "one", tmp_path / "two"]
    for seed, (path, targets) in enumerate(zip(paths, (SOME, ["q_proj"]), strict=True)):
        model = loaded("llama", folder)
        oracle.train(model, path, seed=seed, size=0.4, r=seed + 2, target_modules=targets)
    wrapped = with_peft(loaded("llama", folder), *paths, weights=(0.5, -1.5))
    given = [f"{paths[0]}=0.5", f"{paths[1]}=-1.5"]
    assert_as_peft(folder, given, data, wrapped, loaded("llama", folder), random_rows())


@pytest.mark.parametrize("form", usual(["nf4", "gptq4", "fp8", "awq", "mxfp4"], ("nf4", "gptq4")))
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_loss_of_a_quantized_model_with_an_adapter(form, use_dora, data, large, tmp_path):
    """It is PEFT's on the floats that the model decodes to, without a rounding."""
    packed, floats, adapter = (tmp_path / name for name in ("packed", "floats", "adapter"))
    if form == "nf4":
        quantized_llama.llama().save_pretrained(tmp_path / "base")
        adapterkit.quantize(tmp_path / "base", out=packed, to="nf4")
    else:
        quantized_llama.base(quantized_llama.FORMS[form], packed)
    adapterkit.dequantize(packed, out=floats, dtype="fp32")
    with oracle.quiet():
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(
            floats, dtype=torch.float32
        ).eval()
        oracle.train(load(), adapter, size=0.4, target_modules=SOME, use_dora=use_dora)
        wrapped, plain = with_peft(load(), adapter), load()
    assert_as_peft(packed, [adapter], data, wrapped, plain, random_rows())


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_loss_of_a_gguf_file_with_an_adapter(use_dora, data, large, tmp_path):
    gguf = pytest.importorskip("gguf")
    _, settings, tensors = gguf_files.llama()
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = {
        name: (kind, gguf.quantize(value, kind)) if value.ndim > 1 else value
        for name, value in tensors.items()
    }
    path = gguf_files.write(tmp_path / "model.gguf", "llama", settings, packed)
    with oracle.quiet():
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32
        ).eval()
        oracle.train(load(), tmp_path / "adapter", size=0.4, target_modules=SOME, use_dora=use_dora)
        wrapped, plain = with_peft(load(), tmp_path / "adapter"), load()
    assert_as_peft(path, [tmp_path / "adapter"], data, wrapped, plain, random_rows())


@pytest.fixture
def merged(tmp_path):
    """A base, two adapters, and the base with the first one merged into it."""
    folder = saved(bases("llama"), tmp_path / "base")
    paths = [tmp_path / "one", tmp_path / "two"]
    for seed, (path, targets) in enumerate(zip(paths, (SOME, ["q_proj"]), strict=True)):
        model = loaded("llama", folder)
        oracle.train(model, path, seed=seed, size=0.4, r=seed + 2, target_modules=targets)
    adapterkit.merge(folder, paths[:1], out=tmp_path / "merged")
    return folder, *paths, tmp_path / "merged"


def test_an_adapter_that_the_receipt_names_is_not_applied_twice(merged, data):
    folder, one, _, out = merged
    rows = measured(folder, out, data=data, adapters=[one])
    assert list(rows) == [str(folder), f"{folder} + one", str(out)]
    _, live, own = rows.values()
    torch.testing.assert_close(own, live, rtol=1e-5, atol=1e-5)


def test_only_the_adapters_that_the_receipt_does_not_name_are_applied(merged, data):
    folder, one, two, out = merged
    rows = measured(folder, out, data=data, adapters=[one, two])
    assert list(rows) == [str(folder), f"{folder} + one + two", str(out), f"{out} + two"]
    _, both, first, rest = rows.values()
    torch.testing.assert_close(rest, both, rtol=1e-5, atol=1e-5)
    assert float((first - both)[:, 1].abs().max()) > 1e-2
    document = adapterkit.score([out], data=data, adapters=[one, two])
    assert any("one is in merged already" in note for note in document["notes"]), document["notes"]


def test_an_adapter_that_is_contained_with_another_weight_is_added_as_asked(merged, data):
    folder, one, _, out = merged
    rows = measured(folder, out, data=data, adapters=[f"{one}=0.5"])
    assert list(rows) == [str(folder), f"{folder} + one", str(out), f"{out} + one"]
    (expected,) = list(measured(folder, data=data, adapters=[f"{one}=1.5"]).values())[1:]
    torch.testing.assert_close(rows[f"{out} + one"], expected, rtol=1e-5, atol=1e-5)
    notes = adapterkit.score([out], data=data, adapters=[f"{one}=0.5"])["notes"]
    assert any("already, with weight 1" in note for note in notes), notes


def test_an_adapter_that_was_merged_and_subtracted_again_is_applied(merged, data, tmp_path):
    _, one, _, out = merged
    adapterkit.merge(out, [f"{one}=-1"], out=tmp_path / "without")
    rows = measured(tmp_path / "without", out, data=data, adapters=[one])
    without = str(tmp_path / "without")
    assert list(rows) == [without, f"{without} + one", str(out)]


def test_a_note_says_that_the_adapter_was_trained_on_another_base(data, tmp_path):
    folder = saved(bases("llama"), tmp_path / "base")
    oracle.train(loaded("llama", folder), tmp_path / "adapter", target_modules=SOME)
    named = {"base_model_name_or_path": "org/other"}
    adapter = oracle.edit_config(tmp_path / "adapter", tmp_path / "named", **named)
    document = adapterkit.score(folder, data=data, adapters=[adapter])
    assert "named was trained on org/other; the base here is base" in document["notes"]
    assert len(document["notes"]) == 2  # the other one: there are few samples


def test_an_adapter_of_another_tools_layout_acts_as_in_its_own(data, tmp_path):
    folder, adapter = saved(bases("llama"), tmp_path / "base"), tmp_path / "adapter"
    oracle.train(loaded("llama", folder), adapter, size=0.4, target_modules=SOME)
    adapterkit.convert(adapter, out=tmp_path / "other", to="mlx")
    given = [[adapter], [tmp_path / "other"]]
    one, two = (list(measured(folder, data=data, adapters=a).values())[1] for a in given)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
