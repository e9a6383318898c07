"""Build config.json of a GGUF file as transformers does from the metadata, and add settings that
its tables lack.

Metadata that transformers would ignore silently is refused, or noted if a default replaces it.
"""

import json
import math
from typing import Any

from adapterkit.bases.gguf.file import GgufFile, conversion_rules
from adapterkit.core.errors import Damaged, shown
from adapterkit.core.records import Json
from adapterkit.core.weights.safe_config import safe_config

MAX_LAYERS = 1000  # or as many as the file has tensors
MAX_EXPERTS = 1 << 16
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# metadata of an architecture that other keys say as well
REDUNDANT = (
    "vocab_size",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "tensor_data_layout",
)
# metadata that transformers' tables of some architectures lack, by the config's name for it
SUPPLEMENTS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def check_counts(file: GgufFile) -> None:
    """`Damaged` for implausible numbers of layers and experts, because they decide the size of the
    model that is built; `Refused` for falcon's groups, and for GLM's sections of positions."""
    for key, value in file.header.metadata.items():
        limit = max(MAX_LAYERS, len(file.entries)) if key.endswith("block_count") else MAX_EXPERTS
        if not key.endswith(("block_count", "expert_count")):
            continue
        if type(value) is not int or not 0 <= value <= limit:
            problem, hint = f"{shown(key)} is {shown(value)}", "download the file again"
            file.errors.add(problem, f"at most {limit}", hint, kind=Damaged, code="AK405")
    heads = file.header.metadata.get("falcon.attention.head_count_kv", 1)
    # llama.cpp sorts the rows of groups, and transformers does not sort them back
    if file.architecture == "falcon" and heads != 1:
        problem = f"falcon with {shown(heads)} groups of keys"
        file.errors.add(problem, "falcon with one", code="AK405")
    # of vision-language models, whose rows of q and k llama.cpp reorders
    if file.architecture == "glm4" and "glm4.rope.dimension_sections" in file.header.metadata:
        file.errors.add(
            "glm4 with sections of positions", "a language model without them", code="AK405"
        )
    file.errors.raise_all()


def config_arguments(file: GgufFile) -> Json:
    """The arguments of a config as transformers reads them from the metadata."""

    def read() -> Json:
        if file.architecture in conversion_rules():
            from transformers.integrations.gguf.gguf_config_mapping import (
                GGUF_CONFIG_ARCHS,
                get_gguf_config,
            )
            from transformers.integrations.gguf.reader import read_gguf_metadata

            if file.architecture in GGUF_CONFIG_ARCHS:
                with file.transformers_copy() as copy:
                    return get_gguf_config(*read_gguf_metadata(str(copy)))
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        # it takes 20 s to read a large vocabulary, of which the config has the size only
        with file.transformers_copy(file.header.without("tokenizer.")) as copy:
            config = load_gguf_checkpoint(str(copy), return_tensors=False)["config"]
        tokens = file.header.metadata.get("tokenizer.ggml.tokens")
        return config if tokens is None else {"vocab_size": int(tokens)} | config

    return file.call_transformers("config", read)


def config_of(file: GgufFile, arguments: Json) -> Json:
    """config.json of the model: the settings that differ from its class's defaults, and those that
    the file states."""
    from transformers import AutoConfig

    call = file.call_transformers
    stated = safe_config(arguments)
    defaults = call("config", lambda: AutoConfig.for_model(**stated).to_dict())
    unread = _unread_metadata(file)
    stated |= {
        name: unread[key]
        for key, name in SUPPLEMENTS.items()
        if key in unread and name in defaults and name not in stated
    }
    record = call("config", lambda: AutoConfig.for_model(**stated))
    full = call("config", lambda: json.loads(record.to_json_string(use_diff=False)))
    keys = {*call("config", record.to_diff_dict), *stated}
    keys |= {"rope_parameters", "model_type", "tie_word_embeddings"}
    keys -= {"_name_or_path", "dtype", "torch_dtype"}
    config = {key: _shortest(value) for key, value in full.items() if key in keys}
    if not config.get("architectures"):
        config["architectures"] = [class_name_of(file, str(config.get("model_type")))]
    _set_rope_scaling(file, config)
    ignored = [
        key
        for key in unread
        if not key.startswith("rope.scal")
        and SUPPLEMENTS.get(key) not in config
        and key not in REDUNDANT
    ]
    if ignored:
        names = ", ".join(map(shown, ignored[:20]))
        file.notes.append(f"the config has transformers' defaults for: {names}")
    return config


