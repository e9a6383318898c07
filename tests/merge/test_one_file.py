"""Image and video models in one file: merged files are base + LoRA in the file's own names."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit import Refused
from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.adapters.formats.library import described
from adapterkit.core.errors import MultipleErrors
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.sources import open_model
from tests.fuzz.images import write_kinds
from tests.support.forks import forks
from tests.support.one_file import (
    DENOISER,
    FAMILIES,
    expected,
    factors_of,
    in_the_file,
    models_of,
    state_of,
    write_adapter,
    write_family,
)

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
Tensors = dict[str, Tensor]
DIALECTS = [name for name, form in described().items() if form.writes]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A file of each family that is asked for."""
    return tmp_path_factory.mktemp("one-file")


def base_of(family: str, home: Path) -> Path:
    path = home / f"{family}.safetensors"
    return path if path.exists() else write_family(family, path, **{"modelspec.title": "a model"})


def merged(base: Path, adapters: object, out: Path, **options: object) -> Tensors:
    adapterkit.merge(base, adapters, out=out, overwrite=True, **options)
    return load_file(out)


def assert_close(ours: Tensors, right: Tensors) -> None:
    assert ours.keys() == right.keys()
    for key, value in right.items():
        torch.testing.assert_close(ours[key], value.float(), rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_diffusers_in_every_layer(family, home):
    """Each layer of each part: fused, renamed and in the file's order of rows."""
    base, factors = base_of(family, home), factors_of(family)
    adapter = write_adapter(factors, home / f"{family}-lora.safetensors")
    after = merged(base, {adapter: 0.5}, home / f"{family}-merged.safetensors")
    before, right = load_file(base), expected(family, factors, 0.5)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) >= len({*factors}) / 4
    assert_close(after, right)


@pytest.mark.parametrize("family", ["flux", "sdxl", "wan_t2v"])
def test_every_dialect_gives_the_same_bytes(family, home):
    """Those that can hold the adapter, of which each family has ten."""
    base = base_of(family, home)
    factors = {
        name: pair
        for name, pair in factors_of(family, every=1 if family != "sdxl" else 19).items()
        if "attn" in name and "single" not in name and not name.startswith("text")
    }
    lora = write_adapter(factors, home / f"{family}-attention.safetensors")
    hashes = {}
    for name in DIALECTS:
        is_file = described()[name].layout == "keys"
        adapter = home / f"{family}-as-{name}{'.safetensors' * is_file}"
        architecture = FAMILIES[family].architecture
        try:
            adapterkit.convert(lora, to=name, out=adapter, architecture=architecture)
        except Refused:
            continue
        merged(base, [adapter], home / "dialect.safetensors")
        hashes[name] = hashlib.sha256((home / "dialect.safetensors").read_bytes()).hexdigest()
    assert {"kohya", "comfyui", "diffusers", "lycoris", "onetrainer", "peft"} <= {*hashes}
    assert len(hashes) >= 10
    assert len({*hashes.values()}) == 1, hashes


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_files_of_the_denoiser_alone(prefix, home):
    """As Black Forest Labs and ComfyUI's split files have them."""
    base, factors = base_of("flux", home), factors_of("flux", every=3)
    bare = {prefix + key.removeprefix(DENOISER): value for key, value in load_file(base).items()}
    save_file(bare, home / "bare.safetensors")
    adapter = write_adapter(factors, home / "flux-some.safetensors")
    after = merged(home / "bare.safetensors", [adapter], home / "bare-merged.safetensors")
    right = {
        prefix + key.removeprefix(DENOISER): value
        for key, value in expected("flux", factors).items()
    }
    assert_close(after, right)


def test_a_file_in_shards_with_a_config_of_its_publisher(home, tmp_path):
    """As Wan's repositories have them: the output is a folder, as the base is."""
    base, factors = base_of("wan_t2v", home), factors_of("wan_t2v", every=3)
    folder = tmp_path / "wan"
    folder.mkdir()
    bare = {key.removeprefix(DENOISER): value for key, value in load_file(base).items()}
    save_file(bare, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "WanModel", "model_type2": "t2v"}')
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    adapterkit.merge(folder, [adapter], out=tmp_path / "out")
    right = {k.removeprefix(DENOISER): v for k, v in expected("wan_t2v", factors).items()}
    assert_close(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), right)


