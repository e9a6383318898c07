"""Embeddings whose vocabulary was resized: PEFT stores them whole in an adapter's file."""

import json
from pathlib import Path

from torch import Tensor

from adapterkit.planning.inputs.model_config import vocabulary_sizes
from adapterkit.runtime.state import State


def resized_embeddings(state: State, base: str | None) -> dict[str, Tensor]:
    """Parameters of the input embedding and the head by name, where the base's config tells another
    size; nothing where that config is neither in a folder nor in the Hub's cache."""
    model = state.model
    ask = getattr(model, "get_input_embeddings", None)
    config = _stored_config(base) if ask is not None and base else {}
    sizes = vocabulary_sizes(config)
    if not sizes or getattr(model.config, "vocab_size", None) in {None, *sizes}:
        return {}
    # nn.Module types its attributes as Tensor or Module
    embeddings = [ask(), model.get_output_embeddings()]  # type: ignore[misc,operator]
    return {
        f"{path}.{leaf}": parameter
        for path, module in state.modules.items()
        if any(module is embedding for embedding in embeddings)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _stored_config(base: str) -> dict:
    from transformers.utils.hub import cached_file

    path = cached_file(
        base,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
