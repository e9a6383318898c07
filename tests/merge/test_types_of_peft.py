"""PEFT's types and variants that are a LoRA in other words, merged and live: the oracle is PEFT's
own merge, and for QA-LoRA, which PEFT cannot merge, its forward. And the types that are refused."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.core.adapter.config import WITHOUT_WEIGHTS
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.registry import members
from tests.support import oracle, quantized_llama
from tests.support.usual import usual

IDS = torch.arange(12).view(1, 12)
SAVED = {"modules_to_save": ["lm_head"]}


@dataclass(frozen=True)
class Case:
    """An adapter of one type or variant, for that model."""

    make: Any
    options: dict = field(default_factory=dict)
    model: str = "llama"

    @property
    def targets(self) -> list[str]:
        return ["q_proj", "down_proj", "k_proj"] if self.model == "llama" else ["c_attn", "c_proj"]


BLOCKS = BdLoraConfig(
    target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "s.0.self_attn.k"], nblocks=2,
    match_strict=False,
)  # fmt: skip
VERA = {"r": 3, "d_initial": 0.7}
ADALORA = {"init_r": 3, "total_step": 10, "lora_alpha": 5}
CASES = {
    "adalora": Case(peft.AdaLoraConfig, ADALORA | SAVED),
    "adalora gpt2": Case(peft.AdaLoraConfig, ADALORA | {"bias": "lora_only"}, "gpt2"),
    "vera": Case(peft.VeraConfig, VERA | SAVED),
    "vera gpt2": Case(peft.VeraConfig, VERA | {"bias": "all"}, "gpt2"),
    "gralora": Case(peft.GraloraConfig, {"r": 8, "gralora_k": 4, "alpha": 5} | SAVED),
    "gralora hybrid": Case(peft.GraloraConfig, {"r": 4, "hybrid_r": 3}),
    "gralora gpt2": Case(
        peft.GraloraConfig, {"r": 4, "hybrid_r": 2, "bias": "gralora_only"}, "gpt2"
    ),
    "ln_tuning": Case(peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]} | SAVED),
    "ln_tuning gpt2": Case(peft.LNTuningConfig, {"target_modules": ["ln_1", "ln_f"]}, "gpt2"),
    "trainable_tokens": Case(peft.TrainableTokensConfig, {"token_indices": [7, 1, 5]}),
    "trainable_tokens tied": Case(
        peft.TrainableTokensConfig, {"token_indices": [2, 9], "target_modules": ["wte"]}, "gpt2"
    ),
    "bdlora": Case(peft.LoraConfig, {"r": 4, "lora_alpha": 7, "use_bdlora": BLOCKS}),
    "bdlora rslora": Case(
        peft.LoraConfig,
        {"r": 4, "use_bdlora": BLOCKS, "use_rslora": True, "alpha_pattern": {"k_proj": 3}} | SAVED,
    ),
    "monteclora": Case(peft.LoraConfig, {"r": 4, "monteclora_config": MontecloraConfig()}),
    "monteclora gpt2": Case(
        peft.LoraConfig, {"monteclora_config": MontecloraConfig(), "bias": "lora_only"}, "gpt2"
    ),
    "qalora": Case(
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 6, "qalora_group_size": 8, "rank_pattern": {"k_proj": 2}} | SAVED,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base of each model and dtype, and an adapter of each case, made once."""
    home = tmp_path_factory.mktemp("types")
    for name in ("llama", "gpt2"):
        for dtype in ("fp32", "bf16"):
            oracle.save_base(getattr(oracle, name)(), home / f"{name}-{dtype}", dtype)
    with oracle.quiet():
        for name, case in CASES.items():
            save_trained(case, base_of(home, case), home / name, pooled=name == "qalora")
    return home


def base_of(home: Path, case: Case, dtype: str = "fp32") -> Path:
    return home / f"{case.model}-{dtype}"


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_trained(case: Case, base: Path, out: Path, *, pooled: bool) -> None:
    """An adapter whose parameters are all random, saved by PEFT."""
    options = {"target_modules": case.targets, "task_type": "CAUSAL_LM"} | case.options
    if case.make is peft.TrainableTokensConfig and case.model == "llama":
        del options["target_modules"]
    model = peft.get_peft_model(loaded(base), case.make(**options))
    if pooled:
        pool(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(out))