def test_other_tensors_and_metadata_of_the_file_stay(home, tmp_path):
    """Averages, the autoencoder, markers of v-prediction, metadata: the header byte for byte."""
    base = load_file(base_of("sdxl", home))
    rest = {
        "first_stage_model.decoder.conv_in.weight": torch.randn(2, 2, 3, 3),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(4, 4),
        "v_pred": torch.tensor([]),
        "ztsnr": torch.tensor([]),
        "alphas_cumprod": torch.randn(7).double(),
    }
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "tag": "ü\n"}
    path = tmp_path / "model.safetensors"
    save_file(base | rest, path, metadata=metadata)
    adapter = write_adapter(factors_of("sdxl", every=9), tmp_path / "lora.safetensors")
    receipt = adapterkit.merge(path, [adapter], out=tmp_path / "out.safetensors")
    size = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert (tmp_path / "out.safetensors").read_bytes()[:size] == path.read_bytes()[:size]
    after = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(after[key], value) for key, value in rest.items())
    assert any("model_ema" in note and "averages" in note for note in receipt.data["notes"])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == metadata
    beside = sorted(p.name for p in tmp_path.iterdir())
    assert beside == [
        "lora.safetensors",
        "model.safetensors",
        "out.safetensors",
        "out.safetensors.adapterkit.json",
    ]
    adapterkit.verify(tmp_path / "out.safetensors", base=path, adapters=[adapter])


def test_diffusers_reads_the_merged_file(home, tmp_path):
    """`from_single_file`, and its own loading of the LoRA into the model of the base."""
    base = base_of("sdxl", home)
    factors = {k: v for k, v in factors_of("sdxl", every=7).items() if k.startswith("unet.")}
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    merged(base, [adapter], tmp_path / "out.safetensors")
    unet = models_of("sdxl")["unet"]
    unet.save_config(tmp_path / "config")
    ours = UNet2DConditionModel.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(tmp_path / "config")
    )
    theirs = UNet2DConditionModel.from_config(unet.config).eval()
    theirs.load_state_dict(unet.state_dict())
    plain = load_file(adapter)
    theirs.load_lora_adapter(plain, prefix="unet")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    hidden = torch.randn(1, 3, 16, generator=generator)
    more = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    with torch.no_grad():
        first, second, before = (
            model.float()(latents, 3, hidden, added_cond_kwargs=more).sample
            for model in (ours.eval(), theirs, unet)
        )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert (first - before).abs().max() > 0.01


def test_the_u_net_of_kolors(tmp_path):
    """SDXL's, with a projection of the texts, in diffusers' names as it is published."""
    torch.manual_seed(0)
    how = dict(models_of("sdxl")["unet"].config)
    unet = UNet2DConditionModel.from_config(
        how | {"encoder_hid_dim": 6, "encoder_hid_dim_type": "text_proj"}
    )
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    save_file(state, tmp_path / "kolors.safetensors")
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and "attentions" in name
    }
    factors = {
        f"unet.{name}": (drawn(2, one.in_features, seed=n), drawn(one.out_features, 2, seed=n))
        for n, (name, one) in enumerate(layers.items())
    }
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    after = merged(tmp_path / "kolors.safetensors", [adapter], tmp_path / "out.safetensors")
    for name in layers:
        a, b = factors[f"unet.{name}"]
        state[f"{name}.weight"] += b @ a
    assert_close(after, state)
    assert adapterkit.inspect(tmp_path / "out.safetensors")["architecture"]["model_type"] == "sdxl"


# ---- kinds of deltas ---------------------------------------------------------------------------


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def test_other_kinds_in_parts_of_what_the_file_fuses(home, tmp_path):
    """LoHa, LoKr and whole differences of q, k, v, which no fused factors hold, beside LoRA."""
    base, block = base_of("flux", home), "transformer_blocks.0.attn"
    two, scale = torch.tensor(2.0), 2.0 / 2
    modules = {
        f"{block}.to_q": {
            "lokr_w1": drawn(2, 2, seed=1),
            "lokr_w2": drawn(4, 4, seed=2),
            "alpha": two,
        },
        f"{block}.to_k": {
            "hada_w1_a": drawn(8, 2, seed=3),
            "hada_w1_b": drawn(2, 8, seed=4),
            "hada_w2_a": drawn(8, 2, seed=5),
            "hada_w2_b": drawn(2, 8, seed=6),
            "alpha": two,
        },
        f"{block}.to_v": {"diff": drawn(8, 8, seed=7), "diff_b": drawn(8, seed=8)},
        f"{block}.to_out.0": {
            "lora_down.weight": drawn(2, 8, seed=9),
            "lora_up.weight": drawn(8, 2, seed=10),
            "alpha": two,
        },
    }
    q, k, v, o = modules.values()
    deltas = {
        f"{block}.to_q.weight": torch.kron(q["lokr_w1"], q["lokr_w2"]),
        f"{block}.to_k.weight": scale
        * (k["hada_w1_a"] @ k["hada_w1_b"])
        * (k["hada_w2_a"] @ k["hada_w2_b"]),
        f"{block}.to_v.weight": v["diff"],
        f"{block}.to_v.bias": v["diff_b"],
        f"{block}.to_out.0.weight": scale * o["lora_up.weight"] @ o["lora_down.weight"],
    }
    adapter = write_kinds(tmp_path / "kinds.safetensors", modules)
    out = tmp_path / "out.safetensors"
    after = merged(base, {adapter: 0.5}, out)
    state = state_of(models_of("flux")["transformer"])
    state |= {key: state[key] + 0.5 * delta for key, delta in deltas.items()}
    assert_close(after, in_the_file("flux", {"transformer": state}))
    adapterkit.verify(out, base=base, adapters={adapter: 0.5})


