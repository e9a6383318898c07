"""Sums of models over samples, as `score` measures them, and by transformers on the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit
from adapterkit.verbs.score import job
from tests.support.texts import WORDS

IGNORED = -100
Rows = Sequence[tuple[list[int], list[int]]]  # tokens and labels of samples


def measured(*models: Path, data: Path, **options: Any) -> dict[str, Tensor]:
    """The sums of each sample (samples, 4) float64 by the model's name, in the order of the models:
    tokens, losses, divergences and equal first tokens."""
    rows: list[tuple[Any, Any]] = []

    def noted(given: Sequence, *more: Any) -> Any:
        rows.extend(given)
        return score_rows(given, *more)

    score_rows = job.score_rows
    with mock.patch.object(job, "score_rows", noted):
        adapterkit.score(list(map(str, models)), data=data, **options)
    return {variant.name: sums.table for variant, sums in rows}


def losses(model: nn.Module, rows: Rows) -> Tensor:
    """Transformers' own mean loss of each sample, float64."""
    actual = []
    for tokens, labels in rows:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            loss = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([labels])
            ).loss
        actual.append(loss.double())
    return torch.stack(actual)


def counted(model: nn.Module, rows: Rows) -> Tensor:
    """How many labels of each sample a loss counts."""
    is_masked = type(model).__name__.endswith("ForMaskedLM")
    shift = 0 if model.config.is_encoder_decoder or is_masked else 1
    return torch.tensor([sum(x != IGNORED for x in labels[shift:]) for _, labels in rows]).double()


def assert_losses(actual: Tensor, model: nn.Module, rows: Rows, tolerance: float = 1e-5) -> None:
    """The sums are transformers' losses times the tokens that count, and tell models apart."""
    expected, tokens = losses(model, rows), counted(model, rows)
    assert torch.equal(actual[:, 0], tokens)
    torch.testing.assert_close(actual[:, 1] / tokens, expected, rtol=tolerance, atol=tolerance)
    uniform = torch.tensor(float(model.config.get_text_config().vocab_size)).log()
    assert float((expected - uniform).abs().max()) > 1e-3  # not those of a model without weights


def ids_of(text: str) -> list[int]:
    """The tokens of a text, by the tokenizer of tests.support.texts."""
    merged = text.replace("th", "\1").replace("s ", "\2")
    names = {"\1": "th", "\2": "s "}
    return [WORDS.index(names.get(letter, letter)) for letter in merged]


def random_rows(count: int = 4, vocabulary: int = 60, decoder: bool = False) -> Rows:
    """Samples of several lengths, some of whose labels do not count."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda size: torch.randint(6, vocabulary, (size,), generator=generator).tolist()
    rows = []
    for number in range(count):
        tokens = draw(5 + 3 * number)
        labels = draw(3 + number) if decoder else [IGNORED] * number + tokens[number:]
        rows.append((tokens, labels))
    return rows


def in_jsonl(rows: Rows) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens, "labels": labels} for tokens, labels in rows]


def logits_of(model: nn.Module, rows: Rows) -> list[Tensor]:
    """Of a causal model, (n, vocabulary) float64 of each sample at positions whose next token
    counts."""
    actual = []
    for tokens, labels in rows:
        at = [n for n, label in enumerate(labels[1:]) if label != IGNORED]
        with torch.no_grad():
            actual.append(model(torch.tensor([tokens])).logits[0, at].double())
    return actual


def divergences(own: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ KL(other ‖ own) and Σ equal first tokens of each sample."""
    pairs = [(F.log_softmax(p, -1), F.log_softmax(q, -1)) for p, q in zip(other, own, strict=True)]
    kl = torch.stack([(p.exp() * (p - q)).sum() for p, q in pairs])
    same = torch.stack([(p.argmax(-1) == q.argmax(-1)).sum() for p, q in pairs])
    return kl, same.double()
