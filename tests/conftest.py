"""Fixtures that the suites share: tiny checkpoints and adapters, made once a session and never written to."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for folder in (
    "merge",
    "combine",
    "quantized",
    "weights",
):  # for `oracle`, `shared`, `forged`, `tiny`
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder that `build(folder)` fills, made at the first request for `name`."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(name: str, build: Callable[[Path], None]) -> Path:
        if name not in known:
            folder = root / name
            folder.mkdir(parents=True)
            build(folder)
            known[name] = folder
        return known[name]

    return make


@pytest.fixture
def llama(made: Callable[..., Path]) -> Path:
    """A two-layer Llama in bfloat16, embeddings not tied."""
    import oracle

    return made("llama", lambda folder: oracle.save_base(oracle.llama(), folder, "bf16"))


@pytest.fixture
def lora(made: Callable[..., Path], llama: Path) -> Path:
    """A LoRA on every linear layer of `llama`."""
    import oracle

    return made(
        "lora",
        lambda folder: oracle.train(
            oracle.load(oracle.llama, llama), folder, target_modules=oracle.LINEAR
        ),
    )


@pytest.fixture
def other_lora(made: Callable[..., Path], llama: Path) -> Path:
    """A LoRA of another rank on the attention of `llama`."""
    import oracle

    config = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7}
    return made(
        "other_lora",
        lambda folder: oracle.train(oracle.load(oracle.llama, llama), folder, seed=2, **config),
    )