def test_a_kronecker_product_of_what_the_file_fuses(home, tmp_path):
    """In the file's own names: its rows are no rows of q, k or v alone."""
    base, name = base_of("flux", home), "double_blocks.0.img_attn.qkv"
    w1, w2 = drawn(2, 2, seed=1), drawn(12, 4, seed=2)
    key = f"lora_unet_{name.replace('.', '_')}"
    adapter = tmp_path / "lokr.safetensors"
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}
    save_file({f"{key}.{role}": value for role, value in parts.items()}, adapter)
    after, before = merged(base, [adapter], tmp_path / "out.safetensors"), load_file(base)
    own = f"{DENOISER}{name}.weight"
    torch.testing.assert_close(after.pop(own), before.pop(own) + torch.kron(w1, w2))
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("of", ["outputs", "inputs"])
def test_dora_of_some_layers(of, home, tmp_path):
    """Which PEFT's layout has of all or of none; norms of inputs it has not at all."""
    base, block = base_of("sdxl", home), "mid_block.attentions.0.transformer_blocks.0.attn1"
    a, b, m = drawn(2, 16, seed=1), drawn(16, 2, seed=2), drawn(16, seed=3).abs() + 1
    parts = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(2.0)}
    scale = m[:, None] if of == "outputs" else m[None, :]
    modules = {f"unet.{block}.to_q": parts | {"dora_scale": scale}, f"unet.{block}.to_k": parts}
    tensors = {
        f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}.{role}": value.clone()
        for name, own in modules.items()
        for role, value in own.items()
    }
    adapter = tmp_path / "dora.safetensors"
    save_file(tensors, adapter)
    after, before = merged(base, [adapter], tmp_path / "out.safetensors"), load_file(base)
    own = f"{DENOISER}middle_block.1.transformer_blocks.0.attn1.to_{{}}.weight"
    changed = before[own.format("q")] + b @ a
    norm = changed.norm(dim=1 if of == "outputs" else 0, keepdim=True)
    torch.testing.assert_close(after[own.format("q")], scale * changed / norm)
    torch.testing.assert_close(after[own.format("k")], before[own.format("k")] + b @ a)
    with pytest.raises((Refused, MultipleErrors), match="weight 1"):
        merged(base, {adapter: 0.5}, tmp_path / "half.safetensors")


def test_dora_of_some_rows_of_what_the_file_fuses(home, tmp_path):
    """As diffusers trains Flux by default: q, k and v, and not proj_mlp of the same tensor."""
    base, ends = base_of("flux", home), ("to_q", "to_k", "to_v", "to_out.0")
    factors = {name: own for name, own in factors_of("flux").items() if name.endswith(ends)}
    sizes = {name: drawn(len(b), seed=4).abs() + 1 for name, (_, b) in factors.items()}
    adapter = write_adapter(factors, tmp_path / "dora.safetensors")
    magnitudes = {f"{name}.lora_magnitude_vector": size for name, size in sizes.items()}
    save_file(load_file(adapter) | magnitudes, adapter)
    after = merged(base, [adapter], tmp_path / "out.safetensors", verify=True)
    (model,) = models_of("flux").values()
    state = {key: value.double() for key, value in state_of(model).items()}
    for name, (a, b) in factors.items():
        key = f"{name.removeprefix('transformer.')}.weight"
        changed = state[key] + b.double() @ a.double()
        state[key] = sizes[name].double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    right = in_the_file("flux", {"transformer": state})
    assert any("single_blocks.0.linear1" in key for key in right)
    assert_close(after, right)


