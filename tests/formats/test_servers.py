"""Adapters as vLLM and SGLang read them: against what their own loaders made of the files."""

import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit import check, convert
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.uniform_rank import uniform, with_scale
from adapterkit.core.errors import AdapterkitError, Refused
from tests.formats.golden.make_sglang import CASES as OF_SGLANG
from tests.formats.golden.make_vllm import CASES as OF_VLLM
from tests.formats.golden.make_vllm import SETTINGS
from tests.formats.golden.servers import SERVED
from tests.formats.test_experts import delta, held, scale_of
from tests.support import oracle
from tests.support.mlx_models import COMMON

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VLLM, SGLANG = OF_VLLM | SERVED, OF_SGLANG | SERVED
SERVERS, PREFIX = ("vllm", "sglang"), "base_model.model."
ROUNDING = 1e-7  # of products with b in float32


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# -- what the servers multiply ---------------------------------------------------------------------


def truth(source: Path) -> dict[str, Tensor]:
    """scale · b @ a of a golden adapter of PEFT in float64, by module; experts one by one, as
    `home.expert.w1`, `w2` and `w3`."""
    settings, tensors = settings_of(source), load_file(source / WEIGHTS)
    deltas: dict[str, Tensor] = {}
    for key, a in tensors.items():
        if not key.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].double()
        name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        scale, a = scale_of(settings, name), a.double()
        home, _, leaf = name.rpartition(".")
        if leaf == "experts" or name.endswith("experts.base_layer"):
            deltas |= of_stack(source, name, scale, a, b)
        elif ".experts." in name:
            deltas[f"{home}.{LEAVES[leaf]}"] = scale * b @ a
        else:
            deltas[name] = scale * b @ a
    return deltas


LEAVES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}


