"""Make the golden adapters of Megatron-Bridge: `python make_megatron_bridge.py REPO FOLDER`.

REPO: a clone of NVIDIA-NeMo/Megatron-Bridge at 067f987. The functions of its `peft_bridge.py` that
turn exported factors into PEFT's files run here by themselves, as `AutoBridge.save_hf_adapter`
calls them; the factors are random, under the names that the exporter gives them. torch 2.13.0.

Exports without stacks are PEFT's files, and are among them. Exports for servers keep the names and
axes of the exporter: a factor that all experts share is (1, ...), and if the model's file numbers
the experts, the other one has their numbers (`_stream_shared_outer_adapter_weights`).
`truth.safetensors` has what Megatron multiplies, by the names of the exporter: a (E, r, in) and
b (E, out, r) of a stack.
"""

import ast
import json
import re
import shutil
import sys
import types
from collections import defaultdict, namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SOURCE = "src/megatron/bridge/models/conversion/peft_bridge.py"
HFWeightTuple = namedtuple("HFWeightTuple", ["param_name", "weight"])
HIDDEN, INNER, EXPERTS, RANK = 8, 6, 3, 2


def functions(repo: Path) -> Any:
    """The functions of the module, without its imports and classes."""
    tree = ast.parse((repo / SOURCE).read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kept += [n for n in tree.body if isinstance(n, ast.Assign) and "_HF_LORA" in ast.unparse(n)]
    module = types.ModuleType("peft_bridge")
    module.__dict__.update(torch=torch, defaultdict=defaultdict, PEFT=object, Iterable=Iterable)
    module.__dict__.update(Dict=dict, List=list, Optional=Any, Union=Any)
    code = "from __future__ import annotations\n" + "\n".join(map(ast.unparse, kept))
    dora = types.ModuleType("megatron.bridge.peft.dora")
    # an attribute that a checker does not expect of a module made by hand
    dora.DoRA = type("DoRA", (), {})
    for name in ("megatron", "megatron.bridge", "megatron.bridge.peft"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[dora.__name__] = dora
    exec(code, module.__dict__)
    return module


def factors(out: int, width: int, rank: int = RANK, experts: int | None = None) -> Any:
    lead = () if experts is None else (experts,)
    return torch.randn(*lead, rank, width), torch.randn(*lead, out, rank)


def dense() -> dict[str, Any]:
    """q, k, v of one fused adapter (one a), a projection, gate and up of one fused adapter."""
    pairs = {}
    layer = "model.layers.0."
    a = factors(HIDDEN, HIDDEN)[0]
    for name, out in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        pairs[f"{layer}self_attn.{name}"] = (a, factors(out, HIDDEN)[1])
    pairs[f"{layer}self_attn.o_proj"] = factors(HIDDEN, HIDDEN, 3)
    return pairs


def stacked() -> dict[str, Any]:
    home = "model.language_model.layers.0.mlp.experts."
    return {
        f"{home}gate_up_proj": factors(2 * INNER, HIDDEN, experts=EXPERTS),
        f"{home}down_proj": factors(HIDDEN, INNER, experts=EXPERTS),
        "model.language_model.layers.0.self_attn.o_proj": factors(HIDDEN, HIDDEN),
    }


def each() -> dict[str, Any]:
    """Fused gate and up of each expert, split by the exporter: they have one a."""
    pairs = {}
    for expert in range(EXPERTS):
        home = f"model.layers.0.mlp.experts.{expert}."
        a, b = factors(2 * INNER, HIDDEN)
        pairs |= {
            f"{home}gate_proj": (a, b[:INNER].clone()),
            f"{home}up_proj": (a, b[INNER:].clone()),
        }
        pairs[f"{home}down_proj"] = factors(HIDDEN, INNER)
    return pairs


def serving(shared: bool) -> dict[str, Any]:
    """The stacks of a model whose file has them too."""
    home = "model.layers.0.mlp.experts."
    a, b = factors(2 * INNER, HIDDEN, 3, EXPERTS)
    c, d = factors(HIDDEN, INNER, experts=EXPERTS)
    pairs = {"model.layers.0.self_attn.o_proj": factors(HIDDEN, HIDDEN)}
    pairs[f"{home}gate_up_proj"] = (a[:1] if shared else a, b)
    return pairs | {f"{home}down_proj": (c, d[:1] if shared else d)}


def numbered() -> dict[str, Any]:
    """Shared factors next to those of each expert, in a model whose file numbers them."""
    home = "model.layers.0.mlp.experts."
    tensors = {}
    a, b = factors(2 * INNER, HIDDEN, experts=EXPERTS)
    c, d = factors(HIDDEN, INNER, experts=EXPERTS)
    for name in ("gate_proj", "up_proj"):
        tensors[f"{home}{name}.lora_A.weight"] = a[:1]
    tensors[f"{home}down_proj.lora_B.weight"] = d[:1]
    for expert in range(EXPERTS):
        for name, rows in (("gate_proj", b[expert, :INNER]), ("up_proj", b[expert, INNER:])):
            tensors[f"{home}{expert}.{name}.lora_B.weight"] = rows
        tensors[f"{home}{expert}.down_proj.lora_A.weight"] = c[expert]
    return tensors


def flat(pairs: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.lora_{letter}.weight": tensor
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def write_served(bridge: Any, folder: Path, tensors: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = [HFWeightTuple(*one) for one in tensors.items()]
    config = bridge.build_adapter_config_dict(
        types.SimpleNamespace(dim=RANK, alpha=3, dropout=0.1),
        target_modules=bridge.infer_target_modules_from_adapter_weights(tensors),
        base_model_name_or_path="base",
        rank_pattern=bridge.infer_rank_pattern_from_adapter_weights(
            [one for one in weights if not re.search(r"experts\.\d", one.param_name)],
            default_rank=RANK,
        ),
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    state = {f"base_model.model.{key}": one.clone() for key, one in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors")


def write(bridge: Any, folder: Path, pairs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = [
        HFWeightTuple(f"{name}.lora_{letter}.weight", tensor)
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    ]
    state, modules, parameters = bridge.convert_adapter_weights_to_peft_state(weights)
    config = bridge.build_adapter_config_dict(
        types.SimpleNamespace(dim=RANK, alpha=3, dropout=0.1),
        target_modules=bridge.infer_target_modules_from_adapter_weights(modules),
        target_parameters=parameters,
        base_model_name_or_path="base",
        rank_pattern=bridge.infer_rank_pattern_from_adapter_weights(weights, default_rank=RANK),
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    state = {key: tensor.clone() for key, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    truth = {name: tensor.clone().contiguous() for name, tensor in weights}
    save_file(truth, folder / "truth.safetensors")


def main(repo: Path, out: Path) -> None:
    torch.manual_seed(0)
    bridge = functions(repo)
    write(bridge, out / "peft" / "megatron-bridge", dense())
    write(bridge, out / "megatron-bridge" / "stacked", stacked())
    write(bridge, out / "peft-per-expert" / "megatron-bridge", each())
    model = out / "peft-per-expert" / "qwen3_moe" / "base"  # of the same sizes
    shutil.copytree(model, out / "peft-per-expert" / "megatron-bridge" / "base", dirs_exist_ok=True)
    torch.manual_seed(1)
    cases = {name: flat(serving(name == "shared")) for name in ("stacked", "shared")}
    for name, tensors in (cases | {"numbered": numbered()}).items():
        write_served(bridge, out / "expert-stacks" / name, tensors)
        shutil.copytree(model, out / "expert-stacks" / name / "base", dirs_exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
