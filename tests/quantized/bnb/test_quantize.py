"""quantize to bitsandbytes' formats: the files are those that transformers writes."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import adapterkit
from adapterkit.bases.quantized.codecs import bnb4
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle, tiny
from tests.support.bnb import (
    KINDS,
    MODELS,
    by_transformers,
    config,
    loaded,
    quantized,
    same_files,
    unpacked,
)
from tests.support.quantized_llama import change
from tests.support.usual import usual

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


ALL = ("llama-bf16", "odd", "gpt2-bf16")


@pytest.mark.parametrize(
    ("name", "kind"),
    # the kind with one model, the model with two
    usual(
        [(n, k) for n in MODELS for k in KINDS if n in ALL or k in ("nf4-double", "int8")],
        lambda row: row[0] == "odd" or row[1] == "nf4-double" or row[0].endswith("bf16"),
    ),
)
def test_the_files_are_those_of_transformers(
    base, packed, name: str, kind: str, tmp_path: Path
) -> None:
    by_transformers(base(name), tmp_path, **KINDS[kind][1])
    same_files(packed(name, kind), tmp_path)


@pytest.mark.parametrize(
    ("model", "kind"),
    usual(
        itertools.product(["flint", "inkling2_text", "deepseek_v3", "llava"], ["nf4", "int8"]),
        lambda row: row[1] == "nf4" or row[0] == "llava",  # names do not know the kind
    ),
)
def test_types_with_other_names_in_the_file(model: str, kind: str, tmp_path: Path) -> None:
    """What is quantized is as transformers quantizes it, the rest has the same values, and all of
    it loads. A linear layer that is stored under another name than its `weight` stays a float where
    the loader would not find its scale (nor finds its own)."""
    result = tiny.model(model).half()
    result.save_pretrained(tmp_path / "base")
    by_transformers(tmp_path / "base", tmp_path / "theirs", **KINDS[kind][1])
    receipt = quantized(tmp_path / "base", tmp_path / "ours", **KINDS[kind][0])
    left = {name.removesuffix(".weight").rpartition(".")[2] for name in receipt.data["left_out"]}
    assert left == ({"weight_proj"} if (model, kind) == ("inkling2_text", "int8") else set())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    for key in {*ours, *theirs}:
        if any(key.endswith((name, f"{name}.SCB", f"{name}.weight_format")) for name in left):
            assert key not in ours or ours[key].dtype == torch.float16
        else:
            assert torch.equal(ours[key].to(theirs[key].dtype), theirs[key]), key
    loaded(tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-bf16", kind) for kind in KINDS]
    + [("tied", "int8"), ("gpt2-wide", "nf4"), ("gpt2-fp32", "int8"), ("t5-wide", "nf4-double")],
)
def test_the_output_loads_and_generates_in_transformers(packed, name: str, kind: str) -> None:
    model = loaded(packed(name, kind))
    cls = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    assert any(type(module) is cls for module in model.modules())
    start = {"decoder_start_token_id": 0} if name == "t5-wide" else {}
    with oracle.quiet():
        ids = model.generate(torch.arange(1, 5)[None], max_new_tokens=4, do_sample=False, **start)
    assert ids.shape[1] > 1 and int(ids.max()) < 80


def test_errors_are_measured(base, packed) -> None:
    receipt = json.loads((packed("llama-bf16", "nf4") / "adapterkit.json").read_text())
    before, metrics = load_file(base("llama-bf16") / "model.safetensors"), receipt["parameters"]
    assert receipt["quantized"] == 14 and len(metrics) == 14
    for key, metric in metrics.items():
        lost = (
            unpacked(load_file(packed("llama-bf16", "nf4") / "model.safetensors"), key)
            - before[key].double()
        )
        assert metric["error"] == pytest.approx(
            float(lost.norm() / before[key].double().norm()), rel=1e-3
        )


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_base_in_shards(base, packed, kind: str, tmp_path: Path) -> None:
    sharded = base("llama-bf16", max_shard_size="100KB")
    quantized(sharded, tmp_path / "out", **KINDS[kind][0])
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [file.name for file in files] == [
        file.name for file in sorted(sharded.glob("*.safetensors"))
    ] and len(files) > 2
    tensors = {file.name: load_file(file) for file in files}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name in tensors for key in tensors[name]}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for part in tensors.values() for t in part.values()
    )
    whole = {key: t for part in tensors.values() for key, t in part.items()}
    oracle.assert_same(whole, load_file(packed("llama-bf16", kind) / "model.safetensors"))
    loaded(tmp_path / "out")
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama-bf16", "gpt2-bf16"])
def test_skipped_modules_stay(base, name: str, kind: str, tmp_path: Path) -> None:
    skip = {"llama-bf16": r".*layers[.]0[.]mlp.*|.*o_proj", "gpt2-bf16": r".*h[.]0[.].*|.*mlp.*"}[
        name
    ]
    ours, theirs = KINDS[kind]
    receipt = quantized(base(name), tmp_path / "ours", skip=skip, **ours)
    listed = config(tmp_path / "ours")["quantization_config"]["llm_int8_skip_modules"]
    by_transformers(base(name), tmp_path / "theirs", llm_int8_skip_modules=listed, **theirs)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base(name), tmp_path / "ours")
    )
    left = [
        key
        for key in before
        if key in after and before[key].dtype == after[key].dtype and before[key].dim() == 2
    ]
    assert (
        set(receipt.data["left_out"]) <= set(left)
        and len(receipt.data["left_out"]) == {"llama-bf16": 5, "gpt2-bf16": 6}[name]
    )
    model = loaded(tmp_path / "ours")
    for key in receipt.data["left_out"]:
        module = model.get_submodule(key.removesuffix(".weight"))
        assert type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D) and torch.equal(
            module.weight, before[key]
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes_are_those_of_the_library(
    base, block: int, double: bool, tmp_path: Path
) -> None:
    """transformers has no setting for it; what it loads, it computes with as it is."""
    quantized(base("llama-bf16"), tmp_path / "out", to="nf4", block_size=block, double_quant=double)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base("llama-bf16"), tmp_path / "out")
    )
    for key in [key for key in before if key + ".absmax" in after]:
        values, state = bnb.functional.quantize_4bit(
            before[key], blocksize=block, quant_type="nf4", compress_statistics=double
        )
        theirs = {"": values} | {f".{k}": v for k, v in state.as_dict(packed=True).items()}
        assert {k.removeprefix(key) for k in after if k.startswith(key)} == set(theirs)
        for ending, value in theirs.items():
            assert torch.equal(after[key + ending], value), key + ending
    model, weight = loaded(tmp_path / "out"), unpacked(after, "model.layers.0.mlp.up_proj.weight")
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert module.weight.quant_state.blocksize == block
    if block > 128:  # longer than a row: bitsandbytes cannot compute with it on CPUs
        return
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(module(x).double(), x.double() @ weight.T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", [None, "7" * 1000], ids=["shorter", "longer"])
def test_the_guess_of_a_states_size_may_be_wrong_either_way(
    base, packed, wrong: str | None, monkeypatch, tmp_path: Path
) -> None:
    """So far that the header is of another length."""
    monkeypatch.setattr(bnb4, "OFFSET", wrong)
    for name in ("llama-bf16", "gpt2-fp32"):
        plan = adapterkit.quantize(
            base(name), out=tmp_path / name, dry_run=True, **KINDS["nf4-double"][0]
        )
        quantized(base(name), tmp_path / name, **KINDS["nf4-double"][0])
        whole = (packed(name, "nf4-double") / "model.safetensors").read_bytes()
        assert (tmp_path / name / "model.safetensors").read_bytes() == whole
        assert len(plan.shards[0].layout.header) != 8 + int.from_bytes(whole[:8], "little")
        adapterkit.verify(tmp_path / name)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"to": "nf3"}, "--to"),
        ({"to": "nf4", "block_size": 48}, "--block-size 48"),
        ({"to": "nf4", "block_size": -64}, "--block-size -64"),
        ({"to": "int8", "double_quant": True}, "--double-quant"),
        ({"to": "int8", "block_size": 128}, "--block-size"),
        ({"to": "nf4", "skip": ".*"}, "no linear layer"),
        ({"to": "nf4", "skip": "("}, "--skip"),
        ({"to": "nf4", "skip": "no_such_module"}, "--skip"),
        ({"to": "nf4", "skip": "q_proj,_proj"}, "--skip '_proj' matches none"),
        (
            {"to": "nf4", "skip": "mlp"},
            '--skip(.|\n)*give "[.][*]mlp[.][*]" for the modules inside',
        ),
        ({"to": "nf4", "skip": r"layers\.0\."}, "--skip"),
    ],
    ids=str,
)
def test_invalid_options_of_quantize_are_refused(
    base, how: dict, text: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=text):
        quantized(base("llama-bf16"), tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


def test_a_base_that_cannot_be_quantized(base, packed, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="quantized"):
        quantized(packed("llama-bf16", "nf4"), tmp_path / "out", to="int8")
    unknown = oracle.edit_config(
        base("llama-bf16"),
        tmp_path / "unknown",
        model_type="no_such_model",
        architectures=["NoSuch"],
    )
    with pytest.raises(Refused, match="transformers does not know"):
        quantized(unknown, tmp_path / "out", to="nf4")
    nan = shutil.copytree(base("llama-bf16"), tmp_path / "nan")
    tensor = load_file(nan / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    tensor[3, 4] = torch.nan
    change(nan, {"model.layers.1.mlp.up_proj.weight": tensor})
    for kind in KINDS:
        with pytest.raises(AdapterkitError, match="not finite"):
            quantized(nan, tmp_path / "out", **KINDS[kind][0])
    assert not (tmp_path / "out").exists()


def test_magnitudes_that_float16_cannot_hold_are_refused_in_int8(base, tmp_path: Path) -> None:
    large = shutil.copytree(base("llama-bf16"), tmp_path / "large")
    tensor = load_file(large / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    tensor[3, 4] = 1e5
    change(large, {"model.layers.1.mlp.up_proj.weight": tensor})
    with pytest.raises(AdapterkitError, match="up_proj.*float16"):
        quantized(large, tmp_path / "out", to="int8")
    assert not (tmp_path / "out").exists()
    quantized(large, tmp_path / "out", to="nf4")
