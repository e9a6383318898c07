"""Flux.1, Flux.2 and Chroma: names and rows against diffusers' own converters, files against its
own loaders."""

import copy
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as loras
from diffusers.loaders import single_file_utils as checkpoints
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.core.adapter.adapter_config import DeclaredScales
from adapterkit.core.errors import Refused
from adapterkit.core.weights.plan_reader import PlanReader
from tests.support.adapter_samples import contents_of

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
GOLDEN = Path(__file__).parent / "golden"
HIDDEN = 8  # of the golden files
Tensors = dict[str, Tensor]
Converter = Callable[[Tensors], Tensors]
# a model of the golden files' size
SIZES: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": HIDDEN,
    "num_attention_heads": 1,
    "joint_attention_dim": 8,
}
GUIDANCE = {"approximator_num_channels": 4, "approximator_hidden_dim": 8, "approximator_layers": 1}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: FluxTransformer2DModel(
        patch_size=1,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
        **SIZES,
    ),
    "flux2": lambda: Flux2Transformer2DModel(
        timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), **SIZES
    ),
    "chroma": lambda: ChromaTransformer2DModel(
        patch_size=1, axes_dims_rope=(2, 2, 4), **GUIDANCE, **SIZES
    ),
}
CONVERTERS = {
    "flux": checkpoints.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": checkpoints.convert_flux2_transformer_checkpoint_to_diffusers,
    "chroma": checkpoints.convert_chroma_transformer_checkpoint_to_diffusers,
}
# Flux.1's sizes, which diffusers' converters have in their code
IN_CODE = {"3072": str(HIDDEN), "12288": str(4 * HIDDEN), "19": "1", "38": "1"}


def small(converter: Callable) -> Converter:
    """A converter of diffusers for models of the golden files' size."""
    source = textwrap.dedent(inspect.getsource(converter))
    for number, own in IN_CODE.items():
        source = re.sub(rf"(?<![\w.\"]){number}\b", own, source)
    namespace = dict(vars(inspect.getmodule(converter)))
    exec(compile(source, converter.__name__, "exec"), namespace)
    return namespace[converter.__name__]


