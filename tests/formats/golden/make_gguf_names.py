"""What the `gguf` package calls the modules of our tables for GGUF.

    python make_gguf_names.py

Versions: gguf 0.19.0.
"""

import json
from pathlib import Path

import gguf

from adapterkit.adapters.formats.library import architectures, format_named
from adapterkit.adapters.formats.modules.names import rules_of

OUT = Path(__file__).parent / "gguf_names.json"
NUMBERS = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}


def name_of(table: gguf.TensorNameMap, module: str) -> str | None:
    """As the converter asks: without the word of models that see, the experts of a layer merged
    under the name of their matrices."""
    text = module.replace("language_model.", "").replace("{N}", "0").replace(".{M}.", ".")
    found = table.get_name(text) or table.get_name(
        text.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
    )
    return found and found.replace("blk.0.", "blk.{N}.")


def main() -> None:
    names: dict[str, dict[str, str | None]] = {}
    for architecture in format_named("gguf").names.architectures:
        table = gguf.get_tensor_name_map(NUMBERS[architecture], 1)
        rules = rules_of(architectures()[architecture], "")
        modules = [module for rule in rules for module in rule.model]
        names[architecture] = {module: name_of(table, module) for module in modules}
    OUT.write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
