"""Image and video models in GGUF: what gguf-py decodes of the merged file is base + LoRA."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit import Refused
from adapterkit.adapters.formats.library import described
from adapterkit.bases.gguf.header import read_gguf
from adapterkit.bases.gguf.mixes import image_types_of
from adapterkit.core.errors import Damaged, MultipleErrors
from adapterkit.core.inputs.sources import open_source
from tests.fuzz.images import write_kinds
from tests.merge.test_one_file import drawn
from tests.support import ggml
from tests.support.gguf_files import gguf, read_images, write_images
from tests.support.one_file import (
    DENOISER,
    FAMILIES,
    expected,
    factors_of,
    in_the_file,
    models_of,
    state_of,
    write_adapter,
)
from tests.support.usual import usual

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
Tensors = dict[str, Tensor]
OF_STABLE_DIFFUSION = ("sd15", "sd2", "sdxl", "sdxl_refiner")


@cache
def file_of(family: str) -> Mapping[str, Tensor]:
    """The tensors of a family's file, which nobody changes."""
    states = {part: state_of(model) for part, model in models_of(family).items()}
    return in_the_file(family, states)


def denoiser(tensors: Mapping[str, Tensor]) -> Tensors:
    """As ComfyUI-GGUF has them: the denoiser's alone, without its prefix."""
    start = DENOISER if any(key.startswith(DENOISER) for key in tensors) else "net."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def lora_of(family: str, folder: Path, every: int = 1) -> tuple[Path, Tensors]:
    """A LoRA of the denoiser, and the denoiser with it in float64."""
    own, whole = changed_of(family, every)
    return write_adapter(own, folder / "lora.safetensors"), whole


@cache
def changed_of(family: str, every: int) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensors]:
    own = {k: v for k, v in factors_of(family, every=every).items() if k.startswith(("tr", "unet"))}
    if family == "anima":
        own = factors_of(family, every=every)
    return own, denoiser(expected(family, own))