@cache
def tiny(family: str) -> nn.Module:
    """A model that the golden files fit."""
    torch.manual_seed(0)
    model = MODELS[family]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def weights(family: str) -> dict[str, torch.Size]:
    """The shapes of the tiny model's weights, by module."""
    return {
        name: module.weight.shape
        for name, module in tiny(family).named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def originals(family: str) -> dict[str, int]:
    """Rows of the modules of the original model, by the architecture's rules."""
    names = names_of(family, "transformer", "original")
    rows: dict[str, int] = {}
    for module, shape in weights(family).items():
        named = names.named(module)
        assert named is not None, module
        rows[named[1]] = rows.get(named[1], 0) + shape[0]
    return rows


def golden(name: str) -> Tensors:
    return load_file(GOLDEN / f"{name}.safetensors")


def convert(source: str | Path, to: str, out: Path, **options: Any) -> Tensors:
    """The tensors of a file or a golden file in another format."""
    path = GOLDEN / f"{source}.safetensors" if isinstance(source, str) else source
    adapterkit.convert(path, to=to, out=out, overwrite=True, **options)
    return load_file(out)


def deltas(tensors: Tensors) -> Tensors:
    """b @ a of each module, and all that is no factor, in float64."""
    ends = (".lora_A.weight", ".lora_B.weight")
    result = {key: v.double() for key, v in tensors.items() if not key.endswith(ends)}
    for key in tensors:
        if key.endswith(ends[0]):
            name = key.removesuffix(ends[0])
            result[name] = tensors[name + ends[1]].double() @ tensors[key].double()
    return result


def assert_same(ours: Tensors, theirs: Tensors, tolerance: float = 0) -> None:
    """The same modules, with the same deltas."""
    assert ours.keys() == theirs.keys()
    own = deltas(ours)
    for name, delta in deltas(theirs).items():
        assert torch.allclose(own[name], delta, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("family", MODELS)
def test_every_module_has_one_name(family: str) -> None:
    """Each layer and norm of the model in one place of one rule, in each naming."""
    for module in weights(family):
        for naming in ("original", "xlabs"):
            names = names_of(family, "transformer", naming)
            texts = [text for match in names.find_model(module) if (text := names.text(match))]
            assert len(texts) == 1 or (naming == "xlabs" and not texts), (module, texts)


@pytest.mark.parametrize("family", MODELS)
def test_rows_are_those_of_diffusers_checkpoints(family: str, tmp_path: Path) -> None:
    """Numbered rows of every module of the original model arrive where diffusers puts the
    checkpoint's rows."""
    source: Tensors = {}
    adapter: Tensors = {}
    at = 1
    for name, rows in originals(family).items():
        numbers = torch.arange(at, at + rows).double()
        at += rows
        if "norm" in name:
            source[f"{name}.scale"] = numbers
            if ".norms." not in name:  # diffusers takes norms of attention alone
                adapter[f"diffusion_model.{name}.set_weight"] = numbers
        else:
            source[f"{name}.weight"] = source[f"{name}.bias"] = numbers[:, None]
            adapter[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(1, 1).double()
            adapter[f"diffusion_model.{name}.lora_B.weight"] = numbers[:, None]
    expected = small(CONVERTERS[family])(source)
    path = tmp_path / "comfyui.safetensors"
    save_file(adapter, path)
    ours = convert(path, "diffusers", tmp_path / "ours.safetensors", architecture=family)
    for name in weights(family):
        if "norms" not in name:
            key = f"transformer.{name}"
            mine = ours.get(f"{key}.lora_B.weight", ours.get(f"{key}.weight"))
            assert mine is not None and torch.equal(mine, expected[f"{name}.weight"]), name


def in_new_names(key: str) -> str:
    """A key of an intermediate diffusers file as diffusers writes it now."""
    key = re.sub(r"self_attn\.to_([qkv])_lora", r"self_attn.\1_proj.lora_linear_layer", key)
    key = key.replace("to_out_lora", "out_proj.lora_linear_layer")
    key = key.replace("lora_linear_layer.down", "lora_A")
    key = key.replace("lora_linear_layer.up", "lora_B")
    # it forgets the component of the modules outside of the blocks
    return key if key.startswith(("transformer.", "text_encoder.")) else f"transformer.{key}"


def with_scales(tensors: Tensors, path: Path) -> Tensors:
    """The file's tensors with the scales that its metadata declare in b."""
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    tables: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        tables.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
    scales = {component: DeclaredScales(table, "") for component, table in tables.items()}
    result = dict(tensors)
    for key in tensors:
        component, _, name = key.removesuffix(".lora_B.weight").partition(".")
        if key.endswith(".lora_B.weight") and component in scales:
            rank, alpha = scales[component].alpha_of(name)
            result[key] = tensors[key] * alpha / rank
    return result


@pytest.mark.parametrize(
    ("name", "to"), [("kohya/flux", "diffusers"), ("kohya/flux_split_qkv", "ai-toolkit")]
)
def test_kohya_as_diffusers_converts_it(name: str, to: str, tmp_path: Path) -> None:
    """But for T5, which it does not load. It has scales in the factors, as we have where a format
    has no place for them."""
    tensors = {key: v.float() for key, v in golden(name).items() if "lora_te3" not in key}
    theirs = small(loras._convert_kohya_flux_lora_to_diffusers)(dict(tensors))
    theirs = {in_new_names(key): value for key, value in theirs.items()}
    ours = convert(name, to, tmp_path / "ours.safetensors", dtype="fp32")
    ours = with_scales(ours, tmp_path / "ours.safetensors")
    ours = {key: value for key, value in ours.items() if "text_encoder_2" not in key}
    assert_same(ours, theirs, 1e-6)
    ranks = {ours[key].shape[0] for key in ours if key.endswith("lora_A.weight")}
    assert ranks == {2}


@pytest.mark.parametrize("name", ["diffusers/flux", "ai-toolkit/flux"])
def test_kohya_that_is_written_is_read_by_diffusers(name: str, tmp_path: Path) -> None:
    """Each module with factors of its own, and without a part of qkv."""
    tensors = {key: value for key, value in golden(name).items() if ".attn.to_k." not in key}
    path = tmp_path / "source.safetensors"
    save_file(tensors, path)
    kohya = convert(path, "kohya", tmp_path / "k.safetensors", architecture="flux", dtype="fp32")
    kohya = {key: value.float() for key, value in kohya.items()}
    theirs = small(loras._convert_kohya_flux_lora_to_diffusers)(kohya)
    there = deltas({in_new_names(key): value for key, value in theirs.items()})
    for module, delta in deltas(tensors).items():
        assert torch.allclose(there[module], delta, atol=1e-5), module
    lacking = [there[module] for module in there if module.endswith(".attn.to_k")]
    assert lacking and not any(delta.any() for delta in lacking)


def test_xlabs_as_diffusers_converts_it(tmp_path: Path) -> None:
    ours = convert("xlabs/flux", "diffusers", tmp_path / "ours.safetensors")
    assert_same(ours, loras._convert_xlabs_flux_lora_to_diffusers(golden("xlabs/flux")))


def test_kontext_as_diffusers_converts_it(tmp_path: Path) -> None:
    tensors = golden("fal-kontext/flux")
    ours = convert("fal-kontext/flux", "diffusers", tmp_path / "ours.safetensors")
    last = {f"base_model.model.final_layer.linear.lora_{x}.weight": torch.ones(1) for x in "AB"}
    theirs = small(loras._convert_fal_kontext_lora_to_diffusers)(tensors | last)
    assert_same(
        ours, {key: v for key, v in theirs.items() if ".proj_out." not in key or "single" in key}
    )


def test_control_as_diffusers_converts_it(tmp_path: Path) -> None:
    """Biases, norms in place of the base's, img_in with twice the columns. But for the last
    modulation: diffusers swaps the halves of a's rank, too."""
    tensors = golden("bfl/control")
    ours = convert("bfl/control", "diffusers", tmp_path / "ours.safetensors")
    theirs = small(loras._convert_bfl_flux_control_lora_to_diffusers)(dict(tensors))
    key = "transformer.norm_out.linear.lora_A.weight"
    theirs[key] = theirs[key].roll(1, 0)
    assert_same(ours, theirs)
    assert ours["transformer.x_embedder.lora_A.weight"].shape == (2, 8)
    back = convert(
        tmp_path / "ours.safetensors", "bfl", tmp_path / "back.safetensors", architecture="flux"
    )
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], value) for key, value in tensors.items())


