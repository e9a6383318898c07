"""Adapters of language models' trainers: the deltas that the tools' own merges add, and clients
that load what is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.weights.plan_reader import PlanReader
from tests.support.adapter_samples import GOLDEN, contents_of, deltas

DELTAS = GOLDEN.parent / "deltas"
SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.tensor([[3, 1, 4, 15, 9, 26]])
MERGED = {
    "mlx_lora": ("mlx/lora", {}),
    "mlx_experts": ("mlx/experts", {}),
    "loralib_gpt2": ("loralib/gpt2.pt", {"alpha": 6.0}),
    "torchtune_lora": ("torchtune/lora", {}),
    "litgpt_all": ("litgpt/all", {}),
    "litgpt_key": ("litgpt/key", {}),
    "litgpt_query_value": ("litgpt/query_value", {}),
    "litgpt_query_value_old": ("litgpt/query_value_old", {}),
}


def read(name: str, **options) -> Contents:
    return contents_of(GOLDEN / name, allow_pickle=True, **options)


def products(contents: Contents) -> dict[str, torch.Tensor]:
    """What is added to the weight of each module, in float64; those with zeros only left out."""
    reader, added = PlanReader(contents.folders), {}
    for module in contents.modules:
        a, b = (module.parts[role].value(reader).double() for role in ("a", "b"))
        product = module.scale * b @ a
        added[module.name] = product.T if module.embedding else product
    return {name: product for name, product in added.items() if product.any()}


def merged_by_the_tool(case: str) -> dict[str, torch.Tensor]:
    """What the tool's own merge adds, by module; of stacks by expert."""
    added = {}
    for key, value in load_file(DELTAS / f"{case}.safetensors").items():
        name = key.removesuffix(".weight")
        if value.ndim == 2:
            added[name] = value.double()
            continue
        for number, one in enumerate(value):
            added[name.replace("switch_mlp", f"experts.{number}")] = one.double()
    return added


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == other.shape and float((one - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("case", MERGED)
def test_the_delta_is_what_the_tool_merges(case):
    name, options = MERGED[case]
    ours, theirs = products(read(name, **options)), merged_by_the_tool(case)
    assert ours.keys() == theirs.keys()
    assert all(close(ours[name], theirs[name]) for name in theirs)


def test_magnitudes_of_torchtune_are_in_the_rows_of_the_model():
    """Its own converter to PEFT leaves q's in the other order; its merge tells."""
    contents = read("torchtune/dora")
    base, merged = (load_file(DELTAS / f"torchtune_dora{end}.safetensors") for end in ("_base", ""))
    reader = PlanReader(contents.folders)
    for module in contents.modules:
        weight = base[f"{module.name}.weight"].double()
        parts = {role: part.value(reader).double() for role, part in module.parts.items()}
        adapted = weight + module.scale * parts["b"] @ parts["a"]
        adapted *= (parts["magnitude"] / adapted.norm(dim=1))[:, None]
        assert close(adapted - weight, merged[f"{module.name}.weight"].double())


@pytest.mark.parametrize("case", ["dense", "tied", "experts"])
def test_tinkers_modules_are_those_that_its_cookbook_writes(case):
    ours = deltas(read(f"tinker/{case}"))
    theirs = deltas(contents_of(DELTAS / f"tinker_{case}"))
    if case == "tied":  # a key that PEFT does not load: it takes an embedding's factors elsewhere
        theirs[":lm_head:lora:0"] = theirs.pop(":model.embed_tokens:lora:0")
    assert ours.keys() == theirs.keys()
    assert all(value.difference(ours[name]) < 1e-12 for name, value in theirs.items())


WITHOUT = {
    "heads": ("torchtune/lora", "config.json", "decoder-pairs and decoder-halves both have"),
    "heads and sizes": ("litgpt/query_value", "model_config.yaml", "number of heads is unknown"),
    "alpha": ("torchtune/lora", "adapter_config.json", "does not store alpha"),
    "which are trained": ("litgpt/query_value", "hyperparameters.yaml", "factors of 2 parts"),
    "scale": ("mlx/lora", "adapter_config.json", "no adapter of a known format"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_without_its_config_an_adapter_is_refused(what, tmp_path):
    name, config, words = WITHOUT[what]
    shutil.copytree(GOLDEN / name, tmp_path / "in")
    (tmp_path / "in" / config).unlink()
    with pytest.raises(AdapterkitError, match=words):
        adapterkit.convert(tmp_path / "in", to="peft", out=tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "out").exists()


def test_some_parts_of_a_layer_of_loralib_are_refused(tmp_path):
    source = GOLDEN / "loralib/refused/gpt2_query_value.pt"
    with pytest.raises(AdapterkitError, match="c_attn has factors of 2 parts") as caught:
        adapterkit.convert(source, to="peft", out=tmp_path / "out", alpha=6.0, allow_pickle=True)
    assert "extract BASE MERGED" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_modules_that_only_a_base_distinguishes_from_convolutions_are_noted(tmp_path):
    source = GOLDEN / "loralib/convolutions.pt"
    receipt = adapterkit.convert(
        source, to="peft", out=tmp_path / "out", alpha=6.0, allow_pickle=True
    )
    assert any("--base" in note and "features.0" in note for note in receipt.data["notes"])


@pytest.mark.parametrize("height", [0, 2])
def test_a_stack_of_another_number_of_experts_is_refused(height, tmp_path):
    """One matrix for every expert, or one for all; else which expert's they are is unknown."""
    shutil.copytree(GOLDEN / "tinker/experts", tmp_path / "in")
    file = tmp_path / "in/adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.w3.lora_A.weight"
    tensors[key] = tensors[key].repeat(height, 1, 1)
    save_file(tensors, file)
    with pytest.raises(AdapterkitError, match=r"w3"):
        adapterkit.convert(tmp_path / "in", to="tinker", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_state_with_tinkers_names_is_refused(tmp_path):
    """As PEFT's it would name a module that no model has, and be Tinker's once it is written."""
    shutil.copytree(GOLDEN / "tinker/tied", tmp_path / "in")
    file = tmp_path / "in/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, file)
    with pytest.raises(Refused, match="do not belong to Tinker"):
        adapterkit.convert(tmp_path / "in", to="peft", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_nothing_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "tinker/tied", tmp_path / "in")
    save_file({}, tmp_path / "in/adapter_model.safetensors")
    with pytest.raises(Refused, match="an adapter of no module"):
        adapterkit.convert(tmp_path / "in", to="mlx", out=tmp_path / "out")


def test_a_pickle_is_refused_without_permission(tmp_path):
    with pytest.raises(Refused, match="loading it may run the code in it"):
        adapterkit.convert(GOLDEN / "litgpt/all", to="peft", out=tmp_path / "out")


def test_a_model_of_another_family_is_refused(tmp_path):
    """torchtune splits what Phi-3 has as one module."""
    shutil.copytree(GOLDEN / "torchtune/lora", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text()) | {"model_type": "phi3"}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="a model of type phi3"):
        adapterkit.convert(tmp_path / "in", to="peft", out=tmp_path / "out", allow_pickle=True)


def test_qwens_heads_are_not_permuted(tmp_path):
    """torchtune rotates its halves, as transformers does; its converter to PEFT takes it for
    Llama."""
    shutil.copytree(GOLDEN / "torchtune/lora", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text()) | {"model_type": "qwen2"}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    contents = contents_of(tmp_path / "in", allow_pickle=True)
    stored = torch.load(GOLDEN / "torchtune/lora/adapter_model.pt", weights_only=True)
    [q] = [m for m in contents.modules if m.name.endswith("q_proj")]
    own = q.parts["b"].value(PlanReader(contents.folders))
    assert torch.equal(own, stored["layers.0.attn.q_proj.lora_b.weight"])


# -- clients ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits[0]


def trained(base: Path, out: Path, **options) -> PeftModel:
    """A PEFT model with random factors, and its adapter in `out`."""
    torch.manual_seed(2)
    model = get_peft_model(load(base), LoraConfig(r=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out, save_embedding_layers=False)
    return model.eval()


PEFT_ADAPTERS = {
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        "lora_alpha": 6,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"down_proj": 9},
    },
    "some layers": {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5, "use_dora": True},
}


@pytest.mark.parametrize("case", PEFT_ADAPTERS)
def test_mlx_lm_computes_what_peft_computes(case, base, tmp_path):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    expected = logits(trained(base, tmp_path / "peft", **PEFT_ADAPTERS[case]))
    adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx")
    model, _ = load_model(base)
    tokens = mx.array(TOKENS.numpy())
    plain = torch.tensor(model(tokens)[0].tolist())
    assert close(plain, logits(load(base)), 1e-4)
    model = load_adapters(model, str(tmp_path / "mlx"))
    model.eval()
    assert close(torch.tensor(model(tokens)[0].tolist()), expected, 1e-4)
    assert not close(plain, expected, 0.01)


@pytest.mark.parametrize("case", PEFT_ADAPTERS)
def test_a_training_state_is_what_the_model_had(case, base, tmp_path):
    """Saved by a training loop, under wrappers, or converted from PEFT's layout."""
    model = trained(base, tmp_path / "peft", **PEFT_ADAPTERS[case])
    expected = logits(model)
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    inner = "layers.1._checkpoint_wrapped_module."
    for number, wrapper in enumerate(("", "module.", "module._orig_mod.", inner)):
        place, out = tmp_path / f"state{number}", tmp_path / f"out{number}"
        place.mkdir()
        wrapped = {
            key.replace("layers.1.", inner) if wrapper == inner else wrapper + key: value.clone()
            for key, value in state.items()
        }
        save_file(wrapped, place / "any.safetensors")
        shutil.copy(tmp_path / "peft/adapter_config.json", place)
        adapterkit.convert(place, to="peft", out=out)
        loaded = PeftModel.from_pretrained(load(base), out).eval()
        assert close(logits(loaded), expected, 1e-6)
    adapterkit.convert(tmp_path / "peft", to="training-state", out=tmp_path / "written")
    fresh = get_peft_model(load(base), LoraConfig(r=4, **PEFT_ADAPTERS[case])).eval()
    written = load_file(tmp_path / "written/adapter.safetensors")
    assert fresh.load_state_dict(written, strict=False).unexpected_keys == []
    assert close(logits(fresh), expected, 1e-6)


def test_a_tied_head_of_tinkers_changes_the_head_alone(tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **SHAPE | {"vocab_size": 20, "num_hidden_layers": 1, "tie_word_embeddings": True}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapterkit.convert(GOLDEN / "tinker/tied", to="peft", out=tmp_path / "peft")
    adapter = load_file(tmp_path / "peft/adapter_model.safetensors")
    only = {key: value for key, value in adapter.items() if ".lm_head." in key}
    assert len(only) == 2
    model = load(tmp_path / "base")
    tokens = TOKENS % 20
    with torch.no_grad():
        hidden, plain = model.model(tokens).last_hidden_state, model(tokens).logits
        settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
        settings["target_modules"] = ["lm_head"]
        (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
        save_file(only, tmp_path / "peft/adapter_model.safetensors")
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            peft_model = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        adapted = peft_model(tokens).logits
    a, b = (only[f"base_model.model.lm_head.lora_{one}.weight"] for one in "AB")
    assert close(adapted - plain, 32 / 3 * hidden @ a.T @ b.T, 1e-4)