def raw(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    header = read_gguf(open_source(path), path.name)
    return {entry.name: data[entry.start : entry.stop] for entry in header.tensors}


def check_bytes(before: Path, after: Path, changed: set[str]) -> None:
    """The header, and what no adapter touches."""
    one, two = (read_gguf(open_source(path), path.name) for path in (before, after))
    assert one.raw == two.raw and before.stat().st_size == after.stat().st_size
    old, new = raw(before), raw(after)
    assert {name for name in old if old[name] != new[name]} == changed


@pytest.mark.parametrize("family", usual(FAMILIES, ("flux", "sdxl", "wan_i2v", "anima", "sd3")))
def test_every_layer_of_a_family(family: str, tmp_path: Path):
    """Kernels of video models have five axes; rows of 256 are those of Stable Diffusion."""
    of_rows, tensors = family in OF_STABLE_DIFFUSION, denoiser(file_of(family))
    base = write_images(tmp_path / "base.gguf", tensors, in_rows=of_rows)
    reader = gguf.GGUFReader(base)
    assert of_rows == any("orig_shape" in name for name in reader.fields)
    adapter, right = lora_of(family, tmp_path)
    adapterkit.merge(base, [adapter], out=tmp_path / "out.gguf", verify=True)
    before, after = read_images(base), read_images(tmp_path / "out.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for key, value in right.items():
        near = 2e-3 if types[key] == "F16" else 1e-6
        torch.testing.assert_close(after[key], value.float(), rtol=near, atol=near, msg=key)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    check_bytes(base, tmp_path / "out.gguf", changed)
    assert len(changed) >= len(factors_of(family)) / 5


@pytest.mark.parametrize("kind", usual(sorted(ggml.TYPES), ("Q8_0", "Q4_K")))
def test_blocks_keep_their_type(kind: str, tmp_path: Path):
    """As near to base + LoRA as ggml's own encoder of that type."""
    tensors = denoiser(file_of("sdxl"))
    base = write_images(tmp_path / "base.gguf", tensors, kind, arch="sdxl", in_rows=True)
    blocks = {t.name for t in gguf.GGUFReader(base).tensors if t.tensor_type.name == kind}
    assert len(blocks) > 30
    adapter, whole = lora_of("sdxl", tmp_path)
    out = tmp_path / "out.gguf"
    adapterkit.merge(base, [adapter], out=out, verify=True)
    before, after, changed = read_images(base), read_images(out), set[str]()
    errors = torch.zeros(2).double()
    for name, value in before.items():
        exact = value.double() + whole[name] - tensors[name]
        if torch.equal(whole[name], tensors[name].double()):
            assert torch.equal(value, after[name])
            continue
        changed.add(name)
        if name in blocks:
            rows = exact.float().reshape(-1, 256)
            theirs = ggml.dequantize(kind, ggml.quantize(kind, rows)).reshape(exact.shape)
            errors += torch.stack([(one - exact).square().sum() for one in (after[name], theirs)])
    assert errors[0] <= 1.001 * errors[1]
    check_bytes(base, out, changed)
    adapterkit.verify(out, base=base, adapters=[adapter])


@pytest.mark.parametrize(("kind", "near"), [("F32", 1e-4), ("Q8_0", 0.02)])
def test_the_reader_of_diffusers(kind: str, near: float, tmp_path: Path):
    """Its model of the merged file computes what it computes with the LoRA."""
    how = dict(models_of("wan_t2v")["transformer"].config) | {"attention_head_dim": 32}
    torch.manual_seed(0)
    model = WanTransformer3DModel.from_config(how | {"num_attention_heads": 2}).eval()
    model.save_config(tmp_path / "config")
    tensors = denoiser(in_the_file("wan_t2v", {"transformer": state_of(model)}))
    table = re.compile(r"(^|\.)scale_shift_table$")
    named = lambda key: table.sub(r"\1modulation", key if "." in key else f"head.{key}")
    tensors = {named(key): value for key, value in tensors.items()}
    base = write_images(tmp_path / "base.gguf", tensors, kind, arch="wan")
    assert kind in {t.tensor_type.name for t in gguf.GGUFReader(base).tensors if len(t.shape) == 2}
    lora: Tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "attn" in name:
            own = f"transformer.{name}"
            lora[f"{own}.lora_A.weight"] = drawn(2, layer.in_features, seed=len(lora))
            lora[f"{own}.lora_B.weight"] = drawn(layer.out_features, 2, seed=len(lora))
    save_file(lora, tmp_path / "lora.safetensors")
    adapterkit.merge(base, [tmp_path / "lora.safetensors"], out=tmp_path / "out.gguf")

    def read(path: Path) -> WanTransformer3DModel:
        return WanTransformer3DModel.from_single_file(
            str(path),
            config=str(tmp_path / "config"),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        ).eval()

    ours, theirs = read(tmp_path / "out.gguf"), read(base)
    theirs.load_lora_adapter(lora, prefix="transformer")
    inputs = drawn(1, how["in_channels"], 1, 4, 4, seed=1), torch.tensor([3])
    words = drawn(1, 3, how["text_dim"], seed=2)
    with torch.no_grad():
        first, second, plain = (one(*inputs, words).sample for one in (ours, theirs, read(base)))
    assert (first - second).norm() < near * (second - plain).norm()


def test_every_dialect_gives_the_same_bytes(tmp_path: Path):
    base = write_images(tmp_path / "base.gguf", denoiser(file_of("flux")))
    factors = {k: v for k, v in factors_of("flux").items() if "attn" in k and "single" not in k}
    lora, hashes = write_adapter(factors, tmp_path / "lora.safetensors"), {}
    for name, form in described().items():
        adapter = tmp_path / f"{name}{'.safetensors' * (form.layout == 'keys')}"
        try:
            adapterkit.convert(lora, to=name, out=adapter, architecture="flux")
        except Refused:
            continue
        out = tmp_path / "out.gguf"
        adapterkit.merge(base, [adapter], out=out, overwrite=True)
        hashes[name] = hashlib.sha256(out.read_bytes()).hexdigest()
    assert len(hashes) >= 10 and len({*hashes.values()}) == 1, hashes


def test_a_file_of_stable_diffusion_cpp(tmp_path: Path):
    """All parts under their prefixes, no metadata at all."""
    tensors = file_of("sdxl")
    base = write_images(tmp_path / "base.gguf", tensors, metadata=False)
    factors = factors_of("sdxl", every=3)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    adapterkit.merge(base, {adapter: 0.5}, out=tmp_path / "out.gguf", verify=True)
    after = read_images(tmp_path / "out.gguf")
    for key, value in expected("sdxl", factors, 0.5).items():
        torch.testing.assert_close(after[key], value.float(), rtol=2e-3, atol=2e-3, msg=key)
    found = adapterkit.inspect(base)["architecture"]
    parts = ["unet", "text_encoder", "text_encoder_2"]
    assert found == {"classes": parts, "model_type": "sdxl"}


def test_other_kinds_of_deltas_and_blocks(tmp_path: Path):
    """In a reshaped kernel and a matrix, and with the weights of blocks."""
    base = write_images(tmp_path / "base.gguf", denoiser(file_of("sdxl")), in_rows=True)
    shape = tuple(file_of("sdxl")[f"{DENOISER}input_blocks.7.0.out_layers.3.weight"].shape)
    name = "down_blocks.2.resnets.0.conv2"
    diff = drawn(*shape, seed=1)
    adapter = write_kinds(tmp_path / "diff.safetensors", {name: {"diff": diff}})
    adapterkit.merge(base, {adapter: 0.5}, out=tmp_path / "out.gguf", verify=True)
    before, after = read_images(base), read_images(tmp_path / "out.gguf")
    key = "input_blocks.7.0.out_layers.3.weight"
    torch.testing.assert_close(after.pop(key), before.pop(key) + 0.5 * diff)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    lora, whole = lora_of("sdxl", tmp_path)
    lists = ",".join(["1"] * 8 + ["0"] * 4)
    adapterkit.merge(base, [lora], out=tmp_path / "lbw.gguf", lbw=[lists])
    before, after = read_images(base), read_images(tmp_path / "lbw.gguf")
    off = "output_blocks.2.1.proj_in.weight"
    assert torch.equal(after[off], before[off])
    on = "middle_block.1.proj_in.weight"
    torch.testing.assert_close(after[on], whole[on].float(), rtol=1e-6, atol=1e-6)


def test_rounding_and_other_types(tmp_path: Path):
    base = write_images(tmp_path / "b.gguf", denoiser(file_of("sdxl")), "Q4_0", in_rows=True)
    adapter, _ = lora_of("sdxl", tmp_path, every=3)
    for number, how in enumerate([{"rounding": "stochastic"}, {"gguf_scales": "keep"}]):
        out = tmp_path / f"{number}.gguf"
        adapterkit.merge(base, [adapter], out=out, verify=True, **how)
    out = tmp_path / "q8.gguf"
    adapterkit.merge(base, [adapter], out=out, changed_type="q8_0", verify=True)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert {"Q4_0", "Q8_0"} <= kinds


# ---- other verbs -------------------------------------------------------------------------------


def test_difference_extraction_and_floats(tmp_path: Path):
    tensors = denoiser(file_of("sdxl"))
    base = write_images(tmp_path / "base.gguf", tensors, "Q8_0", arch="sdxl", in_rows=True)
    adapter, _ = lora_of("sdxl", tmp_path, every=4)
    out = tmp_path / "out.gguf"
    adapterkit.merge(base, [adapter], out=out, changed_type="f32")
    found = adapterkit.diff(base, out)
    assert found["totals"]["changed"] == len({row["name"] for row in found["changed"]}) > 10
    adapterkit.extract(base, out, rank=4, out=tmp_path / "peft")
    adapterkit.convert(tmp_path / "peft", to="kohya", base=base, out=tmp_path / "k.safetensors")
    again = tmp_path / "again.gguf"
    adapterkit.merge(base, [tmp_path / "k.safetensors"], out=again, changed_type="f32")
    after = read_images(out)
    for key, value in read_images(again).items():
        near = 4e-3 if tuple(value.shape)[-1] % 32 and value.numel() % 256 else 1e-4  # F16
        torch.testing.assert_close(value, after[key], rtol=near, atol=near, msg=key)
    adapterkit.dequantize(base, out=tmp_path / "floats.safetensors", dtype="fp32")
    floats, right = load_file(tmp_path / "floats.safetensors"), read_images(base)
    assert floats.keys() == right.keys()
    assert all(torch.equal(floats[key].float(), value) for key, value in right.items())
    adapterkit.merge(tmp_path / "floats.safetensors", [adapter], out=tmp_path / "m.safetensors")
    with pytest.raises(Refused, match=r"a name that ends in \.safetensors"):
        adapterkit.dequantize(base, out=tmp_path / "floats")


def test_merges_into_quantized_image_gguf_keep_kernels(tmp_path: Path):
    """Kernels and layers outside of the blocks stay as they are."""
    base = write_images(tmp_path / "b.gguf", denoiser(file_of("sdxl")), "F16", in_rows=True)
    adapterkit.quantize(base, to="q4_k_m", out=tmp_path / "q.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    old = {t.name: t.tensor_type.name for t in gguf.GGUFReader(base).tensors}
    changed = {name: kind for name, kind in types.items() if kind != old[name]}
    assert changed["input_blocks.7.1.transformer_blocks.0.attn2.to_q.weight"] == "Q4_K"
    assert changed["input_blocks.7.1.transformer_blocks.0.ff.net.2.weight"] == "Q6_K"
    assert not any(name.startswith(("time_embed", "label_emb", "out.")) for name in changed)
    adapter, _ = lora_of("sdxl", tmp_path)
    adapterkit.merge(tmp_path / "q.gguf", [adapter], out=tmp_path / "m.gguf", verify=True)


class _Entry:
    def __init__(self, name: str, width: int = 512):
        self.name, self.shape = name, (512, width)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [  # img_tensor_get_type of ComfyUI-GGUF's tools/lcpp.patch: to_v of two layers, qkv, w2, others
        ("q2_k", ("Q3_K", "Q3_K", "Q2_K", "Q2_K", "Q2_K")),
        ("q3_k_m", ("Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q3_K")),
        ("q3_k_l", ("Q5_K", "Q5_K", "Q4_K", "Q5_K", "Q3_K")),
        ("q4_k_s", ("Q5_K", "Q5_K", "Q4_K", "Q5_K", "Q4_K")),
        ("q4_k_m", ("Q6_K", "Q6_K", "Q5_K", "Q6_K", "Q4_K")),
        ("q5_k_m", ("Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q5_K")),
        ("q4_0", ("Q4_0", "Q4_0", "Q4_0", "Q4_1", "Q4_0")),
        ("q5_0", ("Q5_0", "Q5_0", "Q5_0", "Q5_1", "Q5_0")),
        ("q8_0", ("Q8_0",) * 5),
    ],
)
def test_types_of_each_mix(mix: str, expected: tuple[str, ...]):
    names = [f"blocks.{i}.attn.to_v.weight" for i in range(6)]
    others = [
        "layers.0.attention.qkv.weight",
        "layers.0.feed_forward.w2.weight",
        "blocks.0.x.weight",
    ]
    entries = [*map(_Entry, [*names, *others]), _Entry("txt_in.blocks.0.qkv.weight")]
    found = image_types_of([*entries, _Entry("blocks.1.x.weight", 96)], mix)
    own = [found[name] for name in (names[0], names[2], *others)]
    own[1] = found[names[2 if mix != "q4_k_s" else 3]]
    assert tuple(own) == expected and "txt_in.blocks.0.qkv.weight" not in found
    assert found["blocks.1.x.weight"] == (
        "F16" if mix.endswith(("k", "m", "s", "l")) else expected[-1]
    )


# ---- refusals ----------------------------------------------------------------------------------


def test_invalid_merges_into_image_gguf_are_refused(tmp_path: Path):
    tensors = denoiser(file_of("flux"))
    base = write_images(tmp_path / "base.gguf", tensors)
    adapter, _ = lora_of("flux", tmp_path, every=5)
    for how, text in [
        ({"out": tmp_path / "out.safetensors"}, r"ends in \.gguf"),
        ({"out": tmp_path / "o.gguf", "modelfile": True}, "--modelfile with an image model"),
        ({"out": tmp_path / "o.gguf", "dtype": "bf16"}, "--dtype with this base"),
    ]:
        with pytest.raises((Refused, MultipleErrors), match=text):
            adapterkit.merge(base, [adapter], **how)
    other = write_adapter(factors_of("wan_t2v", every=5), tmp_path / "wan.safetensors")
    with pytest.raises((Refused, MultipleErrors), match="not in flux"):
        adapterkit.merge(base, [other], out=tmp_path / "o.gguf")
    assert not (tmp_path / "o.gguf").exists()


def test_a_shape_of_another_size(tmp_path: Path):
    base = write_images(tmp_path / "base.gguf", denoiser(file_of("sdxl")), in_rows=True)
    data = base.read_bytes()
    at = data.index(b"orig_shape.input_blocks.7.0.out_layers.3.weight")
    at += len(b"orig_shape.input_blocks.7.0.out_layers.3.weight") + 4 + 4 + 8
    base.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    adapter, _ = lora_of("sdxl", tmp_path, every=9)
    with pytest.raises((Refused, Damaged, MultipleErrors), match="its metadata state"):
        adapterkit.merge(base, [adapter], out=tmp_path / "o.gguf")