def of_stack(source: Path, name: str, scale: float, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A stack of three experts, by PEFT's einsum; up to 0.18 of the matrices' transposes."""
    stack = scale * torch.einsum("ore,eri->eoi", b.view(len(b), -1, 3), a.view(3, -1, a.shape[1]))
    if source.parent.name == "peft-0.18" and not source.name.startswith("gpt_oss"):
        stack = stack.transpose(1, 2)
    home = name.removesuffix(".base_layer")
    if home == name:
        return {f"{home}.{e}.w2": stack[e] for e in range(3)}
    half = stack.shape[1] // 2
    halves = {"w1": stack[:, :half], "w3": stack[:, half:]}
    if source.name.startswith("gpt_oss"):  # its rows alternate, and vLLM keeps them so
        halves = {"w13": stack}
    return {f"{home}.{e}.{leaf}": part[e] for leaf, part in halves.items() for e in range(3)}


def of_vllm(folder: Path) -> dict[str, Tensor]:
    """b @ a as vLLM has them, by its own names of modules."""
    tensors = {k: v.double() for k, v in load_file(folder / "vllm.safetensors").items()}
    deltas: dict[str, Tensor] = {}
    for key, a in tensors.items():
        match = re.fullmatch(r"(.+)\.a(?:\.(\d+))?", key)
        if match is None or match[1].endswith(
            "base_layer"
        ):  # the stack inside, joined to its outer
            continue
        name, number = match.groups()
        if number is None:
            deltas[name] = tensors[f"{name}.b"] @ a
            continue
        leaf = (("w1", "w2", "w3") if f"{name}.a.2" in tensors else ("w13", "w2"))[int(number)]
        b = tensors[f"{name}.b.{number}"]
        deltas |= {f"{name}.{e}.{leaf}": b[e] @ a[e] for e in range(len(a))}
    return deltas


# vLLM's names of modules where they are not the adapter's
RENAMED = {
    "gemma4": ("model.language_model.", "language_model.model."),
    "gpt_oss": (".self_attn.", ".attn."),
    "mixtral": (".mlp.experts", ".block_sparse_moe.experts"),
    "qwen2_vl": ("model.language_model.", "language_model.model."),
}


def golden(case: str) -> Path:
    """The folder of a case's formats."""
    return GOLDEN / "served" if case in SERVED else GOLDEN


@pytest.mark.parametrize("case", VLLM)
def test_vllm_multiplies_the_delta(case: str) -> None:
    source = golden(case) / VLLM[case]
    old, new = next((RENAMED[k] for k in RENAMED if case.startswith(k)), ("", ""))
    expected = {name.replace(old, new): value for name, value in truth(source).items()}
    if case == "qwen2_vl":
        expected = {n.replace("model.visual.", "visual."): v for n, v in expected.items()}
    actual = of_vllm(golden(case) / "vllm" / case)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert float((actual[name] - value).norm()) <= ROUNDING * float(value.norm()), name


@pytest.mark.parametrize("server, case", [
    *(("vllm", case) for case in VLLM), *(("sglang", case) for case in SGLANG),
])  # fmt: skip
def test_the_file_that_they_read_is_written(server: str, case: str, tmp_path: Path) -> None:
    source = golden(case) / (VLLM if server == "vllm" else SGLANG)[case]
    convert(source, to=server, out=tmp_path / "out", base=source / "base")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (
            golden(case) / server / case / name
        ).read_bytes()


@pytest.mark.parametrize("case", SGLANG)
def test_sglang_multiplies_the_delta(case: str) -> None:
    """q, k and v, gate and up one above the other: parts of one rank, each with its rows of b."""
    tensors = load_file(golden(case) / "sglang" / case / "sglang.safetensors")
    written = load_file(golden(case) / "sglang" / case / WEIGHTS)
    scale = float(tensors.pop("scale"))
    rank = settings_of(golden(case) / "sglang" / case)["r"]
    expected = truth(golden(case) / SGLANG[case])
    for key, a in tensors.items():
        if "lora_B" in key or "embedding_B" in key:
            continue
        b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        name = name.replace("block_sparse_moe", "mlp")
        home, _, leaf = name.rpartition(".")
        rows = lambda leaf, home=home: len(written[f"{PREFIX}{home}.{leaf}.lora_B.weight"])
        qkv = ("q_proj", "k_proj", "v_proj") if leaf == "qkv_proj" else ()
        leaves = {
            "qkv_proj": {one: rows(one) for one in qkv},
            "gate_up_proj": {"w1": len(b) // 2, "w3": len(b) // 2},  # of experts alone here
            "down_proj": {"w2" if ".experts." in name else leaf: len(b)},
        }.get(leaf, {leaf: len(b)})
        assert len(a) == rank * len(leaves)
        for n, (part, count) in enumerate(leaves.items()):
            at = sum(list(leaves.values())[:n])
            value = scale * b[at : at + count].double() @ a[n * rank : (n + 1) * rank].double()
            known = expected.pop(f"{home}.{part}" if home else part, torch.zeros_like(value))
            assert float((value - known).norm()) <= ROUNDING * float(known.norm()), key
    assert not expected


def test_sglang_reads_linear_attention_in_parts(tmp_path: Path) -> None:
    """Its loader joins q, k, v and z of Qwen3.5's layers, and finds no in_proj_qkv."""
    sizes = COMMON | {
        "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("qwen3_5_text", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    oracle.train(model, tmp_path / "in", target_modules=["in_proj_qkv", "out_proj"], lora_alpha=3)
    source = load_file(tmp_path / "in" / WEIGHTS)
    (name,) = {key.partition(".lora_")[0] for key in source if "in_proj_qkv" in key}
    with pytest.raises(Refused, match="give --base"):
        convert(tmp_path / "in", to="sglang", out=tmp_path / "refused")
    convert(tmp_path / "in", to="sglang", base=tmp_path / "base", out=tmp_path / "out")
    tensors, home = load_file(tmp_path / "out" / WEIGHTS), name.removesuffix("in_proj_qkv")
    parts = ("in_proj_q", "in_proj_k", "in_proj_v")
    b = torch.cat([tensors[f"{home}{part}.lora_B.weight"] for part in parts])
    assert torch.equal(b, source[f"{name}.lora_B.weight"])
    rows = [len(tensors[f"{home}{part}.lora_B.weight"]) for part in (*parts, "in_proj_z")]
    assert rows == [8, 8, 16, 16]  # 2 heads of keys of size 4, 4 of values
    for part in parts:
        a = tensors[f"{home}{part}.lora_A.weight"]
        assert torch.equal(a, source[f"{name}.lora_A.weight"])
    assert not tensors[f"{home}in_proj_z.lora_B.weight"].any()
    assert "in_proj_q" in settings_of(tmp_path / "out")["target_modules"]
    oracle.train(
        transformers.AutoModelForCausalLM.from_config(config), tmp_path / "b",
        target_modules=["in_proj_b"],
    )  # fmt: skip
    found = check(tmp_path / "b", program="sglang", base=tmp_path / "base")["findings"]
    assert any(row["verdict"] == "refuses" and "in_proj_b" in row["problem"] for row in found)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_head_inside_the_model_is_the_head_of_sglang(with_base: bool, tmp_path: Path) -> None:
    """As GLM-5.3's adapters have it: SGLang dropped these keys."""
    model = oracle.llama()
    oracle.save_base(model, tmp_path / "base")
    oracle.train(model, tmp_path / "in", target_modules=["lm_head", "o_proj"])
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    inside = {key.replace(f"{PREFIX}lm_head", f"{PREFIX}model.lm_head"): one
              for key, one in tensors.items()}  # fmt: skip
    save_file(inside, tmp_path / "in" / WEIGHTS)
    base = tmp_path / "base" if with_base else None
    convert(tmp_path / "in", to="sglang", base=base, out=tmp_path / "out")
    assert {*load_file(tmp_path / "out" / WEIGHTS)} == {key for key in tensors if ".lora_" in key}


# -- what they refuse ------------------------------------------------------------------------------

LLAMA = GOLDEN / "peft" / "llama_patterns"
VERDICTS = json.loads((GOLDEN / "vllm" / "settings.json").read_text())
FOLDED = ("use_rslora", "use_qalora")  # written in another way


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("use_dora", "lora_bias")])
def test_settings_that_vllm_refuses(name: str, tmp_path: Path) -> None:
    """Are refused here, and those that it takes are taken."""
    source = tmp_path / "in"
    source.mkdir()
    tensors = load_file(LLAMA / WEIGHTS)
    change = SETTINGS[name]
    if change.get("modules_to_save"):
        module = change["modules_to_save"][0]
        key = {"embed_tokens": "model.embed_tokens"}.get(module, module)
        tensors[f"base_model.model.{key}.weight"] = torch.ones(24, 8)
    if change.get("bias"):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)
    save_file(tensors, source / WEIGHTS)
    (source / CONFIG).write_text(json.dumps(settings_of(LLAMA) | change))
    if VERDICTS[name] and name not in FOLDED:
        with pytest.raises(AdapterkitError) as refused:
            convert(source, to="vllm", out=tmp_path / "out")
        assert "hint: " in str(refused.value)
        assert not (tmp_path / "out").exists()
        return
    convert(source, to="vllm", out=tmp_path / "out")
    written = settings_of(tmp_path / "out")
    assert all(written[key] == value for key, value in change.items() if key not in (
        *FOLDED, "init_lora_weights",
    ))  # fmt: skip


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("settings, words, hint", [
    ({"use_dora": True}, "magnitude of lora, in 2 modules", "--rank N"),
    ({"lora_bias": True}, "bias of lora, in 2 modules", "adapterkit merge"),
    ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens", "adapterkit merge"),
    ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "model.embed_tokens", "merge"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights", "adapterkit rebase"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication", "adapterkit merge"),
])  # fmt: skip
def test_unsupported_settings_are_refused_with_the_command_that_helps(
    server: str, settings: dict[str, Any], words: str, hint: str, tmp_path: Path
) -> None:
    """PEFT's own files of it."""
    oracle.train(oracle.llama(), tmp_path / "in", **{"target_modules": ["q_proj"]} | settings)
    with pytest.raises(Refused) as refused:
        convert(tmp_path / "in", to=server, out=tmp_path / "out")
    assert words in str(refused.value) and hint in str(refused.value)


