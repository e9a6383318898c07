"""ComfyUI's quantized one-file models: read by the published formulas, merged into, written."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.registry import written_formats
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels.quant.stochastic import Draws
from tests.support.comfy_files import (
    LINEAR,
    LOST,
    MAKERS,
    PREFIX,
    lora,
    plain_wan,
    said_of,
    weights,
    write,
)
from tests.support.formats import same
from tests.support.one_file import expected, factors_of, write_adapter, write_family
from tests.support.usual import usual

PARTS = ("weight", "weight_scale", "weight_scale_2")
KINDS = [*MAKERS, "cast", "cast-e5m2"]
SAID = [("fp8", "old"), ("fp8-e5m2", "old"), ("fp8", "header"), ("nvfp4", "header without prefix")]


def packed_of(path: Path) -> list[QuantizedWeight]:
    from adapterkit.core.inputs.base_door import read_checkpoint
    from adapterkit.core.inputs.sources import open_model

    return quantized_weights(decoded_view(read_checkpoint(open_model(path))).tensors)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("comfy")


@pytest.mark.parametrize(("kind", "said"), [*((kind, "beside") for kind in KINDS), *SAID])
def test_decoded_as_published(kind: str, said: str, tmp_path: Path) -> None:
    """Values of ComfyUI's formulas in float64; keys of the plain model, nothing that says
    quantized."""
    base = write(kind, tmp_path / "base.safetensors", said)
    exact, half = tmp_path / "out32.safetensors", tmp_path / "out16.safetensors"
    adapterkit.dequantize(base, out=exact, dtype="fp32")
    adapterkit.dequantize(base, out=half)
    after, rounded, plain = load_file(exact), load_file(half), plain_wan()
    assert set(after) == set(rounded) == set(plain)
    for key, value in weights(load_file(base)).items():
        assert torch.allclose(after[key].double(), value, rtol=1e-6, atol=0), key
        if key.removesuffix(".weight").removeprefix(PREFIX) in LINEAR:
            assert rounded[key].dtype == torch.bfloat16
            assert same(after[key].bfloat16(), rounded[key])
            lost = (value - plain[key].double()).norm() / plain[key].double().norm()
            assert float(lost) < LOST[kind]
    assert metadata_of(half) == {"modelspec.title": "a model"}


@pytest.mark.parametrize("kind", KINDS)
def test_all_bytes_come_back(kind: str, tmp_path: Path) -> None:
    """Of any codes and scales that are finite, with the scales that are stored."""
    base = write(kind, tmp_path / "base.safetensors")
    stored, generator = load_file(base), torch.Generator().manual_seed(0)
    for spec in packed_of(base):
        parts = {part.key: stored[part.key] for part in spec.parts}
        codes = parts[spec.parts[0].key]
        drawn = torch.randint(256, codes.shape, generator=generator).byte().view(codes.dtype)
        if codes.dtype.is_floating_point:
            drawn = torch.where(drawn.float().isfinite(), drawn.float(), 0.0).to(codes.dtype)
        parts[spec.parts[0].key] = drawn
        if kind in ("nvfp4", "mxfp8"):  # what pads the tiles too
            parts[spec.parts[1].key].view(torch.uint8)[-1] = 7
        again = spec.encode_keeping_scales(parts, spec.decode(parts), Draws(3))
        assert list(again) == list(parts)
        assert all(same(again[key], parts[key]) for key in parts), spec.key
        rounder = spec.column_rounder(parts)
        matrix = spec.decode(parts).reshape(spec.shape[0], -1)
        column = torch.stack([rounder(matrix[:, i].clone(), i) for i in range(matrix.shape[1])], 1)
        assert torch.equal(column, matrix)


def test_values_of_its_own_files_come_back_to_nearest(home: Path) -> None:
    for kind in KINDS:
        base = write(kind, home / f"back-{kind}.safetensors")
        stored = load_file(base)
        for spec in packed_of(base):
            parts = {part.key: stored[part.key] for part in spec.parts}
            value = spec.decode(parts)
            again = spec.decode(spec.encode_keeping_scales(parts, value))
            assert torch.allclose(again, value, rtol=1e-6, atol=0), (kind, spec.key)


# what draws knows no format: tests/quantized/test_rounding.py has the others
@pytest.mark.parametrize(
    ("kind", "rounding"),
    usual(
        itertools.product(KINDS, ["nearest", "stochastic"]),
        lambda row: row[1] == "nearest" or row[0] in ("nvfp4", "fp8"),
    ),
)
def test_merges_keep_the_file_s_format_and_precision(
    kind: str, rounding: str, home: Path, tmp_path: Path
) -> None:
    """W + b @ a within what the format loses, in the format of the file, which stays the same
    otherwise."""
    base = write(kind, home / f"{kind}.safetensors")
    adapter, deltas = lora(home / f"{kind}-lora.safetensors")
    out = tmp_path / "out.safetensors"
    receipt = adapterkit.merge(base, [adapter], out=out, rounding=rounding, verify=True)
    before, after = load_file(base), load_file(out)
    assert {key: (v.dtype, v.shape) for key, v in before.items()} == {
        key: (v.dtype, v.shape) for key, v in after.items()
    }
    exact, written = weights(before), weights(after)
    lost = LOST[kind] * (2 if rounding == "stochastic" else 1)
    for key, delta in deltas.items():
        right = exact[key] + delta
        assert float((written[key] - right).norm() / right.norm()) < lost, key
    for key, value in before.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in PARTS or f"{module}.weight" not in deltas:
            assert same(value, after[key]), key
    assert metadata_of(out) == metadata_of(base)
    assert "survived" in json.dumps(receipt.data)


def test_the_order_of_the_file_stays(home: Path, tmp_path: Path) -> None:
    """A file that another library wrote, its tensors in another order: the header is the same."""
    base = write("fp8", home / "fp8.safetensors")
    adapter, _ = lora(home / "fp8-lora.safetensors")
    size = int.from_bytes(base.read_bytes()[:8], "little")
    header, data = json.loads(base.read_bytes()[8 : 8 + size]), base.read_bytes()[8 + size :]
    turned, blocks, at = {"__metadata__": header.pop("__metadata__")}, [], 0
    for key, entry in sorted(
        header.items(), key=lambda item: (item[1]["dtype"] == "F8_E4M3", item)
    ):
        start, stop = entry["data_offsets"]
        turned[key] = entry | {"data_offsets": [at, at + stop - start]}
        blocks.append(data[start:stop])
        at += stop - start
    text = json.dumps(turned).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "turned.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(blocks)
    )
    for name, file in (("one", base), ("other", tmp_path / "turned.safetensors")):
        adapterkit.merge(file, [adapter], out=tmp_path / f"{name}.safetensors", verify=True)
    written = (tmp_path / "other.safetensors").read_bytes()
    assert written[: 8 + len(text)] == len(text).to_bytes(8, "little") + text
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert all(same(value, theirs[key]) for key, value in ours.items())
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.extract(base, tmp_path / "one.safetensors", rank=2, out=tmp_path / "no")
    command = f"adapterkit dequantize {shlex.quote(str(base))} --out floats.safetensors"
    assert str(caught.value).splitlines()[-1] == f"  {command}"


@pytest.mark.parametrize("said", ["old", "header", "header without prefix"])
def test_merges_do_not_depend_on_how_the_file_names_its_format(
    said: str, home: Path, tmp_path: Path
) -> None:
    """The same values as of a file that says it beside each layer."""
    adapter, deltas = lora(home / "said-lora.safetensors")
    files = {}
    for way in ("beside", said):
        base = write("fp8", tmp_path / f"{way}.safetensors", way)
        files[way] = tmp_path / f"{way}-out.safetensors"
        adapterkit.merge(base, [adapter], out=files[way])
        assert metadata_of(files[way]) == metadata_of(base)
    first, second = (weights(load_file(path)) for path in files.values())
    assert all(torch.equal(first[key], second[key]) for key in deltas)


@pytest.mark.parametrize(("kind", "said"), [("nvfp4", "beside"), ("fp8", "old"), ("cast", "")])
def test_merged_to_16_bits(kind: str, said: str, home: Path, tmp_path: Path) -> None:
    base = write(kind, tmp_path / "base.safetensors", said)
    adapter, deltas = lora(home / "floats-lora.safetensors")
    out = tmp_path / "out.safetensors"
    adapterkit.merge(base, [adapter], out=out, dequantize=True, verify=True)
    after, exact = load_file(out), weights(load_file(base))
    assert set(after) == set(plain_wan())
    for key, delta in deltas.items():
        right = exact[key] + delta
        assert after[key].dtype == torch.bfloat16
        assert float((after[key].double() - right).norm() / right.norm()) < 2e-3


def test_compared_as_it_decodes(home: Path, tmp_path: Path) -> None:
    """With a file of floats; the difference is what the format loses."""
    packed = write("nvfp4", tmp_path / "packed.safetensors")
    report = adapterkit.diff(plain_file(tmp_path / "plain.safetensors"), packed)
    assert report["totals"]["compared"] == report["totals"]["identical"] + len(LINEAR)
    assert not report["totals"]["added"] and 0.05 < report["change"]["relative"] < LOST["nvfp4"]


def test_compensated_merges_have_nearer_outputs(home: Path, tmp_path: Path) -> None:
    """With covariances by the names of the model's modules or of the file's: outputs are nearer."""
    base = write("nvfp4", tmp_path / "base.safetensors")
    adapter, deltas = lora(home / "compensated-lora.safetensors")
    generator, covariances = torch.Generator().manual_seed(2), {}
    for module, (_, width) in LINEAR.items():
        x = torch.randn(3 * width, width, generator=generator) @ torch.randn(
            width, width, generator=generator
        )
        covariances[f"{PREFIX}{module}"] = x.T @ x / len(x)
    stats = tmp_path / "stats.safetensors"
    save_file({f"{name}.covariance": value for name, value in covariances.items()}, stats)
    errors = {}
    for rounding, more in (("nearest", {}), ("compensated", {"stats": stats})):
        out = tmp_path / f"{rounding}.safetensors"
        adapterkit.merge(base, [adapter], out=out, rounding=rounding, verify=True, **more)
        exact, written = weights(load_file(base)), weights(load_file(out))
        for key, delta in deltas.items():
            change = written[key] - exact[key] - delta
            c = covariances[key.removesuffix(".weight")].double()
            errors.setdefault(key, []).append(float((change @ c * change).sum()))
    assert all(compensated < 0.7 * nearest for nearest, compensated in errors.values()), errors


def test_floats_of_a_file_in_fp16_are_fp16(tmp_path: Path) -> None:
    base = write("fp8", tmp_path / "base.safetensors")
    tensors = load_file(base)
    halves = {k: v.half() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
    save_file(halves, base)
    adapterkit.dequantize(base, out=tmp_path / "out.safetensors")
    assert {value.dtype for value in load_file(tmp_path / "out.safetensors").values()} == {
        torch.float16
    }


def plain_file(path: Path) -> Path:
    save_file(plain_wan(), path, {"modelspec.title": "a model"})
    return path


@pytest.mark.parametrize("to", written_formats("image_targets"))
def test_quantized_files_have_what_comfyui_reads(to: str, home: Path, tmp_path: Path) -> None:
    """What ComfyUI's loader asks for: `comfy_quant` beside each layer, and the tensors of its
    format; values as near as the published formulas give them; a base of merges again."""
    kind = to.removeprefix("comfy-").replace("int8", "int8-rows")
    base, out = plain_file(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    receipt = adapterkit.quantize(base, to=to, out=out)
    right, after = load_file(write(kind, tmp_path / "right.safetensors")), load_file(out)
    shapes = lambda tensors: {key: (v.dtype, v.shape) for key, v in tensors.items()}
    assert shapes(after) == shapes(right)
    assert metadata_of(out) == metadata_of(base)
    ours, theirs = weights(after), weights(right)
    for key, plain in weights(load_file(base)).items():
        module = key.removeprefix(PREFIX).removesuffix(".weight")
        if module not in LINEAR:
            assert torch.equal(ours[key], plain)
            continue
        said = bytes(after[key.removesuffix("weight") + "comfy_quant"].tolist())
        assert json.loads(said) == {"format": MAKERS[kind][0]}
        error = float((ours[key] - plain).norm() / plain.norm())
        assert error <= float((theirs[key] - plain).norm() / plain.norm()) * 1.001
        assert receipt.data["parameters"][key]["error"] == pytest.approx(error, rel=1e-4)
    adapter, deltas = lora(home / "quantized-lora.safetensors")
    adapterkit.merge(out, [adapter], out=tmp_path / "merged.safetensors", verify=True)
    merged = weights(load_file(tmp_path / "merged.safetensors"))
    for key, delta in deltas.items():
        assert float((merged[key] - ours[key] - delta).norm() / ours[key].norm()) < LOST[kind]


def test_skipped_layers_and_odd_sizes_are_not_quantized(tmp_path: Path) -> None:
    """Layers that --skip matches, and those whose sizes the format would pad."""
    tensors = plain_wan() | {f"{PREFIX}blocks.0.ffn.0.weight": torch.randn(90, 64).bfloat16()}
    tensors[f"{PREFIX}blocks.0.ffn.0.bias"] = torch.zeros(90).bfloat16()
    save_file(tensors, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    options = {"to": "comfy-nvfp4", "skip": ".*cross_attn.*"}
    receipt = adapterkit.quantize(tmp_path / "base.safetensors", out=out, **options)
    left = {key for key in load_file(out) if key.endswith("comfy_quant")}
    names = {name for name in LINEAR if "cross_attn" not in name and name != "blocks.0.ffn.0"}
    assert left == {f"{PREFIX}{name}.comfy_quant" for name in names}
    assert len(receipt.data["left_out"]) == 5
    for wrong in ({"to": "nf4"}, {"to": "comfy-fp8", "block_size": 64}, {"to": "q8_0"}):
        with pytest.raises(AdapterkitError, match="with this base"):
            adapterkit.quantize(tmp_path / "base.safetensors", out=tmp_path / "no.x", **wrong)
    with pytest.raises(AdapterkitError, match="is quantized"):
        adapterkit.quantize(out, to="comfy-fp8", out=tmp_path / "no.safetensors")


def test_blocks_of_a_u_net(home: Path, tmp_path: Path) -> None:
    """Whose numbers are in tables: its linear layers with 16 values a row, none of the encoders."""
    base, out = write_family("sdxl", home / "sdxl.safetensors"), tmp_path / "out.safetensors"
    adapterkit.quantize(base, to="comfy-fp8", out=out)
    left = {key.removesuffix(".comfy_quant") for key in load_file(out) if key.endswith("_quant")}
    assert f"{PREFIX}middle_block.1.transformer_blocks.1.ff.net.2" in left
    starts = tuple(f"{PREFIX}{name}" for name in ("input_blocks.", "middle_", "output_blocks."))
    assert all(name.startswith(starts) for name in left)


def test_casts_of_convolutions_and_vectors(home: Path, tmp_path: Path) -> None:
    """All of SDXL in FP8, as ComfyUI saves it: kernels, biases and norms too."""
    plain = load_file(write_family("sdxl", home / "sdxl.safetensors"))
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    casts = {key: value.to(E4M3) for key, value in plain.items()}
    save_file(casts, base)
    factors = factors_of("sdxl", every=7)
    adapter = write_adapter(factors, tmp_path / "lora.safetensors")
    adapterkit.merge(base, [adapter], out=out, verify=True)
    after, right = load_file(out), expected("sdxl", factors)
    changed = [key for key in casts if not same(casts[key], after[key])]
    assert any(casts[key].dim() == 4 for key in changed) and len(changed) > 40
    for key, value in right.items():
        exact = casts[key].double() + value - plain[key].double()
        assert after[key].dtype == E4M3
        assert float((after[key].double() - exact).norm()) <= 0.04 * float(exact.norm()), key


def _change(path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    tensors = load_file(path) | {PREFIX + key: value for key, value in change.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata_of(path))
    return path


E4M3 = torch.float8_e4m3fn
Q = "blocks.0.self_attn.q."
REFUSED = {
    "no scale": ("fp8", {Q + "weight_scale": None}, "without .weight_scale"),
    "scales of columns": ("fp8", {Q + "weight_scale": torch.ones(64)}, "one scale"),
    "NaN scale": ("fp8", {Q + "weight_scale": torch.tensor(float("nan"))}, "NaN or infinite"),
    "not in tiles": ("nvfp4", {Q + "weight_scale": torch.ones(64, 4).to(E4M3)}, "in tiles"),
    "factor 0": ("nvfp4", {Q + "weight_scale_2": torch.tensor(0.0)}, "not above 0"),
    "smoothed": ("nvfp4", {Q + "pre_quant_scale": torch.ones(64)}, "scaled for its inputs"),
    "padded": ("mxfp8", {Q + "bias": torch.zeros(60)}, "60 in its bias"),
    "other codes": ("int8", {Q + "weight": torch.ones(64, 64)}, "I8 codes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_quantized_files_are_refused(name: str, home: Path, tmp_path: Path) -> None:
    kind, change, says = REFUSED[name]
    base = _change(write(kind, tmp_path / "base.safetensors"), change)
    adapter, _ = lora(home / "refused-lora.safetensors")
    with pytest.raises(AdapterkitError, match=says):
        adapterkit.merge(base, [adapter], out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "said",
    [{"format": "convrot_w4a4"}, {"format": "int8_tensorwise", "convrot": True}, {}, {"format": 3}],
)
def test_formats_that_are_not_known(said: dict, home: Path, tmp_path: Path) -> None:
    base = write("int8", tmp_path / "base.safetensors")
    _change(base, {Q + "comfy_quant": said_of(said)})
    adapter, _ = lora(home / "unknown-lora.safetensors")
    with pytest.raises(AdapterkitError, match="use the file in 16 bits"):
        adapterkit.merge(base, [adapter], out=tmp_path / "out.safetensors")


def test_codes_without_scales_of_a_transformers_model(tmp_path: Path) -> None:
    save_file(
        {"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(AdapterkitError, match="quantized"):
        adapterkit.dequantize(tmp_path, out=tmp_path / "out")