def test_a_projection_that_the_file_keeps_as_a_matrix(home, tmp_path):
    """OneTrainer trains SDXL's, which OpenCLIP keeps as (in, out), without a module; other factors
    of it than plain ones are refused, and can be left out."""
    base, a, b = base_of("sdxl", home), drawn(2, 8, seed=1), drawn(8, 2, seed=2)
    query = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {}
    for name in ("lora_te2_text_projection", query):
        own = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(2.0)}
        tensors |= {f"{name}.{role}": value.clone() for role, value in own.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    before, key = load_file(base), "conditioner.embedders.1.model.text_projection"
    out = tmp_path / "out.safetensors"
    after = merged(base, [tmp_path / "lora.safetensors"], out)
    torch.testing.assert_close(after[key], before[key] + (b @ a).T)
    left = merged(base, [tmp_path / "lora.safetensors"], out, exclude="text_projection")
    assert torch.equal(left[key], before[key])
    tensors["lora_te2_text_projection.dora_scale"] = torch.ones(8, 1)
    tensors[f"{query}.dora_scale"] = torch.ones(8, 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    text = refusal(base, tmp_path / "dora.safetensors", tmp_path / "no.safetensors")
    assert "1 modules that the file does not have" in text and "--exclude" in text
    left = merged(base, [tmp_path / "dora.safetensors"], out, exclude="text_projection")
    assert torch.equal(left[key], before[key])


def test_a_text_encoder_without_its_first_word(home, tmp_path):
    """As some tools write CLIP; ComfyUI reads it too."""
    word, flat = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    tensors = {key.replace(word, flat): v for key, v in load_file(base_of("sd15", home)).items()}
    save_file(tensors, tmp_path / "flat.safetensors")
    factors = factors_of("sd15", every=5)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    after = merged(tmp_path / "flat.safetensors", [adapter], tmp_path / "out.safetensors")
    assert_close(after, {k.replace(word, flat): v for k, v in expected("sd15", factors).items()})


def test_tables_norms_and_values(home, tmp_path):
    """ComfyUI's differences of Wan's tables and norms, and a norm that replaces Flux's."""
    base = base_of("wan_t2v", home)
    table, norm = drawn(1, 6, 16, seed=1), drawn(16, seed=2)
    adapter = tmp_path / "wan.safetensors"
    block = "diffusion_model.blocks.0"
    save_file(
        {f"{block}.diff_m": table, f"{block}.self_attn.norm_q.diff": norm}
        | {
            f"{block}.self_attn.q.diff_b": norm + 1,
            f"{block}.self_attn.q.lora_down.weight": drawn(2, 16, seed=3),
        }
        | {f"{block}.self_attn.q.lora_up.weight": drawn(16, 2, seed=4)},
        adapter,
    )
    model = write_wan_with_modulation(base, tmp_path / "base.safetensors")
    after, before = merged(model, {adapter: 0.5}, tmp_path / "out.safetensors"), load_file(model)
    own = f"{DENOISER}blocks.0."
    changed = {key.removeprefix(own) for key in after if not torch.equal(after[key], before[key])}
    assert changed == {
        "modulation",
        "self_attn.norm_q.weight",
        "self_attn.q.bias",
        "self_attn.q.weight",
    }
    for key, delta in [("modulation", table), ("self_attn.norm_q.weight", norm)]:
        torch.testing.assert_close(after[own + key], before[own + key] + 0.5 * delta)


def write_wan_with_modulation(source: Path, path: Path) -> Path:
    """The file with the block's table as Wan's own has it."""
    tensors = {
        key.replace("blocks.0.scale_shift_table", "blocks.0.modulation"): value
        for key, value in load_file(source).items()
    }
    save_file(tensors, path)
    return path


# ---- refusals ----------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path, out: Path, **options: object) -> str:
    with pytest.raises((Refused, MultipleErrors)) as caught:
        adapterkit.merge(base, [adapter], out=out, **options)
    assert not out.exists()
    return str(caught.value)


def test_parts_that_the_file_does_not_hold(home, tmp_path):
    bare = {k: v for k, v in load_file(base_of("sdxl", home)).items() if k.startswith(DENOISER)}
    save_file(bare, tmp_path / "unet.safetensors")
    factors = factors_of("sdxl", every=9)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    text = refusal(tmp_path / "unet.safetensors", adapter, tmp_path / "out.safetensors")
    assert "modules of text_encoder, which the file does not have" in text
    assert "modules of text_encoder_2, which the file does not have" in text
    assert '--exclude "text_encoder[.].*"' in text
    out = tmp_path / "out.safetensors"
    after = merged(tmp_path / "unet.safetensors", [adapter], out, exclude=r"text_encoder(_2)?[.].*")
    denoiser = {name: pair for name, pair in factors.items() if name.startswith("unet.")}
    right = {k: v for k, v in expected("sdxl", denoiser).items() if k.startswith(DENOISER)}
    assert_close(after, right)
    receipt = json.loads((tmp_path / "out.safetensors.adapterkit.json").read_text())
    assert len(receipt["left_out"]) == len(factors) - len(denoiser)


def test_adapters_of_other_families(home, tmp_path):
    adapter = write_adapter(factors_of("flux", every=5), tmp_path / "lora.safetensors")
    text = refusal(base_of("wan_t2v", home), adapter, tmp_path / "out.safetensors")
    assert "not in wan" in text
    assert "trained on this base" in text


def test_a_part_that_the_adapter_does_not_name(home, tmp_path):
    """Of two text encoders, by PEFT: which is said by another format."""
    factors = {
        name.partition(".")[2]: pair
        for name, pair in factors_of("sdxl").items()
        if name.startswith("text_encoder.")
    }
    named = {f"text_encoder.{name}": pair for name, pair in factors.items()}
    lora = write_adapter(named, tmp_path / "lora.safetensors")
    adapterkit.convert(lora, to="peft", out=tmp_path / "peft")
    text = refusal(base_of("sdxl", home), tmp_path / "peft", tmp_path / "out.safetensors")
    assert "modules of text_encoder or text_encoder_2" in text
    assert "--component PART" in text


@pytest.mark.parametrize("out", ["folder", "model.gguf"])
def test_the_output_of_one_file_is_one(out, home, tmp_path):
    adapter = write_adapter(factors_of("flux", every=5), tmp_path / "lora.safetensors")
    text = refusal(base_of("flux", home), adapter, tmp_path / out)
    assert "a name that ends in .safetensors" in text


@pytest.mark.parametrize("options", [{"max_shard_size": "1GB"}, {"tokenizer": "base"}])
def test_options_of_folders(options, home, tmp_path):
    adapter = write_adapter(factors_of("flux", every=5), tmp_path / "lora.safetensors")
    text = refusal(base_of("flux", home), adapter, tmp_path / "out.safetensors", **options)
    assert "with this base" in text


# ---- other verbs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "to"), [("flux", "comfyui"), ("sdxl", "kohya"), ("flux", "diffusers")]
)
def test_an_adapter_between_two_files_in_the_names_of_tools(family, to, home, tmp_path):
    base = base_of(family, home)
    factors = {k: v for k, v in factors_of(family, every=4).items() if not k.startswith("text")}
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    out = tmp_path / "tuned.safetensors"
    after = merged(base, [adapter], out)
    adapterkit.extract(base, out, rank=8, out=tmp_path / "peft")
    adapterkit.convert(tmp_path / "peft", to=to, base=base, out=tmp_path / "new.safetensors")
    again = merged(base, [tmp_path / "new.safetensors"], tmp_path / "again.safetensors")
    for key, value in after.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_a_file_of_another_dtype(home, tmp_path):
    half = {key: value.half() for key, value in load_file(base_of("flux", home)).items()}
    save_file(half, tmp_path / "half.safetensors")
    adapter = write_adapter(factors_of("flux", every=5), tmp_path / "lora.safetensors")
    after = merged(tmp_path / "half.safetensors", [adapter], tmp_path / "out.safetensors")
    assert {value.dtype for value in after.values()} == {torch.float16}
    wide = merged(
        tmp_path / "half.safetensors", [adapter], tmp_path / "wide.safetensors", dtype="bf16"
    )
    assert {value.dtype for value in wide.values()} == {torch.bfloat16}


# What ComfyUI's `detect_unet_config` (comfy/model_detection.py) asks of a file's denoiser, which
# tells the model that it is: keys by family.
TOLD_BY = {
    "sd15": ["input_blocks.0.0.weight", "time_embed.0.weight"],
    "sdxl": ["input_blocks.0.0.weight", "label_emb.0.0.weight"],
    "sd3": ["joint_blocks.0.context_block.attn.qkv.weight"],
    "flux": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"],
    "flux2": ["double_stream_modulation_img.lin.weight"],
    "chroma": ["distilled_guidance_layer.norms.0.scale"],
    "hunyuan_video_comfyui": ["txt_in.individual_token_refiner.blocks.0.norm1.weight"],
    "wan_t2v": ["head.head.weight", "patch_embedding.weight"],
    "ltx": ["patchify_proj.weight", "transformer_blocks.0.attn2.to_k.weight"],
    "qwen_image": ["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"],
    "z_image": ["cap_embedder.1.weight", "layers.0.attention.qkv.weight"],
    "lumina2": ["cap_embedder.1.weight", "layers.0.attention.qkv.weight"],
    "hidream": ["caption_projection.0.linear.weight"],
    "anima": ["blocks.0.mlp.layer1.weight", "llm_adapter.blocks.0.cross_attn.q_proj.weight"],
    "auraflow": ["double_layers.0.attn.w1q.weight", "single_layers.0.mlp.c_fc1.weight"],
    "cosmos": ["blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight"],
    "hunyuan_image": [
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "byt5_in.fc1.weight",
    ],
    "kandinsky5": ["visual_transformer_blocks.0.cross_attention.key_norm.weight"],
    "krea2": ["txtfusion.projector.weight", "blocks.0.attn.wq.weight"],
    "pixart": ["t_block.1.weight", "ar_embedder.mlp.0.weight"],
    "hunyuan_video15": [
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "vision_in.proj.0.weight",
    ],
    "mochi": ["t5_yproj.weight"],
    "hidream_o1": ["t_embedder1.mlp.0.weight", "x_embedder.proj1.weight"],
    "omnigen2": ["time_caption_embed.timestep_embedder.linear_1.bias"],
    "cogvideox": ["blocks.0.norm1.linear.weight", "patch_embed.proj.weight"],
    "sdxl_refiner": ["input_blocks.0.0.weight", "label_emb.0.0.weight"],
}


@pytest.mark.parametrize("family", TOLD_BY)
def test_names_are_those_by_which_comfyui_detects_models(family, home):
    base = base_of(family, home)
    starts = re.compile(f"^({re.escape(DENOISER)}|net\\.)")
    keys = {starts.sub("", key) for key in load_file(base)}
    keys |= {key.replace(".norm.key_norm.weight", ".norm.key_norm.scale") for key in keys}
    keys |= {key.replace("norms.0.weight", "norms.0.scale") for key in keys}
    assert {*TOLD_BY[family]} <= keys
    model = read_checkpoint(open_model(base))
    assert isinstance(model, SingleFileModel)
    assert model.architecture in (FAMILIES[family].architecture, "sd2" if family == "sd15" else "")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_file_of_qwen3_vl_is_not_hidream_o1(prefix, home, tmp_path):
    """Which is Qwen3-VL with layers for pixels."""
    pixels = re.compile(r"(t_embedder1|x_embedder|final_layer2)\.")
    whole = {f"{prefix}{k.removeprefix(DENOISER)}": value
             for k, value in load_file(base_of("hidream_o1", home)).items()}  # fmt: skip
    words = {key: value for key, value in whole.items() if not pixels.search(key)}
    for tensors, family in ((whole, "hidream_o1"), (words, None)):
        save_file(tensors, tmp_path / "base.safetensors")
        base = read_checkpoint(open_model(tmp_path / "base.safetensors"))
        assert getattr(base, "architecture", None) == family


def test_inspect_names_the_family_and_its_components(home):
    architecture = adapterkit.inspect(base_of("sdxl", home))["architecture"]
    parts = ["unet", "text_encoder", "text_encoder_2"]
    assert architecture == {"classes": parts, "model_type": "sdxl"}


def test_an_output_that_is_finished_stays(home, tmp_path):
    base, out = base_of("flux", home), tmp_path / "out.safetensors"
    adapter = write_adapter(factors_of("flux", every=5), tmp_path / "lora.safetensors")
    plan = adapterkit.merge(base, [adapter], out=out, dry_run=True)
    assert plan.is_file and not out.exists()
    plain = merged(base, [adapter], out)
    with pytest.raises(Refused, match="exists"):
        adapterkit.merge(base, {adapter: 0.5}, out=out)
    assert adapterkit.merge(base, [adapter], out=out, resume=True).finished_before
    assert_close(load_file(out), plain)
    shutil.copy(out, tmp_path / "foreign.safetensors")
    with pytest.raises(Refused, match="did not write it"):
        adapterkit.merge(base, [adapter], out=tmp_path / "foreign.safetensors", overwrite=True)


def test_killed_at_any_moment_it_resumes(home, tmp_path):
    """There is no file, or an unfinished one under its name, before it is whole."""
    base, adapter = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    shutil.copy(base_of("flux", home), base)
    write_adapter(factors_of("flux", every=3), adapter)
    whole = merged(base, [adapter], tmp_path / "whole.safetensors")
    words = ["merge", base.name, adapter.name, "--out", "again.safetensors", "--resume"]
    again, when, server = tmp_path / "again.safetensors", 1, forks()
    while True:
        fault = {"kill": True, "when": when}
        ended = server.wait(server.start(argv=words, cwd=str(tmp_path), fault=fault))
        if again.exists():  # also where it was killed after that
            assert_close(load_file(again), whole)
        if ended.status == 0:
            break
        assert ended.status == -9, ended
        when += 7
    assert when > 21
    shown = {path.name for path in tmp_path.glob("*again*")}
    assert shown == {"again.safetensors", "again.safetensors.adapterkit.json"}
    adapterkit.verify(again, base=base, adapters=[adapter])


def test_block_weights_are_of_image_models(tmp_path):
    """Not of a base of no family."""
    save_file({"layer.weight": torch.ones(8, 8)}, tmp_path / "plain.safetensors")
    factors = {"transformer.x_embedder": (torch.ones(1, 8), torch.ones(8, 1))}
    adapter = write_adapter(factors, tmp_path / "one.safetensors")
    text = refusal(tmp_path / "plain.safetensors", adapter, tmp_path / "out", lbw=["1"])
    assert "--lbw with this base" in text


# ---- weights of blocks -------------------------------------------------------------------------

SDXL12 = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split()


def scaled(factors: dict, weight_of: object) -> dict:
    return {name: (a, b * weight_of(name)) for name, (a, b) in factors.items()}


def block_of(name: str) -> str | None:
    """The block of a module of SDXL by diffusers' names, told by its place."""
    if name.startswith("text_encoder"):
        return "BASE"
    words = name.split(".")
    if words[1] == "mid_block":
        return "M00"
    if words[1] not in ("down_blocks", "up_blocks") or "attentions" not in words:
        return "other"
    level, number = int(words[2]), int(words[4])
    first = {"down_blocks": 3 * level + 1, "up_blocks": 3 * level}[words[1]]
    return f"{'IN' if words[1] == 'down_blocks' else 'OUT'}{first + number:02}"


def test_block_weights_of_sdxl(home, tmp_path):
    """Twelve numbers, times the adapter's weight; for the second adapter alone."""
    base = base_of("sdxl", home)
    factors = {
        name: pair
        for name, pair in factors_of("sdxl", every=3).items()
        if block_of(name) != "other"
    }
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    numbers = [0.5, 0, 1, 0.25, 2, -1, 0, 0.5, 1, 1, 0.75, 0.1]
    weights = dict(zip(SDXL12, numbers, strict=True))
    text = ",".join(map(str, numbers))
    after = merged(base, {adapter: 0.5}, tmp_path / "out.safetensors", lbw=[text])
    right = scaled(factors, lambda name: 0.5 * weights.get(block_of(name), 0))
    assert_close(after, expected("sdxl", right))
    adapterkit.verify(tmp_path / "out.safetensors", base=base, adapters={adapter: 0.5})
    two = merged(
        base, {adapter: 0.5, str(adapter): 1}, tmp_path / "two.safetensors", lbw=[f"2:{text}"]
    )
    right = scaled(factors, lambda name: 0.5 + weights.get(block_of(name), 0))
    assert_close(two, expected("sdxl", right))


def test_presets_and_other_weights_of_modules(home, tmp_path):
    base, factors = base_of("sd15", home), factors_of("sd15", every=4)
    factors = {name: pair for name, pair in factors.items() if "attn" in name}
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    after = merged(base, [adapter], tmp_path / "out.safetensors", lbw=["OUTALL"])
    outer = {"up_blocks": 1.0, "self_attn": 1.0}
    right = scaled(
        factors, lambda name: float(any(word in name for word in outer) or "text" in name)
    )
    assert_close(after, expected("sd15", right))
    after = merged(base, [adapter], tmp_path / "out.safetensors", weight_for=[r".*attn2.*=0.25"])
    right = scaled(factors, lambda name: 0.25 if "attn2" in name else 1.0)
    assert_close(after, expected("sd15", right))


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("flux", {"lbw": ["1,2,3"]}, "61 or 58 or 55 or 18 numbers"),
        ("sd15", {"lbw": ["OUTAL"]}, "OUTALL"),
        ("sd15", {"lbw": ["3:OUTALL"]}, "of 1 adapters"),
        ("ltx", {"lbw": ["1"]}, "a model of ltx"),
        ("flux", {"weight_for": ["nothing=1"]}, "matches none"),
    ],
)
def test_wrong_weights_of_blocks(family, options, text, home, tmp_path):
    adapter = write_adapter(factors_of(family, every=5), tmp_path / "lora.safetensors")
    assert text in refusal(base_of(family, home), adapter, tmp_path / "out.safetensors", **options)