def test_flux2_as_diffusers_converts_it(tmp_path: Path) -> None:
    """But for the halves of the last modulation, which its LoRA converter forgets to swap; its
    checkpoint converter does."""
    ours = convert("ai-toolkit/flux2", "diffusers", tmp_path / "ours.safetensors")
    theirs = loras._convert_non_diffusers_flux2_lora_to_diffusers(golden("ai-toolkit/flux2"))
    key = "transformer.norm_out.linear.lora_B.weight"
    theirs[key] = theirs[key].roll(HIDDEN, 0)
    assert_same(ours, theirs)


@pytest.mark.parametrize("to", ["kohya", "ai-toolkit", "peft"])
def test_control_is_refused_by_formats_that_cannot_store_it(to: str, tmp_path: Path) -> None:
    """Norms in place of the base's, and where no bias is held, biases."""
    with pytest.raises(Refused) as caught:
        adapterkit.convert(GOLDEN / "bfl/control.safetensors", to=to, out=tmp_path / "out")
    message = str(caught.value)
    assert "6 modules" in message and "transformer_blocks.0.attn.norm_k" in message
    assert ("bias of lora, in 30 modules" in message) == (to == "kohya")
    assert not list(tmp_path.iterdir())


def test_control_in_comfyui(tmp_path: Path) -> None:
    """Its loader adds diff_b to the bias, and sets the norms."""
    tensors = golden("bfl/control")
    ours = convert("bfl/control", "comfyui", tmp_path / "ours.safetensors")
    for key, value in tensors.items():
        own = key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
        assert torch.equal(ours.pop(f"diffusion_model.{own}"), value), key
    assert not ours
    back = convert(
        tmp_path / "ours.safetensors", "bfl", tmp_path / "back.safetensors", architecture="flux"
    )
    assert_same(back, tensors)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A first layer with a control image beside the latents."""
    tensors = {"diffusion_model.img_in.lora_A.weight": torch.randn(2, 128)}
    tensors["diffusion_model.img_in.lora_B.weight"] = torch.randn(8, 2)
    tensors |= {f"diffusion_model.{k}": v for k, v in golden("bfl/control").items() if "_mod" in k}
    tensors = {key: value for key, value in tensors.items() if not key.endswith("bias")}
    path = tmp_path / "wide.safetensors"
    save_file(tensors, path)
    return path


def test_a_widened_layer_reports_its_shape(wide: Path, tmp_path: Path) -> None:
    """In ComfyUI's files, whatever the dtype of the factors."""
    key = "diffusion_model.img_in.reshape_weight"
    ours = convert(wide, "comfyui", tmp_path / "ours.safetensors", dtype="bf16")
    assert ours[key].tolist() == [8, 128] and ours[key].dtype == torch.int64
    again = convert(tmp_path / "ours.safetensors", "comfyui", tmp_path / "again.safetensors")
    assert torch.equal(again[key], ours[key])
    theirs = convert(tmp_path / "ours.safetensors", "diffusers", tmp_path / "d.safetensors")
    assert theirs["transformer.x_embedder.lora_A.weight"].shape == (2, 128)
    assert not [name for name in theirs if "lora" not in name]


