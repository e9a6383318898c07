"""`merge --verify` on quantized bases: every changed weight is recomputed, in its format or as
floats; what is wrong is found."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Damaged
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.tasks import rows as task_rows
from adapterkit.core.verify import row_checks as recompute
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels import rows
from tests.support import oracle, quantized_llama
from tests.support.quantized_llama import FEW, FORMS, few
from tests.support.usual import usual

OURS = {
    "nf4": {"to": "nf4"},
    "fp4": {"to": "fp4", "block_size": 128},
    "double": {"to": "nf4", "double_quant": True},
    "int8-bnb": {"to": "int8"},
}
DRAWN = ("int8-zero", "nvfp4", "int8-bnb")  # of the forms to which is rounded at random
NAMES = [*(name for name, form in FORMS.items() if form.writable), *OURS]
SIZES = {"hidden_size": 128, "intermediate_size": 192}
TOUCHED = ["q_proj", "down_proj"]


@pytest.fixture
def model(cached_folder: Callable[..., Path]) -> Callable[[str], tuple[Path, Path]]:
    """A tiny Llama in a format, and a LoRA on some of its layers."""

    def make(name: str) -> tuple[Path, Path]:
        if name in FORMS:
            base = cached_folder(
                f"formats-{name}", lambda folder: quantized_llama.base(FORMS[name], folder)
            )
            train = lambda folder: oracle.train(
                quantized_llama.llama(), folder, size=0.3, target_modules=TOUCHED
            )
            return base, cached_folder("verified-lora-forged", train)
        plain = cached_folder(
            "verified-plain", lambda folder: oracle.save_base(oracle.llama(**SIZES), folder, "bf16")
        )
        base = (
            cached_folder(
                f"verified-{name}",
                lambda folder: adapterkit.quantize(plain, out=folder / "q", **OURS[name]),
            )
            / "q"
        )
        return base, cached_folder(
            "verified-lora",
            lambda folder: oracle.train(oracle.llama(**SIZES), folder, target_modules=TOUCHED),
        )

    return make


@pytest.mark.parametrize(
    "name, rounding",
    usual(
        [*((n, "nearest") for n in NAMES), *((n, "stochastic") for n in sorted(FEW))],
        # rounding draws before a form packs: each with some
        lambda row: row[0] in (FEW if row[1] == "nearest" else DRAWN),
    ),
)
def test_every_changed_weight_is_recomputed(
    model, name: str, rounding: str, tmp_path: Path
) -> None:
    base, lora = model(name)
    kept = oracle.merge(base, lora, out=tmp_path / "kept", rounding=rounding, verify=True)
    assert kept.data["verified"]["tensors"] == 4 and kept.data["verified"]["rows"] > 4
    floats = oracle.merge(
        base, lora, out=tmp_path / "floats", rounding=rounding, verify=True, dequantize=True
    )
    assert floats.data["verified"]["tensors"] == 14
    assert floats.data["verified"]["rows"] == 3 * 14
    again = adapterkit.verify(tmp_path / "kept", base=base, adapters=[lora])
    assert again["tensors"] == 4 and again["rows"] == kept.data["verified"]["rows"]


@pytest.mark.parametrize(
    ("name", "rounding"),
    usual(
        itertools.product(NAMES, ["nearest", "stochastic"]),
        lambda row: row[0] in (FEW if row[1] == "nearest" else DRAWN),
    ),
)
def test_weights_larger_than_a_slice_are_verified(
    model, name: str, rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights larger than what is recomputed at once, cut otherwise than they were written."""
    base, lora = model(name)
    monkeypatch.setattr(recompute, "CHUNK", 1 << 9)
    monkeypatch.setattr(task_rows, "SLICE", 1 << 11)
    oracle.merge(base, lora, out=tmp_path / "kept", rounding=rounding, verify=True)
    oracle.merge(
        base, lora, out=tmp_path / "floats", rounding=rounding, verify=True, dequantize=True
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", few(NAMES))
def test_arithmetic_that_is_wrong_is_found(
    model, name: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = model(name)
    right = rows.add_low_rank
    monkeypatch.setattr(rows, "add_low_rank", lambda w, left, right_: right(w, left * 1.02, right_))
    oracle.merge(base, lora, out=tmp_path / "out", dequantize=not kept)
    monkeypatch.undo()
    adapterkit.verify(tmp_path / "out")
    with pytest.raises(Damaged, match=r"row \d+, column \d+"):
        adapterkit.verify(tmp_path / "out", base=base, adapters=[lora])


@pytest.mark.parametrize("name", few(NAMES))
def test_encoding_that_is_wrong_is_found(
    model, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value in a hundred is a step away from its nearest code."""
    base, lora = model(name)
    kind = type(quantized_weights(decoded_view(open_checkpoint(open_source(str(base)))).tensors)[0])
    right = kind.encode_keeping_scales

    def wrong(self, stored, weight, draws=None):
        weight = weight.clone()
        weight.view(-1)[5::101] += weight.abs().max() / 5
        return right(self, stored, weight, draws)

    monkeypatch.setattr(kind, "encode_keeping_scales", wrong)
    oracle.merge(base, lora, out=tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(Damaged, match=r"row \d+, column \d+"):
        adapterkit.verify(tmp_path / "out", base=base, adapters=[lora])


@pytest.mark.parametrize("name", ["double", "int4"])
def test_doras_and_several_adapters(model, cached_folder, name: str, tmp_path: Path) -> None:
    base, lora = model(name)
    build = quantized_llama.llama if name in FORMS else lambda: oracle.llama(**SIZES)
    dora = cached_folder(
        f"verified-dora-{name}",
        lambda folder: oracle.train(
            build(), folder, seed=3, use_dora=True, target_modules=["v_proj"]
        ),
    )
    for kept in (True, False):
        out = tmp_path / str(kept)
        receipt = oracle.merge(base, f"{lora}=0.5", dora, out=out, verify=True, dequantize=not kept)
        assert receipt.data["verified"]["tensors"] == (6 if kept else 14)


@pytest.mark.parametrize("name", ["double", "int8-bnb", "int4", "fp8"])
def test_decoded_weights_in_float32_are_the_rounded_float64_values(
    model, name: str, tmp_path: Path
) -> None:
    base, lora = model(name)
    oracle.merge(base, lora, out=tmp_path / "out", dequantize=True, dtype="fp32", verify=True)
    adapterkit.dequantize(base, out=tmp_path / "plain", dtype="fp32")
    exact = oracle.exact(
        oracle.peft_model(oracle.load("LlamaForCausalLM", tmp_path / "plain"), lora)
    )
    actual = oracle.stored(tmp_path / "out")
    wrong = sum(int((actual[key] != one.value.float()).sum()) for key, one in exact.items())
    assert len(exact) == 4 and wrong <= 1e-4 * sum(one.value.numel() for one in exact.values())


def test_a_delta_that_changes_no_float32_keeps_the_bytes(model, tmp_path: Path) -> None:
    base, lora = model("nf4")
    oracle.merge(base, f"{lora}=1e-12", out=tmp_path / "out", verify=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