@pytest.mark.parametrize(("family", "length"), [("flux", 61), ("wan_t2v", 30), ("wan_t2v", 40)])
def test_lists_of_transformers_with_their_length(family, length, home, tmp_path):
    """All ones change nothing; without the first blocks they stay as they are."""
    base, factors = base_of(family, home), factors_of(family)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    plain, before = merged(base, [adapter], out), load_file(base)
    assert_close(merged(base, [adapter], out, lbw=[",".join("1" * length)]), plain)
    first = {"flux": (3, 22), "wan_t2v": (0,)}[family]
    numbers = ["0" if place in first else "1" for place in range(length)]
    after = merged(base, [adapter], out, lbw=[",".join(numbers)])
    for key, value in after.items():
        inside = any(f".{name}.0." in key for name in ("double_blocks", "single_blocks", "blocks"))
        assert torch.equal(value, (before if inside else plain)[key]), key


def test_presets_of_files(home, tmp_path):
    """Those of sd-webui-lora-block-weight and of the Inspire Pack, whose lists are longer: what is
    in no block has the first of their numbers."""
    (tmp_path / "presets.txt").write_text(
        "# mine\nOUTALL:0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5\n@SD-FULL-TEST:17\nR:R,1\n\n"
        "MIDDLE:2,0,0,0,0,0,0,0,0,0,0,0,1,0.5,0.25,0,0,0,0,0,0,0,0,0,0,0,0:note\n"
    )
    base, factors = base_of("sd15", home), factors_of("sd15", every=3)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    out, presets = tmp_path / "out.safetensors", tmp_path / "presets.txt"
    shipped = "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"
    own = "0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5"
    ours = merged(base, [adapter], out, lbw=[f"1:{presets}:OUTALL"])
    assert_close(ours, merged(base, [adapter], tmp_path / "list.safetensors", lbw=[own]))
    assert not torch.equal(
        *(one[next(key for key in ours if "output_blocks.11" in key and "to_q" in key)]
          for one in (ours, merged(base, [adapter], out, lbw=[shipped])))
    )  # fmt: skip
    merged(base, [adapter], out, lbw=[f"1:{presets}:MIDDLE"])
    presets.unlink()  # the receipt has the numbers
    adapterkit.verify(out, base=base, adapters=[adapter])
    in_middle = {"resnets.0": 1.0, "attentions.0": 0.5, "resnets.1": 0.25}

    def weight_of(name: str) -> float:
        words = name.split(".")
        if words[1] == "mid_block":
            return in_middle[".".join(words[2:4])]
        return 0.0 if words[1] in ("down_blocks", "up_blocks", "conv_in") else 2.0

    assert_close(load_file(out), expected("sd15", scaled(factors, weight_of)))
    presets.write_text("ALL:1,1\nR:R,1,1\n")
    for name, text in (("AL", "ALL"), ("ALL", "17 or 26 or 27"), ("R", "numbers for R")):
        assert text in refusal(
            base, adapter, tmp_path / "no.safetensors", lbw=[f"{presets}:{name}"]
        )
    text = refusal(base, adapter, tmp_path / "no.safetensors", lbw=["x.txt:ALL"])
    assert "no such file" in text