def test_all_offenders_at_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_dora": True, "modules_to_save": ["embed_tokens"]}
    oracle.train(
        oracle.llama(), tmp_path / "in", target_modules=["q_proj"], init_lora_weights="pissa",
        **settings,
    )  # fmt: skip
    with pytest.raises(Refused) as refused:
        convert(tmp_path / "in", to="vllm", out=tmp_path / "out")
    assert all(word in str(refused.value) for word in ("pissa", "magnitude", "embed_tokens"))


def test_dora_is_baked_on_request(tmp_path: Path) -> None:
    """Plain factors, whose error the receipt has."""
    source = GOLDEN / "peft" / "llama_dora"
    convert(
        source, to="vllm", out=tmp_path / "out", base=source / "base", rank=8, lossy=True
    )  # fmt: skip
    assert settings_of(tmp_path / "out")["use_dora"] is False
    model = transformers.AutoModelForCausalLM.from_pretrained(source / "base")
    expected = load_file(source / "logits.safetensors")
    with oracle.quiet(), torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
        logits = loaded(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits, expected["adapted"], rtol=0, atol=1e-5)


# -- one rank and scale ----------------------------------------------------------------------------


def module(name: str, rank: int, alpha: float, dtype: torch.dtype = torch.float32) -> AdapterModule:
    a, b = torch.randn(rank, 6).to(dtype), torch.randn(5, rank).to(dtype)
    return AdapterModule("", name, "lora", {"a": held(a), "b": held(b)}, alpha, rank)


