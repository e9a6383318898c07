"""Adapters merged into GGUF files: what llama.cpp's readers find is what PEFT's forward gives."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.bases.gguf.header import GgufHeader, read_gguf
from adapterkit.bases.gguf.weight import encode_rows
from adapterkit.core.errors import Damaged, Refused
from adapterkit.core.inputs.sources import open_source
from adapterkit.kernels import rows
from adapterkit.kernels.quant import ggml
from adapterkit.kernels.quant.ggml import _Trial
from adapterkit.kernels.quant.stochastic import Draws
from tests.support import oracle
from tests.support.gguf_files import MODELS, blocks, gguf, llama, split, write
from tests.support.usual import usual

IDS = torch.arange(12)[None]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "lfm2": ["q_proj", "k_proj", "in_proj", "w1", "w2"],
    "qwen3moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h"],
    "minimax-m2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen35": ["q_proj", "in_proj_qkv", "in_proj_a", "in_proj_z", "out_proj", "down_proj"],
    "qwen35moe": ["q_proj", "in_proj_qkv", "in_proj_b", "out_proj", "shared_expert.up_proj"],
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # of those with experts
USUAL = ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"]


def train(model: nn.Module, out: Path, **config: Any) -> Tensor:
    """An adapter of random factors; the logits of the model with it."""
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": USUAL, "init_lora_weights": False} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, of tied layers, of biases
        wrapped = get_peft_model(model.float(), LoraConfig(**config)).eval()
        wrapped.save_pretrained(out)
    with torch.no_grad():
        return wrapped(IDS).logits


def header(path: Path) -> GgufHeader:
    return read_gguf(open_source(path), path.name)


def logits(path: Path) -> Tensor:
    """Of the model in a file as transformers reads it."""
    with oracle.quiet():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {entry.name: data[entry.start : entry.stop] for entry in header(path).tensors}


@pytest.mark.parametrize("arch", MODELS)
def test_the_file_computes_what_peft_computes(arch: str, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    stacks = STACKS if arch in ("minimax-m2", "qwen35moe") else None
    how = {"target_modules": TARGETS.get(arch, USUAL), "target_parameters": stacks}
    expected = train(model, tmp_path / "a", **how)
    out = tmp_path / "merged.gguf"
    receipt: Any = adapterkit.merge(path, tmp_path / "a", out=out, verify=True)
    assert torch.allclose(logits(out), expected, atol=2e-6)
    assert not torch.allclose(logits(path), expected, atol=1e-3)
    # the header and what no adapter touches keep their bytes
    assert out.stat().st_size == path.stat().st_size and header(out).raw == header(path).raw
    before, after = stored(path), stored(out)
    changed = {name for name in before if before[name] != after[name]}
    several = sum("ffn_up_exps" in name for name in changed)  # of one parameter with the gate
    assert changed and len(changed) == len(receipt.data["parameters"]) + several
    # and back again
    adapterkit.merge(out, f"{tmp_path / 'a'}=-1", out=tmp_path / "back.gguf")
    assert torch.allclose(logits(tmp_path / "back.gguf"), logits(path), atol=1e-5)


@pytest.mark.parametrize(
    "arch, config",
    [
        ("llama", {"use_dora": True, "target_modules": ["q_proj", "k_proj"]}),
        ("gpt2", {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
        ("llama", {"use_rslora": True, "target_modules": "all-linear"}),
    ],
)
def test_other_kinds_of_adapters(arch: str, config: dict, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    expected = train(model, tmp_path / "a", **config)
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf")
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-6)


def test_fully_trained_modules_are_merged(tmp_path: Path):
    model, message, tensors = MODELS["gemma3"]()
    path = write(tmp_path / "m.gguf", "gemma3", message, tensors)
    whole = ["input_layernorm", "q_norm", "up_proj"]
    wrapped = get_peft_model(
        model.float(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole)
    )
    oracle.perturb(wrapped, 5)
    with torch.no_grad():  # as in Gemma's own: 1 is lost in the last bits of these
        wrapped.base_model.model.model.layers[
            0
        ].input_layernorm.modules_to_save.default.weight.mul_(200)
    wrapped.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = wrapped(IDS).logits
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf", verify=True)
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-5)


@pytest.mark.parametrize(
    "arch, config, how",
    [
        ("llama", {}, {}),
        ("llama", {}, {"rounding": "stochastic"}),
        ("llama", {"use_dora": True}, {}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}, {}),
        ("gemma3", {"target_modules": ["v_proj"], "modules_to_save": ["q_norm"]}, {}),
        ("llama", {"target_modules": ["lm_head"]}, {"tied": True}),
        ("llama", {}, {"kind": "Q8_0", "changed_type": "f32"}),
        ("qwen3moe", {"target_modules": [], "target_parameters": STACKS[1:]}, {"kind": "Q8_0"}),
    ],
)
def test_sums_in_float32_are_exact_and_rounded_once(
    arch: str, config: dict, how: dict, tmp_path: Path
):
    """As those of a folder of safetensors are; of tensors beside blocks, too."""
    is_tied, kind = how.pop("tied", False), how.pop("kind", None)
    model, message, tensors = llama(tie_word_embeddings=True) if is_tied else MODELS[arch]()
    for name, value in tensors.items():
        if kind and "blk.0" in name and value.ndim > 1 and value.shape[-1] % 32 == 0:
            coded = encode_rows(kind, torch.from_numpy(value.reshape(-1, value.shape[-1])))
            coded = coded.view(*value.shape[:-1], -1).numpy()
            tensors[name] = (gguf.GGMLQuantizationType[kind], coded)
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    train(model, tmp_path / "a", **config)
    adapterkit.dequantize(path, out=tmp_path / "floats", dtype="fp32")
    adapterkit.merge(tmp_path / "floats", tmp_path / "a", out=tmp_path / "exact")
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", verify=True, **how)
    exact, actual = oracle.stored(tmp_path / "exact"), decoded(tmp_path / "out.gguf")
    for key, value in actual.items():
        if not kind or "layers.0" not in key or how:
            assert torch.equal(value, exact[key]), key


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_head_that_was_tied_becomes_a_tensor_of_its_own(module: str, tmp_path: Path):
    model, message, tensors = llama(tie_word_embeddings=True)
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    expected = train(model, tmp_path / "a", target_modules=[module])
    out = tmp_path / "merged.gguf"
    adapterkit.merge(path, tmp_path / "a", out=out, verify=True)
    # PEFT's forward leaves the other side of the tie as it was
    assert torch.allclose(logits(out), expected, atol=2e-6)
    assert {entry.name for entry in header(out).tensors} - {
        entry.name for entry in header(path).tensors
    } == {"output.weight"}
    reader = gguf.GGUFReader(out)
    for name, value in tensors.items():
        [found] = (tensor for tensor in reader.tensors if tensor.name == name)
        same = np.array_equal(found.data, value)
        assert same or (name == "token_embd.weight" and module == "embed_tokens")


def test_a_split_model(tmp_path: Path):
    model, message, tensors = MODELS["qwen3moe"]()
    path = write(tmp_path / "m.gguf", "qwen3moe", message, tensors)
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    # gate and up of the first layer, one parameter of transformers, are in two files
    cut = names.index("blk.0.ffn_up_exps.weight")
    assert names.index("blk.0.ffn_gate_exps.weight") < cut
    paths = split(path, tmp_path / "parts", [cut, 0, len(names) - cut])
    expected = train(
        model,
        tmp_path / "a",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf")
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-6)
    adapterkit.merge(paths[0], tmp_path / "a", out=tmp_path / "merged", verify=True)
    together = {}
    for one in sorted((tmp_path / "merged").glob("*.gguf")):
        together |= stored(one)
        assert one.stat().st_size == (tmp_path / "parts" / one.name).stat().st_size
    assert together == stored(tmp_path / "merged.gguf")
    (tmp_path / "parts" / paths[1].name).unlink()
    with pytest.raises(Refused, match="1 of 3 parts are missing"):
        adapterkit.merge(paths[0], tmp_path / "a", out=tmp_path / "other")


def test_names_of_outputs_and_options(tiny: Path, tmp_path: Path):
    train(llama()[0], tmp_path / "a")
    with pytest.raises(Refused, match=r"a name that ends in \.gguf"):
        adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "folder")
    with pytest.raises(Refused, match="--dtype with this base"):
        adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "m.gguf", dtype="bf16")
    base = tmp_path / "base"
    oracle.save_base(llama()[0], base)
    with pytest.raises(Refused, match=r"m\.gguf for a base that is no single file"):
        adapterkit.merge(base, tmp_path / "a", out=tmp_path / "m.gguf")
    with pytest.raises(Refused, match="--gguf-scales with this base"):
        adapterkit.merge(base, tmp_path / "a", out=tmp_path / "m", gguf_scales="keep")
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "m"]


def test_a_merge_is_known_again(tiny: Path, tmp_path: Path):
    train(llama()[0], tmp_path / "a")
    adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "once.gguf")
    receipt: Any = adapterkit.merge(
        tmp_path / "once.gguf", tmp_path / "a", out=tmp_path / "twice.gguf"
    )
    assert any("already" in note for note in receipt.data["notes"])
    result: Any = adapterkit.verify(tmp_path / "once.gguf", base=tiny, adapters=[tmp_path / "a"])
    assert result["tensors"] == 10 and result["rows"]
    data = bytearray((tmp_path / "once.gguf").read_bytes())
    data[-100] ^= 64
    (tmp_path / "once.gguf").write_bytes(data)
    with pytest.raises(adapterkit.core.errors.Damaged):
        adapterkit.verify(tmp_path / "once.gguf")


def test_difference_and_extraction(tiny: Path, tmp_path: Path):
    model = llama()[0]
    expected = train(model, tmp_path / "a", target_modules=["q_proj", "k_proj"])
    adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "m.gguf")
    found: Any = adapterkit.diff(tiny, tmp_path / "m.gguf")
    rows = {row["name"]: row["a"]["dtype"] for row in found["changed"]}
    assert len(rows) == 4 and all("q_proj" in name or "k_proj" in name for name in rows)
    assert set(rows.values()) == {"F32"}
    adapterkit.extract(tiny, tmp_path / "m.gguf", rank=4, out=tmp_path / "again")
    adapterkit.merge(tiny, tmp_path / "again", out=tmp_path / "m2.gguf")
    assert torch.allclose(logits(tmp_path / "m2.gguf"), expected, atol=1e-5)


# --- blocks ---------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
# the others run the same code on other tables, and each is tested as a kernel
WRITTEN = usual(sorted(ggml.TYPES), ("Q4_K", "Q4_1", "Q8_0", "IQ4_XS"))


def in_blocks(kind: str, folder: Path, size: float = 0.02) -> tuple[Path, Path, dict[str, Tensor]]:
    """A llama with q and down in blocks of a type, an adapter of these, and their exact sums."""
    torch.manual_seed(1)
    model, message, tensors = llama(**WIDE)
    for name, value in tensors.items():
        if "attn_q" in name or "ffn_down" in name:
            blocks = ggml.encode(kind, torch.from_numpy(np.array(value)).float())
            tensors[name] = (gguf.GGMLQuantizationType[kind], blocks.numpy())
    path = write(folder / "m.gguf", "llama", message, tensors)
    wrapped = get_peft_model(
        model.float(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=4)
    )
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(std=size**0.5)
    wrapped.save_pretrained(folder / "a")
    adapterkit.dequantize(path, out=folder / "floats", dtype="fp32")
    adapterkit.merge(folder / "floats", folder / "a", out=folder / "exact")
    return path, folder / "a", oracle.stored(folder / "exact")


def decoded(path: Path) -> dict[str, Tensor]:
    out = path.with_suffix("")
    adapterkit.dequantize(path, out=out, dtype="fp32", overwrite=True)
    return oracle.stored(out)


TOUCHED = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_blocks_of_every_type_that_is_written(kind: str, tmp_path: Path):
    path, adapter, exact = in_blocks(kind, tmp_path)
    out, before = tmp_path / "merged.gguf", decoded(path)
    receipt: Any = adapterkit.merge(path, adapter, out=out, verify=True)
    assert out.stat().st_size == path.stat().st_size and header(out).raw == header(path).raw
    after = decoded(out)
    for key in TOUCHED:
        delta, error = exact[key] - before[key], after[key] - exact[key]
        # no farther from the sum than the original weight's blocks are from the original weight
        again = ggml.decode(kind, ggml.encode(kind, exact[key]))
        assert error.norm() <= 1.001 * (again - exact[key]).norm(), key
        said = receipt.data["parameters"][key]
        survived = float((after[key] - before[key]).flatten() @ delta.flatten() / delta.norm() ** 2)
        assert said["survived"] == pytest.approx(survived, rel=1e-3, abs=1e-4)
    assert all(torch.equal(after[k], before[k]) for k in after if k not in TOUCHED)
    # nothing is added: the bytes stay
    adapterkit.merge(path, f"{adapter}=0.0", out=tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == path.read_bytes()


def of_every_type(folder: Path) -> Path:
    """A file with a tensor of each type, and an adapter `a` of them."""
    model, message, tensors = llama(**WIDE | {"num_hidden_layers": 3})
    names = [name for name, value in tensors.items() if value.ndim == 2 and "blk" in name]
    for name, kind in zip(names, sorted(ggml.TYPES), strict=False):
        coded = ggml.encode(kind, torch.from_numpy(np.array(tensors[name])).float())
        tensors[name] = (gguf.GGMLQuantizationType[kind], coded.numpy())
    train(model, folder / "a", target_modules="all-linear")
    return write(folder / "m.gguf", "llama", message, tensors)


def test_a_change_that_is_2_percent_wrong_is_found_in_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a file with a tensor of each, of the nearest codes and of scales that were searched."""
    path = of_every_type(tmp_path)
    out, right = tmp_path / "out.gguf", rows.add_low_rank
    adapterkit.merge(path, tmp_path / "a", out=out, verify=True)
    wrong = lambda w, left, other: right(w, left * 1.02, other)
    for scales in ("search", "keep"):
        with monkeypatch.context() as patch:
            patch.setattr(rows, "add_low_rank", wrong)
            adapterkit.merge(path, tmp_path / "a", out=out, gguf_scales=scales, overwrite=True)
        with pytest.raises(Damaged, match="21 of 21 tensors are not what the inputs give"):
            adapterkit.verify(out, base=path, adapters=[tmp_path / "a"])


