"""Tiny bases with tokenizers, and data for them; sizes at which they are run as large ones are."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.verbs.stats import plan
from adapterkit.verbs.stats.data.samples import load_tokenizer, tokenize_all
from adapterkit.verbs.stats.model import activations
from adapterkit.verbs.stats.model import layers as units
from tests.support import oracle
from tests.support.texts import save_tokenizer, write_rows

TEXTS = ["who is that?", "me", "the others are there.", "no, they were", "h", "is this it?"]
MODELS = {"masked_bert": lambda: oracle.bert("BertForMaskedLM")}


@pytest.fixture(autouse=True)
def tokens_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers run in this process: one of their own takes a second to start. That it gives the
    same samples is a test of tests/hostile/test_tokenizers.py."""
    here = lambda folder, records, options: tokenize_all(records, load_tokenizer(folder), options)
    monkeypatch.setattr(plan, "tokenize_apart", here)


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of an oracle's model in float32, with a tokenizer."""

    def make(name: str = "llama") -> Path:
        def build(folder: Path) -> None:
            model = MODELS[name]() if name in MODELS else getattr(oracle, name)()
            if model.config.is_encoder_decoder:
                model.config.decoder_start_token_id = 1
            oracle.save_base(model, folder, "fp32")
            save_tokenizer(folder)

        return cached_folder(f"with-tokenizer-{name}", build)

    return make


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": text, "completion": f" {text[::-1]}"} for text in TEXTS]
    return write_rows(tmp_path / "pairs.jsonl", *rows)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and heads are units, and activations go to the file."""
    monkeypatch.setattr(units, "LARGE", 1)
    monkeypatch.setattr(activations, "SMALL", 1)
