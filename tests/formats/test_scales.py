"""Scales at the ends of what a file can say."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.formats.modules.tensors import gathered, joined, scaled, stored
from adapterkit.adapters.formats.task import ConvertedTensor, ConvertedTensors
from adapterkit.core.adapter.adapter_config import as_int
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.dtypes import name_of
from adapterkit.core.errors import Unrecoverable
from tests.support.adapter_samples import contents_of, deltas

FLUX = "transformer_blocks.0.attn.to_out.0"
LLAMA = "model.layers.0.self_attn.v_proj"


def write_peft(folder, alpha, module=FLUX, dtype=torch.float32):
    folder.mkdir()
    prefix = f"base_model.model.{module}"
    factors = {
        f"{prefix}.lora_A.weight": torch.ones(2, 32, dtype=dtype),
        f"{prefix}.lora_B.weight": torch.ones(32, 2, dtype=dtype),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_scale_of_zero_is_in_b(tmp_path):
    """Trainers take an alpha of 0 for the rank."""
    source, out = write_peft(tmp_path / "source", 0), tmp_path / "out.safetensors"
    adapterkit.convert(source, to="kohya", architecture="flux", out=out)
    written = load_file(out)
    (alpha,) = (value for key, value in written.items() if key.endswith(".alpha"))
    (b,) = (value for key, value in written.items() if key.endswith(".lora_up.weight"))
    assert alpha == 2 and not b.any()


@pytest.mark.parametrize(
    "alpha, kind", [(1e300, float), (2.0**60, float), (7.0, int), (0.5, float)]
)
def test_numbers_of_a_config(alpha, kind):
    """An integer of 300 digits is none that a strict reader takes."""
    assert type(as_int(alpha)) is kind and as_int(alpha) == alpha


@pytest.mark.parametrize("alpha", [1e-60, 1e60])
@pytest.mark.parametrize("to, module", [("kohya", FLUX), ("bfl", FLUX), ("gguf", LLAMA)])
def test_a_scale_that_no_float32_holds_is_refused(to, module, alpha, tmp_path):
    """As an alpha of 0 readers would take the rank for it, or 1; in b it is 0, or infinite."""
    source = write_peft(tmp_path / "source", alpha, module)
    architecture = "flux" if module == FLUX else "llama"
    with pytest.raises(Unrecoverable, match="too small for float32|not finite in float32"):
        adapterkit.convert(source, to=to, architecture=architecture, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_config_holds_any_scale(tmp_path):
    source = write_peft(tmp_path / "source", 1e-60, LLAMA)
    adapterkit.convert(source, to="mlx", out=tmp_path / "out")
    (before,), (after,) = (deltas(contents_of(tmp_path / n)).values() for n in ("source", "out"))
    assert before.difference(after) < 1e-12


def test_a_subnormal_alpha_is_in_b(tmp_path):
    """Its few bits would change the delta by 1e-4; what is in b is as small, and kept as well."""
    source, out = write_peft(tmp_path / "source", 3e-38 / 8), tmp_path / "out.safetensors"
    adapterkit.convert(source, to="kohya", architecture="flux", out=out)
    written = load_file(out)
    (alpha,) = (value for key, value in written.items() if key.endswith(".alpha"))
    (b,) = (value for key, value in written.items() if key.endswith(".lora_up.weight"))
    assert alpha == 2 and torch.allclose(b.double(), torch.tensor(3e-38 / 16).double(), rtol=1e-5)


def test_a_scale_in_b_that_float16_loses_is_refused(tmp_path):
    source = write_peft(tmp_path / "source", 1e-6, dtype=torch.float16)
    with pytest.raises(Unrecoverable, match="too small for float16") as caught:
        adapterkit.convert(source, to="bfl", architecture="flux", out=tmp_path / "out")
    assert "--dtype fp32" in caught.value.hint
    adapterkit.convert(source, to="bfl", architecture="flux", out=tmp_path / "out", dtype="fp32")
    (before,), (after,) = (
        deltas(contents_of(tmp_path / name, **more)).values()
        for name, more in (("source", {}), ("out", {"architecture": "flux"}))
    )
    assert before.difference(after) < 1e-6


class Values:
    """A reader of tensors by their specs."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def spec(self, key):
        tensor = self.tensors[key]
        return TensorSpec(key, name_of(tensor.dtype), tuple(tensor.shape), "file", 0, 0)

    def tensor(self, spec):
        return self.tensors[spec.key]

    def view(self, dtype):
        return self