def class_name_of(file: GgufFile, model_type: str) -> str:
    """Name of transformers' language model of that type."""
    from transformers.models.auto import modeling_auto

    tables: Any = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for table in tables:
        if model_type in table:
            name = table[model_type]
            return name if isinstance(name, str) else name[0]
    problem = f"no language model of type {shown(model_type)}"
    file.errors.fail(problem, "an architecture that transformers knows", code="AK405")


def _unread_metadata(file: GgufFile) -> Json:
    """List metadata of the architecture that transformers ignores."""
    if file.architecture in conversion_rules():
        return {}  # its rules read every key they need by name
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    plain = lambda name: name.replace("_", "").replace("-", "")
    tables = [
        table
        for architecture, table in GGUF_TO_TRANSFORMERS_MAPPING["config"].items()
        if plain(architecture) == plain(file.architecture)
    ]
    known = {key for table in tables for key, name in table.items() if name is not None}
    return {key: value for key, value in _own_metadata(file, ".").items() if key not in known}


def _own_metadata(file: GgufFile, prefix: str) -> Json:
    """Metadata whose keys begin with the architecture and a prefix, except these."""
    prefix = file.architecture + prefix
    metadata = file.header.metadata.items()
    return {key.removeprefix(prefix): value for key, value in metadata if key.startswith(prefix)}


def _set_rope_scaling(file: GgufFile, config: Json) -> None:
    """Put the scaling of rotary positions into the config, because transformers leaves it out."""
    settings = {
        key: value for key, value in _own_metadata(file, ".rope.").items() if key.startswith("scal")
    }
    kind = settings.pop("scaling.type", None)
    factor = settings.pop("scaling.factor", settings.pop("scale_linear", None))
    original = settings.pop("scaling.original_context_length", None)
    settings.pop("scaling.finetuned", None)
    scaling: Json = {}
    if FREQUENCIES in file.entries:
        scaling = _llama3_scaling(file, config)
    elif kind in ("linear", "yarn") or (kind is None and factor not in (None, 0.0, 1.0)):
        scaling = {"rope_type": kind or "linear", "factor": factor}
        if kind == "yarn" and original:
            scaling["original_max_position_embeddings"] = original
    elif kind not in (None, "none"):
        settings["scaling.type"] = kind
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        parameters = parameters["full_attention"]  # Gemma scales these layers only
    fits = isinstance(parameters, dict) and (
        not scaling or type(factor) is float or "low_freq_factor" in scaling
    )
    if settings or (scaling and not fits):
        pairs = ", ".join(
            f"{shown(key)} is {shown(value)}" for key, value in {**settings, **scaling}.items()
        )
        expected = "linear or yarn scaling by a factor, or Llama 3's"
        file.errors.fail(f"positions scaled by rope.{pairs}", expected, code="AK405")
    if scaling and isinstance(parameters, dict):
        parameters.update({key: _shortest(value) for key, value in scaling.items()})


def _llama3_scaling(file: GgufFile, config: Json) -> Json:
    """Llama 3's scaling, whose factors alone a file stores; `Refused` unless its settings give the
    same factors (1e-4)."""
    import numpy as np

    entry = file.entries[FREQUENCIES]
    parameters = config.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    factors = np.ones(0)
    if entry.kind == 0 and entry.stop - entry.start < 1 << 16:
        data = file.folder.read(entry.file, entry.start, entry.stop)
        factors = np.frombuffer(data, dtype="<f4").astype(np.float64)
    valid = len(factors) and np.isfinite(factors).all()
    if valid and isinstance(theta, int | float) and theta > 0:
        wave = 2 * math.pi * float(theta) ** (np.arange(len(factors)) / len(factors))
        largest, old = float(factors.max()), LLAMA3["original_max_position_embeddings"]
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        smooth = np.clip((old / wave - low) / (high - low), 0, 1)
        scaled = lambda: 1 / ((1 - smooth) / largest + smooth)
        if largest > 0 and np.allclose(scaled(), factors, rtol=1e-4):
            return {"rope_type": "llama3", "factor": largest, **LLAMA3}
    file.errors.fail(f"{FREQUENCIES} of an unknown rule", "the factors of Llama 3", code="AK405")


def _shortest(value: object) -> Any:
    """Shorten floats of a header, which are float32: 9.999999747378752e-06 becomes 1e-05."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