def test_one_rank_and_scale_change_no_delta() -> None:
    torch.manual_seed(0)
    modules = [module("x", 2, 3.0), module("y", 4, 6.0), module("z", 3, 1.0)]
    same = uniform(modules)
    assert {(m.rank, m.scale) for m in same} == {(4, 1.5)}  # the commonest scale
    for one, other in zip(modules, same, strict=True):
        torch.testing.assert_close(delta(other), delta(one), rtol=1e-15, atol=1e-15)
        assert other.parts["a"].shape == (4, 6) and other.parts["b"].shape == (5, 4)
    assert same[1] is modules[1]
    assert {m.rank for m in uniform(modules, 16)} == {16}


def test_scales_that_are_the_same_number_are_not_folded() -> None:
    """alpha / rank of other ranks may differ in the last bit."""
    torch.manual_seed(0)
    one = module("x", 3, 0.7 * 3)
    assert one.scale != 0.7 or math.isclose(one.scale, 0.7)
    assert with_scale(one, 0.7) is one
    zero = module("y", 2, 0.0)
    assert not delta(uniform([zero, one])[0]).any()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_names_of_the_file(server: str, tmp_path: Path) -> None:
    """Of a vision model whose file has older names than transformers gives it: the file's, from
    either of them; and the model's again for PEFT."""
    source = GOLDEN / "peft" / "qwen2_vl"
    convert(source, to=server, out=tmp_path / "new", base=source / "base")
    keys = set(load_file(tmp_path / "new" / WEIGHTS))
    start = "base_model.model."
    assert f"{start}visual.blocks.0.attn.qkv.lora_A.weight" in keys
    assert f"{start}model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    convert(tmp_path / "new", to=server, out=tmp_path / "again", base=source / "base")
    assert set(load_file(tmp_path / "again" / WEIGHTS)) == keys
    convert(tmp_path / "new", to="peft", out=tmp_path / "peft", base=source / "base")
    own = load_file(tmp_path / "peft" / WEIGHTS)
    assert load_file(source / WEIGHTS).keys() <= own.keys()
    # a prefix that neither has: the longest end that the base's names share
    odd = tmp_path / "odd"
    odd.mkdir()
    tensors = load_file(source / WEIGHTS)
    renamed = {k.replace("model.language_model.", "thinker.text."): v for k, v in tensors.items()}
    save_file(renamed, odd / WEIGHTS)
    (odd / CONFIG).write_bytes((source / CONFIG).read_bytes())
    convert(odd, to=server, out=tmp_path / "odd-out", base=source / "base")
    assert set(load_file(tmp_path / "odd-out" / WEIGHTS)) == keys