def pool(model: Any) -> None:
    """QA-LoRA's a and forward, as PEFT gives them to layers of GPTQ alone."""
    config: Any = model.peft_config["default"]
    config.use_qalora = True
    for layer in model.modules():
        if isinstance(layer, Linear):
            QALoraLinearVariant.init(layer, "default", config)
            layer.lora_variant["default"] = QALoraLinearVariant()


def with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's model with the adapter, in evaluation."""
    model = loaded(base, dtype)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if not config.get("use_qalora"):
        return peft.PeftModel.from_pretrained(model, adapter).to(dtype).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(**known_fields(config)))
    pool(model)
    peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    return model.to(dtype).eval()


def known_fields(config: dict) -> dict:
    names = {one.name for one in dataclasses.fields(peft.LoraConfig) if one.init}
    others = ("use_qalora", "inference_mode", "peft_type")
    return {k: v for k, v in config.items() if k in names and k not in others}


@torch.no_grad()
def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights that PEFT merges, in float64."""
    model = with_adapter(base, adapter, torch.float64)
    for module in model.modules():
        variants = module.lora_variant if isinstance(module, Linear) else {}
        if isinstance(variants.get("default"), QALoraLinearVariant):
            layer: Any = module
            eye = torch.eye(layer.in_features, dtype=torch.float64)
            added = layer(eye) - layer.base_layer(eye)
            layer.base_layer.weight += added.T
            layer.merged_adapters.append("default")
    state = model.merge_and_unload().state_dict()
    # LN_TUNING's merge leaves the wrappers of modules_to_save
    return {
        key.replace(".modules_to_save.default.", "."): value
        for key, value in state.items()
        if ".original_module." not in key
    }


def compared(out: Path, base: Path, expected: dict[str, Tensor]) -> dict[str, float]:
    """‖merged - expected‖ / ‖expected - base‖ of each changed weight; the others are the base's."""
    before, errors = oracle.stored(base), {}
    for key, value in oracle.stored(out).items():
        name = key if key in expected else f"transformer.{key}"
        change = torch.linalg.norm(expected[name] - before[key].double())
        if not change:
            assert torch.equal(value, before[key]), key
            continue
        error = torch.linalg.norm(expected[name] - value.double())
        errors[key] = float(error / change)
    assert errors
    return errors


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_peft(name, home, tmp_path):
    base, adapter = base_of(home, CASES[name]), home / name
    adapterkit.merge(base, adapter, out=tmp_path / "out", verify=True)
    with oracle.quiet():
        errors = compared(tmp_path / "out", base, merged_by_peft(base, adapter))
    assert max(errors.values()) < 1e-6, errors
    assert adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])["rows"]


# what rounds a merged weight, and what converts a delta, knows no layer
once = pytest.mark.parametrize("name", usual(CASES, lambda name: " " not in name))


