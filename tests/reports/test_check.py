"""check: what an engine does with an adapter, and the commands that repair it."""

import json
import shlex
import shutil
import warnings

import diffusers
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import adapterkit
from adapterkit.adapters.formats.engines import engines
from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.cli import main
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.verbs.look import engine_check
from adapterkit.verbs.look.serving import serving_of
from tests.support import oracle
from tests.support.adapter_samples import GOLDEN, all_samples, samples
from tests.support.architectures import BUILDS
from tests.support.forks import command
from tests.support.mlx_models import loaded, logits, seeing, trained
from tests.support.usual import usual

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def verdicts(document):
    return [row["verdict"] for row in document["findings"]]


@pytest.fixture
def edited(lora, tmp_path):
    """The adapter with other tensors, or another config."""

    def make(change=None, **config):
        folder = tmp_path / "edited"
        shutil.copytree(lora, folder, dirs_exist_ok=True)
        settings = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps(settings))
        if change:
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS)
        return folder

    return make


@pytest.mark.parametrize("engine", engines())
def test_every_engine_is_of_a_format_that_is_written(engine):
    client = engines()[engine]
    form = formats()[client.format]
    assert form.writes and client.reads(form) and client.sources and client.version
    assert client.loading(client.format, "FILE", "BASE", 8) == client.load.format(
        file="FILE", base="BASE", rank=8
    )


@pytest.mark.parametrize("engine", ["peft", "transformers", "vllm", "sglang"])
def test_a_plain_adapter_is_taken(engine, lora, llama):
    document = adapterkit.check(lora, program=engine, base=llama)
    assert document["takes"] and document["modules"] == 14, document["findings"]


@pytest.mark.parametrize(
    "sample",
    usual(all_samples(), lambda sample: sample == samples(sample.form)[0]),
    ids=lambda sample: sample.id,
)
def test_the_format_of_each_sample_is_read_by_its_clients(sample):
    """And where one does not read it, the finding says which command makes what it reads."""
    form = formats()[sample.form]
    for name, client in engines().items():
        try:
            document = adapterkit.check(sample.path, program=name)
        except AdapterkitError:  # which cannot be read without an option
            continue
        reads = client.title in form.clients or client.format == form.name
        unread = [row for row in document["findings"] if "does not read" in row["problem"]]
        assert bool(unread) != reads or form.layout == "adapter", (name, document)
        assert all(f"--to {client.format} " in row["command"] for row in unread)
        assert document["takes"] == (not document["findings"])


def repaired(document, adapter, base, out):
    """The adapter after the command of the first finding."""
    program, *words = shlex.split(document["findings"][0]["command"])
    assert program == "adapterkit" and str(adapter) in words, document
    words = [{"BASE": str(base)}.get(word, word) for word in words]
    words[words.index("--out") + 1] = str(out)
    main(words, standalone_mode=False)
    return out


@pytest.mark.parametrize("engine, kind", [("llama.cpp", "gguf"), ("mlx", "mlx")])
def test_the_command_repairs_another_format(engine, kind, lora, llama, tmp_path):
    document = adapterkit.check(lora, program=engine, base=llama)
    assert verdicts(document) == ["refuses"]
    made = repaired(document, lora, llama, tmp_path / "made")
    assert adapterkit.check(made, program=engine, base=llama)["takes"]
    back = adapterkit.check(made, program="peft", base=llama)
    assert verdicts(back) == ["refuses"]
    assert adapterkit.check(repaired(back, made, llama, tmp_path / "back"), program="peft")["takes"]


def test_a_rank_above_the_server_s(llama, tmp_path):
    model = oracle.load(oracle.llama, llama)
    oracle.train(model, tmp_path / "large", r=20, target_modules=["q_proj"])
    document = adapterkit.check(tmp_path / "large", program="vllm", base=llama)
    assert (
        verdicts(document) == ["refuses"]
        and "--max-lora-rank 32" in document["findings"][0]["hint"]
    )
    made = repaired(document, tmp_path / "large", llama, tmp_path / "small")
    assert adapterkit.check(made, program="vllm", base=llama)["takes"]
    assert adapterkit.check(tmp_path / "large", program="peft", base=llama)["takes"]


