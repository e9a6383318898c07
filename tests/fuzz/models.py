"""Tiny random models of any type that transformers knows, in any of its classes, and inputs for
them."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.support import tiny
from tests.support.oracle import quiet

KINDS = tuple(sorted(CONFIG_MAPPING_NAMES))
AUTO_CLASSES = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification", "AutoModelForAudioClassification", "AutoModelForCTC",
    "AutoModelForPreTraining", "AutoModelForMaskGeneration",
)  # fmt: skip
TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
LARGEST = 4_000_000  # parameters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A checkpoint on disk, the class that reads it, and the task that the class is for."""

    folder: Path
    cls: type
    task: str | None
    dtype: str

    def load(self, dtype: torch.dtype | str = "auto") -> transformers.PreTrainedModel:
        with quiet():
            return self.cls.from_pretrained(self.folder, dtype=dtype).eval()


class Unusable(Exception):
    """A model that transformers cannot make tiny, save, or read back: no oracle."""


def save_base(kind: str, rng: random.Random, folder: Path, *, tie: bool | None = None) -> Base:
    """A random model of the type in one of its classes, saved; `Unusable` where transformers does
    not read back what it saves."""
    config = _config(kind)
    names = [
        n
        for n in AUTO_CLASSES
        if hasattr(transformers, n) and type(config) in getattr(transformers, n)._model_mapping
    ]
    if not names:
        raise Unusable("no class")
    name = rng.choice(names)
    tie = rng.random() < 0.5 if tie is None else tie
    for part in (
        config,
        *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig)),
    ):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tie
    try:
        # some classes have their own mind of the switch
        config = type(config).from_dict(config.to_dict())
    except Exception as error:  # sizes that do not fit together
        raise Unusable(f"config: {error}") from error
    dtype = rng.choice(sorted(DTYPES))
    model = _random_model(getattr(transformers, name), config, rng.randrange(2**31)).to(
        DTYPES[dtype]
    )
    try:
        with quiet():
            model.save_pretrained(folder)
            back, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    except Exception as error:  # any model's own code
        raise Unusable(f"saving: {error}") from error
    if any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise Unusable("not read back by transformers")
    if getattr(back.config, "tie_word_embeddings", None) != getattr(
        model.config, "tie_word_embeddings", None
    ):
        raise Unusable("its class does not keep tie_word_embeddings")
    return Base(folder, type(model), TASKS.get(name), dtype)


def _config(kind: str):
    try:
        with quiet():
            config = tiny.shrink(transformers.AutoConfig.for_model(kind))
            settings = config.to_dict()
            if "per_layer_config" in str(settings):  # of the layers that were there before
                config = type(config).from_dict(_without(settings, "per_layer_config"))
            return config
    except Exception as error:  # configs that need arguments, or a file from the Hub
        raise Unusable(f"config: {error}") from error


def _without(settings: dict, key: str) -> dict:
    return {
        k: _without(v, key) if isinstance(v, dict) else v for k, v in settings.items() if k != key
    }


def _random_model(auto, config, seed: int) -> transformers.PreTrainedModel:
    try:
        with quiet():
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > LARGEST:
                raise Unusable(f"{size:,} parameters")
            torch.manual_seed(seed)
            model = auto.from_config(config)
    except Unusable:
        raise
    except Exception as error:  # sizes that do not fit together
        raise Unusable(f"building: {error}") from error
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point():
                tensor.normal_(
                    mean=1.0 if tensor.dim() == 1 and bool((tensor == 1).all()) else 0.0, std=0.05
                )
    return model.eval()


def outputs(
    model: torch.nn.Module, plain: transformers.PreTrainedModel, *, gradients: bool = False
) -> dict[str, torch.Tensor] | None:
    """All float tensors that the model's forward gives on fixed inputs; None where no inputs of
    ours suit it."""
    for candidate in _inputs(plain):
        try:
            with quiet(), torch.set_grad_enabled(gradients):
                transformers.set_seed(0)  # some models draw, by numpy too
                actual = model(**candidate)
        except Exception:  # a model that wants other inputs
            continue
        tensors = {k: v for k, v in actual.items() if torch.is_tensor(v) and v.is_floating_point()}
        if tensors:
            return tensors
    return None


def _inputs(model: transformers.PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    ids = torch.randint(6, 40, (2, 7), generator=generator)
    text = {"input_ids": ids}
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    actual = [text, text | {"decoder_input_ids": ids}]
    vision = getattr(model.config, "vision_config", None) or model.config
    size = getattr(vision, "image_size", None)
    if isinstance(size, int) and size <= 256:
        pixels = torch.randn(
            2, getattr(vision, "num_channels", 3), size, size, generator=generator
        ).to(dtype)
        actual += [{"pixel_values": pixels}, text | {"pixel_values": pixels}]
    if getattr(config, "hidden_size", None) and model.main_input_name == "input_values":
        actual.append({"input_values": torch.randn(2, 4000, generator=generator).to(dtype)})
    actual.append({"input_ids": ids[:1]})  # a classifier without a padding token
    return actual