@once
def test_a_bf16_base_is_rounded_once(name, home, tmp_path):
    base, adapter = base_of(home, CASES[name], "bf16"), home / name
    adapterkit.merge(base, adapter, out=tmp_path / "out")
    with oracle.quiet():
        expected = merged_by_peft(base, adapter)
    after = oracle.stored(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    for key, value in after.items():
        exact = expected[key if key in expected else f"transformer.{key}"]
        wrong = value != exact.to(torch.bfloat16)
        assert int(wrong.sum()) <= 1 + 1e-3 * value.numel(), key


@pytest.mark.parametrize("name", CASES)
def test_live_logits_are_those_of_peft(name, home, tmp_path):
    from adapterkit.runtime import load

    base, adapter = base_of(home, CASES[name]), home / name
    with oracle.quiet(), torch.no_grad():
        expected, model = with_adapter(base, adapter)(IDS).logits, loaded(base)
        if name.startswith("vera"):
            with pytest.raises(AdapterkitError, match="(?s)a VERA adapter without.*--base BASE"):
                load(model, adapter, name="x")
            adapterkit.convert(adapter, to="peft", base=base, out=tmp_path / "plain")
            adapter = tmp_path / "plain"
        plain = model(IDS).logits
        load(model, adapter, name="x")
        actual = model(IDS).logits
    scale = float((expected - plain).abs().max())
    assert scale > 1e-3
    assert float((actual - expected).abs().max()) < 1e-4 * scale


@once
def test_a_conversion_is_a_lora_that_peft_merges_the_same(name, home, tmp_path):
    base, adapter = base_of(home, CASES[name]), home / name
    adapterkit.convert(adapter, to="peft", base=base, out=tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not any(
        config.get(f"{one}") for one in ("use_qalora", "use_bdlora", "monteclora_config")
    )
    with oracle.quiet():
        expected = merged_by_peft(base, adapter)
        actual = merged_by_peft(base, tmp_path / "plain")
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_several_of_them_are_combined(home, tmp_path):
    names = ["adalora", "bdlora", "gralora hybrid"]
    sources = {home / name: weight for name, weight in zip(names, (1.0, -0.5, 2.0), strict=True)}
    sources = {without_head(k, tmp_path / k.name): w for k, w in sources.items()}
    adapterkit.combine(sources, method="linear", out=tmp_path / "sum")
    base = home / "llama-fp32"
    adapterkit.merge(base, tmp_path / "sum", out=tmp_path / "of sum")
    adapterkit.merge(base, sources, out=tmp_path / "of all")
    one, other = oracle.stored(tmp_path / "of sum"), oracle.stored(tmp_path / "of all")
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6, msg=key)


def without_head(adapter: Path, out: Path) -> Path:
    """The adapter without its trained head, which several adapters cannot share."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "lm_head" not in key}
    save_file(kept, out / "adapter_model.safetensors")
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    return out


def test_a_pruned_module_of_adalora_keeps_its_scale(home, tmp_path):
    """PEFT divides by the rank before pruning."""
    adapter = without_head(home / "adalora", tmp_path / "adapter")
    tensors, rows = load_file(adapter / "adapter_model.safetensors"), torch.tensor([0, 2])
    module = "model.layers.0.self_attn.q_proj"
    for leaf in ("lora_A", "lora_E", "lora_B"):
        key = f"base_model.model.{module}.{leaf}"
        tensors[key] = tensors[key].index_select(int(leaf == "lora_B"), rows).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    full = [True, True, True]
    masks = {key.removeprefix("base_model.model."): full for key in tensors if "lora_E" in key}
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = masks | {f"{module}.lora_E": [True, False, True]}
    path.write_text(json.dumps(config))
    base = home / "llama-fp32"
    adapterkit.merge(base, adapter, out=tmp_path / "out")
    with oracle.quiet():
        errors = compared(tmp_path / "out", base, merged_by_peft(base, adapter))
    assert max(errors.values()) < 1e-6, errors


@pytest.fixture(scope="module")
def quantized(home):
    """The Llama in GPTQ's format."""
    base = home / "gptq"
    shutil.copytree(home / "llama-bf16", base)
    settings = quantized_llama.GPTQ | {"group_size": 16}
    form = quantized_llama.Form(quantized_llama.gptq(4, 1, size=16), settings, 0)
    quantized_llama.quantize(base, form)
    return base


def same_bytes(base: Path, adapter: Path, plain: Path, out: Path) -> None:
    """Both adapters make the same quantized weights, which are not the base's."""
    adapterkit.merge(base, adapter, out=out / "one")
    adapterkit.merge(base, plain, out=out / "other")
    before, one, other = (oracle.stored(folder) for folder in (base, out / "one", out / "other"))
    assert not [key for key, value in one.items() if not torch.equal(value, other[key])]
    changed = [key for key, value in before.items() if not torch.equal(value, one[key])]
    assert any("q_proj.qweight" in key for key in changed)


def test_vera_into_a_quantized_base_takes_its_widths(quantized, home, tmp_path):
    adapter = without_head(home / "vera", tmp_path / "adapter")
    adapterkit.convert(adapter, to="peft", base=home / "llama-fp32", out=tmp_path / "plain")
    same_bytes(quantized, adapter, tmp_path / "plain", tmp_path)


def test_qalora_into_its_gptq_base_is_the_lora_with_repeated_columns(quantized, home, tmp_path):
    """Byte for byte: a' (r, n) is a (r, n / g) with each column g times, and alpha n / g² times."""
    adapter = without_head(home / "qalora", tmp_path / "adapter")
    alphas = {"lora_alpha": 6 * 32 / 64, "alpha_pattern": {"down_proj": 6 * 48 / 64}}
    plain = oracle.edit_config(adapter, tmp_path / "plain", use_qalora=False, **alphas)
    tensors = load_file(plain / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        tensors[key] = tensors[key].repeat_interleave(8, 1)
    save_file(tensors, plain / "adapter_model.safetensors")
    same_bytes(quantized, adapter, plain, tmp_path)


# -- what is refused -------------------------------------------------------------------------------


def refusal(call) -> str:
    with pytest.raises(AdapterkitError) as error:
        call()
    return str(error.value)


PROMPTS = {
    "PROMPT_TUNING": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
    "P_TUNING": (peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "PREFIX_TUNING": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "ADAPTION_PROMPT": (peft.AdaptionPromptConfig, {"adapter_len": 2, "adapter_layers": 1}),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_peft_change_no_weights_and_are_refused(kind, home, tmp_path):
    from adapterkit.runtime import load

    make, options = PROMPTS[kind]
    base, adapter, out = home / "llama-fp32", tmp_path / "adapter", tmp_path / "out"
    with oracle.quiet():
        peft.get_peft_model(loaded(base), make(task_type="CAUSAL_LM", **options)).save_pretrained(
            adapter
        )
    for call in (
        lambda: adapterkit.merge(base, adapter, out=out),
        lambda: adapterkit.convert(adapter, to="peft", out=out),
        lambda: adapterkit.combine([adapter, adapter], out=out),
        lambda: load(loaded(base), adapter, name="x"),
    ):
        text = refusal(call)
        assert f"peft_type '{kind}': it changes no weights and cannot be merged" in text
        assert "use it with PEFT" in text
    assert not out.exists()


@pytest.mark.parametrize("kind", [one.value for one in peft.PeftType])
def test_every_type_of_peft_is_read_or_refused_by_name(kind, home, tmp_path):
    read = {"LORA", "LN_TUNING", "TRAINABLE_TOKENS", *map(str.upper, members("kinds"))}
    if kind in read:
        return
    adapter = oracle.edit_config(home / "bdlora", tmp_path / "adapter", peft_type=kind)
    text = refusal(lambda: adapterkit.merge(home / "llama-fp32", adapter, out=tmp_path / "out"))
    assert f"peft_type '{kind}'" in text
    words = "it changes no weights" if kind in WITHOUT_WEIGHTS else "adapterkit extract "
    assert words in text


@pytest.mark.parametrize("setting, value, advice", [
    ("arrow_config", dataclasses.asdict(ArrowConfig()), "adapterkit merge "),
    ("kasa_config", dataclasses.asdict(KasaConfig()), "adapterkit extract "),
    ("megatron_config", {"tensor_model_parallel_size": 2}, "Megatron-Bridge"),
    ("alora_invocation_tokens", [1, 2], "adapterkit.runtime.load"),
])  # fmt: skip
def test_a_setting_that_no_weight_equals_is_refused_with_what_to_do(
    setting, value, advice, home, tmp_path
):
    changes: dict[str, Any] = {"use_bdlora": None, setting: value}
    adapter = oracle.edit_config(home / "bdlora", tmp_path / "adapter", **changes)
    text = refusal(lambda: adapterkit.merge(home / "llama-fp32", adapter, out=tmp_path / "out"))
    assert f"{setting} is set" in text and advice in text


@pytest.mark.parametrize("name", ["adalora", "gralora", "bdlora", "qalora"])
def test_a_server_that_knows_no_other_types_is_reported(name, home, tmp_path):
    adapter = without_head(home / name, tmp_path / "adapter")
    found = adapterkit.check(adapter, program="vllm")["findings"]
    words = {"bdlora": "use_bdlora is set", "qalora": "use_qalora is set"}
    assert any(words.get(name, "keys have other names") in one["problem"] for one in found), found
    adapterkit.convert(adapter, to="vllm", rank=8, out=tmp_path / "out")
    assert adapterkit.check(tmp_path / "out", program="vllm")["takes"]
