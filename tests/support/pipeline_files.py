"""Pipelines of diffusers on disk, adapters for them as diffusers saves them, and both together."""

import contextlib
import copy
import io
import json
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from tests.support import pipelines

TARGETS = ["to_q", "to_k", "to_out.0", "q_proj", "out_proj", "conv1", "ff.net.2", "ffn.net.2"]
REDIRECTIONS = contextlib.redirect_stdout, contextlib.redirect_stderr
SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@contextlib.contextmanager
def quiet():
    out, err = (redirect(io.StringIO()) for redirect in REDIRECTIONS)
    with out, err, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of several adapters
        yield


def loaded(folder: Path, **options: Any) -> Any:
    """The pipeline that diffusers reads of a folder, without what its index says is not there."""
    index = json.loads((folder / "model_index.json").read_text())
    none = {name: None for name, value in index.items() if value == [None, None]}
    with quiet():
        return DiffusionPipeline.from_pretrained(folder, **none, **options)


def factors(model: Any, seed: int, rank: int = 2, alpha: float = 3) -> tuple[dict, dict]:
    """Random factors for some layers of a model, and what diffusers says of them."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)
    inject_adapter_in_model(config, model, adapter_name="trained")
    model.peft_config = {"trained": config}
    state = get_peft_model_state_dict(model, adapter_name="trained")
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(one.shape, generator=generator) / 4 for key, one in state.items()}
    settings = {key: getattr(config, key) for key in SETTINGS}
    return state, settings | {"target_modules": sorted(config.target_modules or ())}


def lora_file(folder: Path, to: Path, parts: tuple[str, ...], seed: int = 1, **how: Any) -> Path:
    """A file for these parts of a pipeline on disk, as diffusers writes it."""
    to.write_bytes(_lora_of(folder, parts, seed, tuple(how.items())))
    return to


@cache
def _lora_of(folder: Path, parts: tuple[str, ...], seed: int, how: tuple) -> bytes:
    with tempfile.TemporaryDirectory() as home:
        to = Path(home, "lora.safetensors")
        return factors_file(loaded(folder), to, parts, seed, **dict(how)).read_bytes()


def factors_file(pipe: Any, to: Path, parts: tuple[str, ...], seed: int, **how: Any) -> Path:
    """The same for a pipeline as it is."""
    words = {}
    for number, part in enumerate(parts):
        state, settings = factors(copy.deepcopy(pipe.components[part]), seed + number, **how)
        words |= {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": settings}
    pipe.save_lora_weights(to.parent, weight_name=to.name, **words)
    return to


def with_adapters(folder: Path, files: Mapping[Path, float], **options: Any) -> Any:
    """The base with adapters as diffusers loads them."""
    pipe = loaded(folder)
    names = [f"a{number}" for number in range(len(files))]
    with quiet():
        for name, file in zip(names, files, strict=True):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, **options)
        pipe.set_adapters(names, list(files.values()))
    return pipe


def assert_outputs(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """What all models of two pipelines give is the same but for rounding."""
    ours, theirs = pipelines.outputs(one), pipelines.outputs(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