@pytest.mark.parametrize("to", ["kohya", "ai-toolkit", "peft"])
def test_widened_layer_is_refused_where_no_client_widens(
    to: str, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=r"more inputs than in the base: transformer\.x_embedder"):
        adapterkit.convert(wide, to=to, out=tmp_path / "out")


def test_shape_that_is_not_the_factors_is_refused(wide: Path, tmp_path: Path) -> None:
    tensors = load_file(wide)
    tensors["diffusion_model.img_in.reshape_weight"] = torch.tensor([8, 64])
    save_file(tensors, wide)
    with pytest.raises(Refused, match=r"reshape_weight.* \[8, 64\]"):
        convert(wide, "diffusers", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("diffusers/flux", "kohya"),
        ("diffusers/flux", "comfyui"),
        ("ai-toolkit/flux", "kohya"),
        ("xlabs/flux", "bfl"),
        ("kohya/flux", "comfyui"),
    ],
)
def test_output_is_the_sources_after_two_conversions(
    name: str, through: str, tmp_path: Path
) -> None:
    """Both are loaded by diffusers."""
    source, other, back = (tmp_path / f"{n}.safetensors" for n in ("source", "other", "back"))
    convert(name, "diffusers", source, component="transformer", dtype="fp32")
    convert(name, through, other, component="transformer", architecture="flux", dtype="fp32")
    convert(other, "diffusers", back, architecture="flux")
    expected = output(source)
    assert (expected - output(None)).abs().max() > 0.1
    assert torch.allclose(output(back), expected, rtol=1e-5)


def output(path: Path | None) -> Tensor:
    """The tiny Flux.1's, with an adapter that diffusers loads."""
    model = copy.deepcopy(tiny("flux"))
    if path is not None:
        load(model, "flux", path)
    return run(model, "flux")


def load(model: nn.Module, family: str, path: Path) -> None:
    """diffusers' own loading of a file."""
    if family == "flux2":
        model.load_lora_adapter(load_file(path), prefix="transformer")
        return
    pipeline = FluxPipeline(None, None, None, None, None, None, model)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)