def served(adapter, settings, program="vllm"):
    return adapterkit.check(adapter, program=program, serving=settings)


def test_the_rank_of_the_server_counts(llama, tmp_path):
    """Of its command line, in either spelling; vLLM takes some numbers only."""
    oracle.train(oracle.load(oracle.llama, llama), tmp_path / "a", r=20, target_modules=["q_proj"])
    assert served(tmp_path / "a", "max-lora-rank=32")["takes"]
    assert served(tmp_path / "a", "--max_lora_rank=64, max-loras=2")["takes"]
    for program, settings in (("vllm", "max-lora-rank=16"), ("sglang", "max-lora-rank=19")):
        (row,) = [
            row for row in served(tmp_path / "a", settings, program)["findings"]
            if "rank" in row["problem"]
        ]  # fmt: skip
        assert row["verdict"] == "refuses" and "resize" in row["command"]
    for value in ("20", "", "many", "0", "8;16"):
        with pytest.raises(AdapterkitError, match=r"expected: 1, 8, 16, 32"):
            served(tmp_path / "a", f"max-lora-rank={value}")


@pytest.mark.parametrize(
    "targets, taken", json.loads((GOLDEN / "vllm" / "targets.json").read_text()).items()
)
def test_modules_on_which_a_server_acts(targets, taken):
    """As vLLM's own function decides, with the modules that it joins."""
    serving = serving_of(engines()["vllm"], f"lora-target-modules={targets}")
    home = "model.layers.0."
    modules = [f"{home}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [f"{home}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    modules += ["model.layers.1.mlp.experts.2.down_proj", "lm_head"]
    assert list(filter(serving.acts_on, modules)) == taken


def test_modules_that_the_server_s_targets_leave_out(lora, llama):
    document = served(lora, "lora-target-modules=q_proj;v_proj")
    (row,) = document["findings"]
    assert row["verdict"] == "drops" and row["modules"] == 8  # of o, gate, up, down in two layers
    assert "add down_proj gate_proj o_proj up_proj to --lora-target-modules" in row["hint"]
    assert row["command"] == f"adapterkit merge BASE {lora} --out merged"
    assert served(lora, "lora-target-modules=qkv_proj;o_proj;gate_up_proj;down_proj")["takes"]
    rows = adapterkit.check(
        lora, program="sglang", base=llama, serving="lora-target-modules=qkv_proj"
    )["findings"]
    assert [row["verdict"] for row in rows] == ["refuses"]
    assert adapterkit.check(lora, program="sglang", serving="lora-target-modules=all")["takes"]


def test_unknown_settings_are_refused_together_with_the_known_ones(lora):
    with pytest.raises(AdapterkitError) as caught:
        served(lora, "max-lora-rang=16,tower=1,max-loras=1,max-loras=2,lora-target-modules=")
    text = str(caught.value)
    for words in (
        "vLLM has no setting 'max-lora-rang'", "vLLM has no setting 'tower'",
        "enable-tower-connector-lora", "max-loras is there twice", "lora-target-modules ''",
    ):  # fmt: skip
        assert words in text, words
    with pytest.raises(AdapterkitError, match="no settings: mlx-lm has none that matter"):
        served(lora, "max-lora-rank=16", "mlx")


@pytest.mark.parametrize("settings", [
    {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 3}},
], ids=lambda one: next(iter(one)))  # fmt: skip
def test_patterns_that_sglang_does_not_read(settings, llama, tmp_path):
    """Its scale is lora_alpha / r of the config for all modules; vLLM 0.32 reads the patterns."""
    model = oracle.load(oracle.llama, llama)
    oracle.train(model, tmp_path / "a", target_modules=["q_proj", "k_proj", "v_proj"], **settings)
    assert adapterkit.check(tmp_path / "a", program="vllm", base=llama)["takes"]
    document = adapterkit.check(tmp_path / "a", program="sglang", base=llama)
    assert verdicts(document) == ["differs"]
    made = repaired(document, tmp_path / "a", llama, tmp_path / "made")
    assert adapterkit.check(made, program="sglang", base=llama)["takes"]