def test_ambiguous_and_unknown_names_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    names = ("text.layers.0.q_proj", "vision.layers.0.q_proj", "text.layers.1.o_proj")
    save_file({f"{name}.weight": torch.zeros(8, 8) for name in names}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    source = tmp_path / "in"
    source.mkdir()
    (source / CONFIG).write_text(json.dumps(settings_of(LLAMA) | {
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    }))  # fmt: skip

    def converted(*names: str) -> set[str]:
        tensors = {}
        for key in (f"base_model.model.{name}.lora_" for name in names):
            tensors |= {f"{key}A.weight": torch.ones(2, 8), f"{key}B.weight": torch.ones(8, 2)}
        save_file(tensors, source / WEIGHTS)
        convert(source, to="vllm", out=tmp_path / "out", base=base, overwrite=True)
        return set(load_file(tmp_path / "out" / WEIGHTS))

    assert any("text.layers.1.o_proj" in key for key in converted("model.layers.1.o_proj"))
    with pytest.raises(Refused, match=r"text\.layers\.0\.q_proj, vision\.layers\.0\.q_proj"):
        converted("model.layers.0.q_proj")
    for name in ("model.layers.7.o_proj", "model.layers.1.k_proj"):
        with pytest.raises(Refused, match="no module of that name"):
            converted(name)
    with pytest.raises(Refused, match="another module of the adapter is it too"):
        converted("text.layers.1.o_proj", "model.layers.1.o_proj")


def test_targets_that_are_single_matrices(tmp_path: Path) -> None:
    """Of target_parameters: PEFT's own format keeps them, servers do not read them."""
    model = oracle.llama()
    model.save_pretrained(tmp_path / "base")
    oracle.train(model, tmp_path / "in", target_modules=[], target_parameters=["q_proj.weight"])
    for base in (None, tmp_path / "base"):
        out = tmp_path / f"peft-{base is None}"
        convert(tmp_path / "in", to="peft", out=out, base=base)
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "in" / WEIGHTS).read_bytes()
        with pytest.raises(Refused, match="q_proj"):
            convert(tmp_path / "in", to="vllm", out=tmp_path / "out", base=base)


def test_names_of_a_training_state(tmp_path: Path) -> None:
    """The adapter's name goes: `.lora_A.default.weight`."""
    source = tmp_path / "in"
    source.mkdir()
    tensors = load_file(LLAMA / WEIGHTS)
    raw = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    save_file(raw, source / WEIGHTS)
    (source / CONFIG).write_bytes((LLAMA / CONFIG).read_bytes())
    convert(source, to="vllm", out=tmp_path / "out", base=LLAMA / "base")
    expected = (GOLDEN / "vllm" / "llama_patterns" / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected


def test_sglang_needs_all_modules_of_a_fused_layer(tmp_path: Path) -> None:
    """Without a base the shapes of the missing parts are not known."""
    with pytest.raises(Refused, match="k_proj"):
        convert(LLAMA, to="sglang", out=tmp_path / "out")
    convert(LLAMA, to="sglang", out=tmp_path / "out", base=LLAMA / "base")
    zeros = [k for k, v in load_file(tmp_path / "out" / WEIGHTS).items() if not v.any()]
    assert len(zeros) == 4 and all("k_proj" in key for key in zeros)
