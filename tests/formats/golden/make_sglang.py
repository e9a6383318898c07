"""What SGLang makes of adapters that are converted for it: `python -m
tests.formats.golden.make_sglang WHEEL FOLDER`.

SGLang's own loader, of the wheel `sglang` 0.5.23 (`pip download sglang --no-deps`): `LoRAConfig`
and `LoRAAdapter` read the files and put q, k and v, and gate and up, together. Everything else of
the package is replaced by empty classes.

`sglang/<case>` is the conversion of a golden adapter of PEFT, and `sglang.safetensors` beside it
what SGLang has of it: its own keys, and the scale.
"""

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.formats.golden.servers import SERVED, Empty, record, unpack

REAL = {
    "sglang.srt.layers.utils.common",
    "sglang.srt.lora.lora",
    "sglang.srt.lora.lora_config",
    "sglang.srt.lora.utils",
}
CASES = {
    "llama_embeddings": "peft/llama_embeddings",
    "llama_patterns": "peft/llama_patterns",
    "mixtral": "peft/mixtral",
    "qwen3_moe": "peft-per-expert/qwen3_moe",
}
# stacks along an axis, of which one factor may be shared
STACKS = {"stacked": "expert-stacks/stacked", "shared": "expert-stacks/shared"}


class Sglang:
    """The loader of one wheel."""

    def __init__(self, wheel: Path, place: Path):
        unpack(wheel, place, REAL)
        common: Any = importlib.import_module("sglang.srt.layers.utils.common")
        utils: Any = Empty("sglang.srt.layers.utils")
        utils.get_layer_id = common.get_layer_id
        sys.modules["sglang.srt.layers.utils"] = utils
        self.config = importlib.import_module("sglang.srt.lora.lora_config").LoRAConfig
        self.adapter = importlib.import_module("sglang.srt.lora.lora").LoRAAdapter

    def read(self, folder: Path, base: Path) -> dict[str, torch.Tensor]:
        """The tensors of an adapter on a base, as SGLang has them."""
        config = json.loads((base / "config.json").read_text())
        settings = types.SimpleNamespace(**config.get("text_config", config))
        own = self.config(str(folder), base_vocab_size=settings.vocab_size)
        assert own.lora_added_tokens_size == 0 and not own.use_dora
        adapter = self.adapter("", own, settings, None, None)
        adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
        tensors = {"scale": torch.tensor(adapter.scaling)} | dict(adapter.embedding_layers)
        for layer in adapter.layers:
            tensors |= layer.weights
        return tensors


def main(wheel: Path, golden: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        sglang = Sglang(wheel, Path(place))
        record(golden, "sglang", CASES | STACKS, sglang.read)
        record(golden / "served", "sglang", SERVED, sglang.read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