@pytest.mark.parametrize("changed_type", [None, "q6_k"])
def test_stochastic_rounding_is_verified_where_scales_are_as_good(
    changed_type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of each type; in many blocks two scales have nearly the same error, of which the search in
    float32 finds one and that of the exact values the other."""
    path, out = of_every_type(tmp_path), tmp_path / "out.gguf"
    how = {"out": out, "rounding": "stochastic", "changed_type": changed_type, "overwrite": True}
    adapterkit.merge(path, tmp_path / "a", verify=True, **how)
    sources: dict = {"base": path, "adapters": [tmp_path / "a"]}
    add, draw = rows.add_low_rank, Draws.uniform
    wrong: dict = {
        (rows, "add_low_rank"): lambda w, left, other: add(w, left * 1.02, other),
        (Draws, "uniform"): lambda self, *rest: 1 - draw(self, *rest),
    }
    if changed_type is None:  # else new scales are not compared with old ones
        wrong[_Trial, "_searched"] = lambda self, scales, at: (scales, at)
    for (owner, name), function in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            adapterkit.merge(path, tmp_path / "a", **how)
        with pytest.raises(Damaged, match=r"of 21 tensors are not what the inputs give"):
            adapterkit.verify(out, **sources)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_small_changes_survive_stochastic_and_compensated_rounding(kind: str, tmp_path: Path):
    path, adapter, exact = in_blocks(kind, tmp_path, size=0.0005)
    before, key = decoded(path), TOUCHED[1]
    kept: dict[str, float] = {}
    stats = tmp_path / "stats.safetensors"
    torch.manual_seed(4)
    factor = torch.randn(256, 256) / 16 * torch.linspace(1, 0, 256) ** 3
    modules = [key.removesuffix(".weight") for key in TOUCHED]
    save_file({f"{module}.covariance": factor @ factor.T for module in modules}, stats)
    how: dict[str, dict] = {
        "nearest": {},
        "kept": {"gguf_scales": "keep"},
        "stochastic": {"rounding": "stochastic"},
        "compensated": {"rounding": "compensated", "stats": stats},
    }
    for name, options in how.items():
        out = tmp_path / f"{name}.gguf"
        receipt: Any = adapterkit.merge(path, adapter, out=out, **options)
        told = [text for text in receipt.data["warnings"] if "--changed-type q8_0" in text]
        assert bool(told) == (name in ("nearest", "kept"))
        sources = {"base": path, "adapters": [adapter], "stats": options.get("stats")}
        assert adapterkit.verify(out, **sources)["tensors"] == 2
        after, delta = decoded(out)[key], exact[key] - before[key]
        kept[name] = float((after - before[key]).flatten() @ delta.flatten() / delta.norm() ** 2)
        if name == "compensated":
            error = receipt.data["parameters"][key]
            assert error["output_error"] < 0.7 * error["unweighted_output_error"]
    assert kept["nearest"] < 0.5 and abs(kept["stochastic"] - 1) < 0.35, kept


def test_touched_tensors_in_another_type(tmp_path: Path):
    path, adapter, exact = in_blocks("Q4_K", tmp_path)
    out = tmp_path / "touched.gguf"
    adapterkit.merge(path, adapter, out=out, changed_type="q8_0", verify=True)
    types = {entry.name: entry.type for entry in header(out).tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    after = decoded(out)
    for key in TOUCHED:
        assert (after[key] - exact[key]).norm() < 0.01 * exact[key].norm()
    assert logits(out).isfinite().all()


def test_codebook_types_are_refused_with_a_fix(tmp_path: Path):
    model, message, tensors = llama(**WIDE)
    name = "blk.0.ffn_down.weight"
    shape = tensors[name].shape
    tensors[name] = (
        gguf.GGMLQuantizationType.IQ3_S,
        blocks(gguf.GGMLQuantizationType.IQ3_S, shape, 1),
    )
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    train(model, tmp_path / "a", target_modules=["down_proj"])
    with pytest.raises(Refused, match=r"IQ3_S[\s\S]*--changed-type q8_0"):
        adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", changed_type="q8_0")
    entry = next(e for e in header(tmp_path / "out.gguf").tensors if e.name == name)
    assert entry.type == "Q8_0"


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_importance_matrix_weighs_the_search(form: str, tmp_path: Path):
    path, adapter, exact = in_blocks("Q4_K", tmp_path)
    torch.manual_seed(2)
    sums = torch.rand(256) ** 8
    file = tmp_path / f"imatrix.{form}"
    if form == "gguf":
        writer = gguf.GGUFWriter(file, "imatrix")
        writer.add_tensor("blk.0.ffn_down.weight.in_sum2", sums[None].numpy())
        writer.add_tensor("blk.0.ffn_down.weight.counts", np.ones((1, 1), np.float32))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
    else:
        name = b"blk.0.ffn_down.weight"
        head = struct.pack(f"<ii{len(name)}sii", 1, len(name), name, 1, 256)
        file.write_bytes(head + sums.numpy().tobytes())
    adapterkit.merge(path, adapter, out=tmp_path / "plain.gguf")
    adapterkit.merge(path, adapter, out=tmp_path / "w.gguf", imatrix=file)
    errors = [
        decoded(tmp_path / f"{n}.gguf")[TOUCHED[1]] - exact[TOUCHED[1]] for n in ("plain", "w")
    ]
    plain, weighted = (float((error.square() * sums).sum()) for error in errors)
    assert weighted < 0.8 * plain
    assert errors[1].norm() > errors[0].norm()
    sources: dict = {"base": path, "adapters": [adapter]}
    assert adapterkit.verify(tmp_path / "w.gguf", **sources, imatrix=file)["tensors"] == 2
    with pytest.raises(Refused, match="importance matrix"):
        adapterkit.verify(tmp_path / "w.gguf", **sources)
    file.write_bytes(b"\0" * 5)
    with pytest.raises(Refused, match="no importance matrix"):
        adapterkit.merge(path, adapter, out=tmp_path / "x.gguf", imatrix=file)


def test_a_modelfile_is_written_next_to_the_file(tiny: Path, tmp_path: Path):
    train(llama()[0], tmp_path / "a")
    out = tmp_path / "out"
    out.mkdir()
    adapterkit.merge(tiny, tmp_path / "a", out=out / "m.gguf", modelfile=True)
    assert (out / "Modelfile").read_text() == "FROM ./m.gguf\n"
    assert {path.name for path in out.iterdir()} == {
        "m.gguf",
        "Modelfile",
        "m.gguf.adapterkit.json",
    }
    assert adapterkit.verify(out / "m.gguf")["files"] == 2
    (out / "other.gguf").write_bytes(b"")
    (out / "other.gguf").unlink()
    with pytest.raises(Refused, match="output exists, and it is of m.gguf: Modelfile"):
        adapterkit.merge(tiny, tmp_path / "a", out=out / "other.gguf", modelfile=True)
    adapterkit.merge(tiny, tmp_path / "a", out=out / "m.gguf", modelfile=True, overwrite=True)