def run(model: nn.Module, family: str) -> Tensor:
    """A model's output for fixed inputs, as wide as its first layer."""
    torch.manual_seed(0)
    width = model.x_embedder.in_features
    axes = 4 if family == "flux2" else 3
    inputs = {
        "hidden_states": torch.randn(1, 4, width).double(),
        "encoder_hidden_states": torch.randn(1, 3, 8).double(),
        "timestep": torch.tensor([0.5]).double(),
        "img_ids": torch.zeros(4, axes),
        "txt_ids": torch.zeros(3, axes),
    }
    if family == "flux":
        inputs["pooled_projections"] = torch.randn(1, 8).double()
    if family != "chroma":
        inputs["guidance"] = torch.tensor([3.0]).double()
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("bfl/control", "flux"),
        ("fal-kontext/flux", "flux"),
        ("onetrainer/flux_hybrid", "flux"),
        ("ai-toolkit/flux2", "flux2"),
        ("ai-toolkit/chroma", "chroma"),
    ],
)
def test_diffusers_adds_what_the_source_holds(name: str, family: str, tmp_path: Path) -> None:
    """Its output with the converted file is that of a model whose weights took the deltas."""
    path = tmp_path / "ours.safetensors"
    convert(name, "diffusers", path, architecture=family)
    loaded, merged = copy.deepcopy(tiny(family)), copy.deepcopy(tiny(family))
    load(loaded, family, path)
    add(merged, contents_of(GOLDEN / f"{name}.safetensors", architecture=family))
    difference = (run(merged, family) - run(tiny_of(merged, family), family)).abs().max()
    assert difference > 0.1
    assert torch.allclose(run(loaded, family), run(merged, family), rtol=1e-4, atol=1e-4)


def tiny_of(model: nn.Module, family: str) -> nn.Module:
    """The tiny model, its first layer as wide as the given one's."""
    plain = copy.deepcopy(tiny(family))
    widen(plain.x_embedder, model.x_embedder.in_features)
    return plain


def widen(layer: nn.Linear, width: int) -> None:
    """Columns of zeros after a layer's own."""
    weight = layer.weight.data
    layer.weight.data = nn.functional.pad(weight, (0, width - weight.shape[1]))
    layer.in_features = width


def add(model: nn.Module, contents: Contents) -> None:
    """The deltas of an adapter added to a model's weights, its values in their place."""
    reader = PlanReader(contents.folders)
    for module in contents.modules:
        layer = model.get_submodule(module.name)
        value = {role: part.value(reader).double() for role, part in module.parts.items()}
        if module.kind == "value":
            layer.weight.data = value["weight"]
            continue
        if value["a"].shape[1] > layer.in_features:
            widen(layer, value["a"].shape[1])
        layer.weight.data += module.scale * value["b"] @ value["a"]
        if "bias" in value:
            layer.bias.data += module.scale * value["bias"]


def blocks(double: int, single: int, prefix: str = "transformer.") -> Tensors:
    """Factors of one module of each block, as wide as Flux.1 and HunyuanVideo are."""
    sizes = {f"transformer_blocks.{n}.ff.net.0.proj": (12288, 3072) for n in range(double)}
    sizes |= {f"single_transformer_blocks.{n}.proj_out": (3072, 15360) for n in range(single)}
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.zeros(1, columns).half()
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.zeros(rows, 1).half()
    return tensors


@pytest.mark.parametrize(
    ("double", "single", "family"),
    [(19, 38, "flux"), (20, 40, "hunyuan_video"), (18, 38, "flux"), (3, 39, "hunyuan_video")],
)
def test_numbers_of_blocks_tell_architectures(
    double: int, single: int, family: str, tmp_path: Path
) -> None:
    """Flux.1 and HunyuanVideo have the same names and sizes in diffusers; no files of 20 blocks are
    Flux.1's."""
    path = tmp_path / "source.safetensors"
    save_file(blocks(double, single), path)
    plan = adapterkit.convert(path, to="kohya", out=tmp_path / "out.safetensors", dry_run=True)
    assert plan.decisions["architecture"] == family


def test_few_blocks_do_not_tell_architectures(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    save_file(blocks(3, 3), path)
    with pytest.raises(Refused, match="modules of flux, .*hunyuan_video") as caught:
        adapterkit.convert(path, to="kohya", out=tmp_path / "out.safetensors")
    assert "--architecture" in str(caught.value)


def test_norms_that_no_client_takes_are_refused(tmp_path: Path) -> None:
    """diffusers loads those of attention alone."""
    name = "distilled_guidance_layer.norms.0"
    path = tmp_path / "comfyui.safetensors"
    save_file({f"diffusion_model.{name}.set_weight": torch.ones(8)}, path)
    with pytest.raises(Refused, match=f"value outside of .*{name}"):
        adapterkit.convert(path, to="diffusers", out=tmp_path / "out")