def test_a_setting_that_lifts_a_rule(edited):
    def add(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
            tensors[key.replace("model.layers", "visual.blocks")] = tensors[key].clone()

    folder = edited(add)
    assert verdicts(served(folder, "max-lora-rank=16")) == ["drops"]
    assert served(folder, "enable-tower-connector-lora")["takes"]
    assert verdicts(served(folder, "enable-tower-connector-lora=false")) == ["drops"]


def test_the_settings_on_the_command_line(lora):
    words = ["check", str(lora), "--for", "vllm", "--serving", "lora-target-modules=q_proj"]
    result = command(*words)
    assert (
        result.returncode == 1 and "are not in the server's --lora-target-modules" in result.stdout
    )


def test_vllm_omni_takes_the_denoiser(tmp_path):
    """A single file once it is converted; no text encoder, and no layer that it names otherwise."""
    flux, qwen = (
        next(one for one in samples("kohya") if one.id == f"kohya/{name}.safetensors")
        for name in ("flux", "musubi_qwen_image")
    )
    document = adapterkit.check(flux.path, program="vllm-omni")
    assert {*verdicts(document)} == {"refuses"} and "text_encoder" in str(document["findings"])
    adapterkit.convert(flux.path, to="vllm", component="transformer", out=tmp_path / "made")
    assert adapterkit.check(tmp_path / "made", program="vllm-omni")["takes"]
    rows = adapterkit.check(qwen.path, program="vllm-omni")["findings"]
    assert any("its own model names this layer to_out" in row["problem"] for row in rows)


def test_a_dora_where_there_is_none(llama, tmp_path):
    model = oracle.load(oracle.llama, llama)
    oracle.train(model, tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    document = adapterkit.check(tmp_path / "dora", program="vllm", base=llama)
    assert verdicts(document) == ["refuses"] and "magnitude" in document["findings"][0]["problem"]
    assert adapterkit.check(tmp_path / "dora", program="peft", base=llama)["takes"]


def test_a_module_that_the_base_does_not_have(edited, llama):
    """PEFT leaves it out with a warning, of the modules that got nothing."""

    def rename(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    folder = edited(rename)
    model = oracle.load(oracle.llama, llama)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(model, folder)
    names = [name for name, _ in loaded.named_parameters()]
    assert not any("layers.7" in name for name in names)
    document = adapterkit.check(folder, program="peft", base=llama)
    assert not document["takes"] and "layers.7" in json.dumps(document["findings"])


def test_towers_are_reported(edited):
    def add(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
            tensors[key.replace("model.layers", "visual.blocks")] = tensors[key].clone()

    folder = edited(add)
    for engine, verdict in (("vllm", "drops"), ("sglang", "drops"), ("llama.cpp", "refuses")):
        rows = adapterkit.check(folder, program=engine)["findings"]
        assert any(row["verdict"] == verdict and row["modules"] == 1 for row in rows), rows


def test_another_id_of_the_base(edited, llama, monkeypatch):
    folder = edited(base_model_name_or_path="org/other")
    document = adapterkit.check(folder, program="peft", base=llama)
    assert document["takes"]  # a folder may have any name
    open_base = engine_check.base_for

    def base_for(text, source):
        base = open_base(text, source)
        base.folder.origin["repo"] = "org/base"
        return base

    monkeypatch.setattr(engine_check, "base_for", base_for)
    document = adapterkit.check(folder, program="peft", base=llama)
    assert (
        verdicts(document) == ["differs"] and f"edit {folder}" in document["findings"][0]["command"]
    )


def test_the_check_command_names_modules_and_problems(lora, llama):
    words = ["check", str(lora), "--for", "vllm", "--base", str(llama)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and "takes all 14 modules" in result.stdout
    result = CliRunner().invoke(main, ["check", str(lora), "--for", "mlx"])
    assert (
        result.exit_code == 1
        and f"\n  adapterkit convert {lora} --to mlx --out for-mlx\n" in result.stdout
    )
    with pytest.raises(Refused, match="ollama"):
        adapterkit.check(lora, program="ollama")
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["check"] == 1


# -- towers, and modules that were renamed ---------------------------------------------------------

# model -> its class, what transformers 5 calls its parts, and what transformers 4 called them
RENAMED = {
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"model.language_model.": "model.", "model.visual.": "visual."},
    ),
    "llava": (
        "LlavaNextForConditionalGeneration",
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
    ),
}


def model_of(kind, folder):
    if kind == "qwen2_vl":
        return GOLDEN / "peft" / kind / "base"
    oracle.save_base(BUILDS[kind](), folder)
    return folder


def in_old_names(folder, parts, out):
    """The adapter as PEFT saved it with transformers 4."""
    shutil.copytree(folder, out)
    head, tensors = "base_model.model.", load_file(folder / WEIGHTS)
    for key in [*tensors]:
        new = next(name for name in parts if key.startswith(head + name))
        tensors[key.replace(new, parts[new], 1)] = tensors.pop(key)
    save_file(tensors, out / WEIGHTS)
    return out


def by_peft(model, base, folder):
    """The factors that PEFT loads, by its keys; a factor that it does not find is drawn anew."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(oracle.load(model, base), folder)
    texts = [text for one in caught if "missing adapter keys" in (text := str(one.message))]
    state = loaded.state_dict()
    return {key.replace(".default", ""): state[key] for key in state if "lora_" in key}, texts


@pytest.mark.parametrize("kind", RENAMED)
def test_modules_that_transformers_5_renamed(kind, tmp_path):
    model, parts = RENAMED[kind]
    base = model_of(kind, tmp_path / "base")
    targets = ["q_proj", "qkv" if kind == "qwen2_vl" else "linear_1"]
    oracle.train(oracle.load(model, base), tmp_path / "new", target_modules=targets)
    expected = load_file(tmp_path / "new" / WEIGHTS)
    old = in_old_names(tmp_path / "new", parts, tmp_path / "old")

    factors, texts = by_peft(model, base, old)
    lost = {key for key in expected if not torch.equal(factors[key], expected[key])}
    assert texts and any(".visual." in key or ".vision_tower." in key for key in lost)
    for engine in ("peft", "transformers"):
        assert adapterkit.check(tmp_path / "new", program=engine, base=base)["takes"]
        document = adapterkit.check(old, program=engine, base=base)
        assert {"drops"} == set(verdicts(document)) and not document["takes"]
        assert document["findings"][0]["modules"] >= len(lost) > 0
        assert not adapterkit.check(old, program=engine)["takes"]  # by the towers' names alone
    made = repaired(document, old, base, tmp_path / "made")
    assert adapterkit.check(made, program="peft", base=base)["takes"]
    factors, texts = by_peft(model, base, made)
    assert not texts and factors.keys() == expected.keys()
    assert all(torch.equal(factors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_names_that_loaders_rename(kind, tmp_path):
    """Of the language model inside: where the targets mean them by their ends alone."""
    base, auto = seeing(kind, tmp_path / "base"), transformers.AutoModelForImageTextToText
    targets = r".*language_model.*(q|down)_proj"
    expected = logits(trained(base, tmp_path / "new", auto=auto, r=2, target_modules=targets))
    parts = {"model.language_model.": "language_model.model."}
    old = in_old_names(tmp_path / "new", parts, tmp_path / "old")
    live = peft.PeftModel.from_pretrained(loaded(base, auto), old)
    assert torch.equal(logits(live.eval()), expected)
    live = loaded(base, auto)
    live.load_adapter(str(old))
    assert torch.equal(logits(live.eval()), expected)
    config = json.loads((old / CONFIG).read_text())
    whole = [f"language_model.model.layers.{n}.mlp.down_proj" for n in range(2)]
    for engine in ("peft", "transformers"):
        (old / CONFIG).write_text(json.dumps(config))
        assert adapterkit.check(old, program=engine, base=base)["takes"]
        (old / CONFIG).write_text(json.dumps({**config, "target_modules": whole}))
        assert verdicts(adapterkit.check(old, program=engine, base=base)) == ["drops"]
    with pytest.raises(ValueError, match="[Tt]arget modules"):
        peft.PeftModel.from_pretrained(loaded(base, auto), old)


def test_types_whose_names_are_renamed():
    for engine in ("peft", "transformers"):
        rule = next(one for one in engines()[engine].rules if one.verdict == "renames")
        for kind in rule.of:
            known = get_checkpoint_conversion_mapping(kind)
            assert any("^language_model" in one.source_patterns for one in known), kind


@pytest.mark.parametrize("sample", samples("peft-per-expert"), ids=lambda sample: sample.id)
def test_experts_that_transformers_5_fused(sample, tmp_path):
    base = sample.options["base"]
    document = adapterkit.check(sample.path, program="peft", base=base)
    assert verdicts(document) == ["refuses"]
    made = repaired(document, sample.path, base, tmp_path / "made")
    assert adapterkit.check(made, program="peft", base=base)["takes"]
    if (answer := sample.path / "logits.safetensors").exists():
        tensors = load_file(answer)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, experts_implementation="eager"
        )
        with warnings.catch_warnings(action="ignore"):  # that patterns of parameters match none
            loaded = peft.PeftModel.from_pretrained(model, made).eval()
        with torch.no_grad():
            found = loaded(tensors["tokens"].long()[None]).logits[0]
        torch.testing.assert_close(found, tensors["adapted"], rtol=0, atol=1e-5)


PIPELINES = {
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "chroma": "ChromaPipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "pixart": "PixArtSigmaPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
}


@pytest.mark.parametrize("architecture", PIPELINES)
def test_diffusers_drops_the_encoders_that_its_pipeline_does_not_load(architecture, tmp_path):
    loads = getattr(getattr(diffusers, PIPELINES[architecture]), "_lora_loadable_modules", ())
    encoders = [n for n in architectures()[architecture].components if "text_encoder" in n]
    rules = [rule for rule in engines()["diffusers"].rules if architecture in rule.of]
    for name in encoders:
        told = any(rule.modules.search(f"{name}.layers.0") for rule in rules)
        assert told != (name in loads), name


def test_an_encoder_that_diffusers_drops_is_reported():
    sample = next(one for one in samples("kohya") if one.id == "kohya/flux.safetensors")
    document = adapterkit.check(sample.path, program="diffusers")
    rows = [row for row in document["findings"] if row["verdict"] == "drops"]
    assert len(rows) == 1 and "text_encoder_2" in rows[0]["problem"], document
    assert rows[0]["command"] == f"adapterkit merge BASE {sample.path} --out merged"


def test_mlx_refuses_towers_of_a_model_that_sees(tmp_path):
    mlx_utils = pytest.importorskip("mlx_lm.tuner.utils", reason="needs mlx-lm")
    from mlx_lm.models import qwen2_vl

    base = model_of("qwen2_vl", tmp_path / "base")
    model, _ = RENAMED["qwen2_vl"]
    oracle.train(oracle.load(model, base), tmp_path / "both", target_modules=["q_proj", "qkv"])
    with pytest.raises(Refused, match=r"no name there: .*visual\.blocks\.0\.attn\.qkv"):
        adapterkit.convert(tmp_path / "both", to="mlx", base=base, out=tmp_path / "mlx")
    assert "refuses" in verdicts(adapterkit.check(tmp_path / "both", program="mlx", base=base))
    oracle.train(oracle.load(model, base), tmp_path / "a", target_modules=["q_proj"])
    adapterkit.convert(tmp_path / "a", to="mlx", base=base, out=tmp_path / "mlx")
    assert adapterkit.check(tmp_path / "mlx", program="mlx", base=base)["takes"]
    text = {
        "model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 40,
    }  # fmt: skip
    made = lambda: qwen2_vl.Model(qwen2_vl.ModelArgs(model_type="qwen2_vl", text_config=text))
    mlx_utils.load_adapters(made(), str(tmp_path / "mlx"))
    file = tmp_path / "mlx/adapters.safetensors"
    tensors = load_file(file)
    tower = {f"visual.blocks.0.attn.qkv.lora_{x}": torch.ones(2, 2) for x in "ab"}
    save_file({**tensors, **tower}, file)
    assert verdicts(adapterkit.check(tmp_path / "mlx", program="mlx", base=base)) == ["refuses"]
    with pytest.raises(ValueError, match=r"visual\.blocks\.0\..* not an adapter parameter"):
        mlx_utils.load_adapters(made(), str(tmp_path / "mlx"))