def test_prefixes_of_names(home, tmp_path):
    """As ComfyUI's nodes that merge blocks have them, and the one that selects blocks of Wan."""
    out = tmp_path / "out.safetensors"
    base, factors = base_of("flux", home), factors_of("flux", every=2)
    adapter = write_adapter(factors, tmp_path / "flux.safetensors")
    text = (
        '{"double_blocks.0.": 0.5, "single_blocks.": 0, "single_blocks.0.linear2.": 2, '
        '"img_in.": false}'
    )
    rules = {
        "transformer.transformer_blocks.0.": 0.5,
        "transformer.single_transformer_blocks.0.proj_out": 2.0,
        "transformer.single_transformer_blocks.": 0.0,
        "transformer.x_embedder": 0.0,
    }
    weight = lambda name: next((w for start, w in rules.items() if name.startswith(start)), 1.0)
    after = merged(base, [adapter], out, lbw=[text])
    assert_close(after, expected("flux", scaled(factors, weight)))
    text = refusal(base, adapter, tmp_path / "no.safetensors", lbw=['{"double_block.": 1}'])
    assert "no module matches" in text
    base, factors = base_of("wan_t2v", home), factors_of("wan_t2v")
    adapter = write_adapter(factors, tmp_path / "wan.safetensors")
    (tmp_path / "blocks.json").write_text(
        '{"selected_blocks": {"blocks.0.": true}, "layer_filter": "ffn, cross_attn.k"}'
    )
    after = merged(base, [adapter], out, lbw=[str(tmp_path / "blocks.json")])
    left_out = (".ffn.", ".attn2.to_k", "attn2.add_k", "attn2.norm_k", "attn2.norm_added_k")
    right = scaled(
        factors,
        lambda name: float(".blocks.0." in name and not any(word in name for word in left_out)),
    )
    assert_close(after, expected("wan_t2v", right))