def converted(key, expression, dtype):
    return ConvertedTensors(key, (ConvertedTensor(key, expression, dtype),))


def test_a_factor_that_vanishes_among_large_ones_is_refused():
    """The loss of the whole, 1e-9, does not show it."""
    reader = Values(q=torch.ones(4, 2).half(), v=torch.ones(4, 2).half())
    q, v = stored(reader.spec("q")), scaled(stored(reader.spec("v")), 1e-9)
    task = converted("qv", joined([q, v]), "F16")
    with pytest.raises(Unrecoverable, match="too small for float16"):
        task.compute(reader)
    result = converted("qv", joined([q, v]), "F32").compute(reader)
    assert torch.equal(result.tensors["qv"][4:].double(), torch.full((4, 2), 1e-9).float().double())


def test_rows_that_are_taken_are_those_that_count():
    """Others of the same stored tensor may be too small."""
    b = torch.cat([torch.ones(2, 2), torch.full((2, 2), 1e-9)])
    reader = Values(b=b)
    half = scaled(stored(reader.spec("b")), 0.5)
    rows = converted("b", gathered(half, range(2)), "F16")
    assert torch.equal(rows.compute(reader).tensors["b"], torch.full((2, 2), 0.5).half())
    with pytest.raises(Unrecoverable):
        converted("b", gathered(half, range(2, 4)), "F16").compute(reader)


def kohya(path, modules, **metadata):
    """A file of kohya's for Flux.1: module -> (rank, alpha)."""
    tensors = {}
    for module, (rank, alpha) in modules.items():
        key = f"lora_unet_double_blocks_0_{module}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, 24).bfloat16()
        tensors[f"{key}.lora_up.weight"] = torch.randn(24, rank).bfloat16()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_base_model_version": "flux1", **metadata})
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("modules", [
    {"img_attn_proj": (4, 2.0), "txt_attn_proj": (2, 1.0)},  # conv_dim, or resized
    {"img_attn_proj": (12, 6.0)},  # split_qkv: the file has three times the rank
])  # fmt: skip
def test_kohya_s_numbers_stay_within_its_format(modules, tmp_path):
    """Into it they are those of the file, or what sd-scripts writes of several."""
    numbers = {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    source = kohya(tmp_path / "in.safetensors", modules, **numbers)
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    adapterkit.convert(source, to="kohya", out=again, hash="none")
    assert metadata_of(again) == {**metadata_of(source), "ss_network_module": "networks.lora_flux"}
    adapterkit.convert(source, to="lycoris", out=other, hash="none")
    several = len(modules) > 1
    want = ("Dynamic", "Dynamic") if several else ("12", "6.0")
    assert tuple(metadata_of(other)[name] for name in numbers) == want
    adapterkit.convert(source, to="kohya", out=again, rank=1, hash="none", overwrite=True)
    assert metadata_of(again)["ss_network_dim"] == "1"


@pytest.mark.parametrize(("alpha", "noted"), [(2.0, True), (6.0, False), (1.5, False)])
def test_a_scale_that_is_rounded_into_factors_is_noted(alpha, noted, tmp_path):
    """2/3 in bfloat16, not 2 or 1/2, nor where more bits are asked for."""
    source = kohya(tmp_path / "in.safetensors", {"img_attn_proj": (3, alpha)})
    for dtype, expected in ((None, noted), ("fp32", False)):
        out = tmp_path / f"{dtype}.safetensors"
        receipt = adapterkit.convert(source, to="comfyui", out=out, dtype=dtype, hash="none")
        notes = [note for note in receipt.data["notes"] if "rounded to BF16" in note]
        assert len(notes) == expected, receipt.data["notes"]
    up = next(v for k, v in load_file(source).items() if "lora_up" in k).double() * alpha / 3
    b = next(v for k, v in load_file(tmp_path / "None.safetensors").items() if "lora_B" in k)
    off = ((b.double() - up).abs() / up.abs()).max()
    assert (0.001 < off <= 0.0039) if noted else off == 0  # 0.0039 is what the note says
