"""Check that models can be measured, and on the same samples, before any of them runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.strict import strict_json
from adapterkit.core.commands import command
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.verbs.score.variants import Variant
from adapterkit.verbs.stats.data.records import IGNORED
from adapterkit.verbs.stats.data.samples import MOST, Samples
from adapterkit.verbs.stats.model.predictions import Predictions
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.plan import positions_of

TOKENIZER = "tokenizer.json"


@contextmanager
def without_weights(variant: Variant) -> Iterator[StoredModel]:
    """The model as transformers builds it, on the meta device."""
    with Sources(variant.folders, {}) as sources:
        yield StoredModel(variant.base, sources, torch.device("cpu"), buffers=False)


def check_model(variant: Variant) -> Variant:
    """The same model; `Refused` if it does not predict tokens of texts."""
    with without_weights(variant) as stored:
        model = stored.model
        name, problem = type(model).__name__, ""
        if model.main_input_name != "input_ids":
            problem = f"{name} reads {shown(model.main_input_name)}, no text"
        elif model.get_output_embeddings() is None:
            problem = f"{name} predicts no tokens, so it has no loss of them"
    if problem:
        raise Refused(
            problem,
            expected="a model with a loss of its tokens, such as a causal LM",
            where=shown(variant.name),
            hint="remove it from the command",
            code="AK902",
        )
    return variant


def check_samples(
    variants: Sequence[Variant], reference: Variant | None, samples: Samples
) -> list[str]:
    """Notes on models whose tokenizer differs from the first one's, whose tokens the samples are.
    `Refused` with all models that cannot read these samples, or whose predictions have another size
    than the reference's."""
    ids = max(x for s in samples.samples for x in (*s.tokens, *s.labels) if x != IGNORED)
    longest = max(max(len(s.tokens), len(s.labels)) for s in samples.samples)
    errors, kinds, size = Problems(code="AK902"), set[tuple[bool, bool]](), 0
    for variant in (*([reference] if reference is not None else []), *variants):
        where, name = shown(variant.name), shown(variant.folders[0].label)
        alone = "measure it in a command of its own\n"
        alone += command("adapterkit score", name, data="FILE")
        with without_weights(variant) as stored:
            model = stored.model
            own, known, most = Predictions(model), _rows(model), positions_of(model)
            predicted = model.get_output_embeddings().weight.shape[0]
        kinds.add((own.has_decoder, own.is_causal))
        size = size or predicted
        if len(kinds) > 1:
            problem = f"{type(model).__name__} reads samples in another way than the others"
            errors.add(problem, "models of one kind, such as causal LMs", alone, where=where)
        elif ids >= known:
            problem = f"the samples, in the first model's tokens, have id {ids}"
            errors.add(problem, f"ids from 0 to {known - 1}", alone, where=where)
        elif longest > most:
            hint = f"give --length {most}"
            problem = f"a sample has {longest} tokens"
            errors.add(problem, f"at most {most}, the model's positions", hint, where=where)
        elif reference is not None and size != predicted:
            problem = f"the model predicts {predicted} tokens, and the reference {size}"
            errors.add(problem, "models of one vocabulary", "remove --against", where=where)
    errors.raise_all()
    return _tokenizer_notes(variants)


def _rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _tokenizer_notes(variants: Sequence[Variant]) -> list[str]:
    first, *others = {one.folders[0].label: one for one in variants}.values()
    known = _vocabulary(first)
    notes = []
    for one in others:
        theirs = _vocabulary(one)
        if any(known[number] != theirs[number] for number in known.keys() & theirs.keys()):
            where = shown(one.folders[0].label)
            notes.append(f"{where} has another tokenizer: it reads the first model's tokens")
    return notes


def _vocabulary(variant: Variant) -> dict[int, str]:
    """The tokens of a model's own tokenizer by id; empty if it has none that can be read."""
    folder, data = variant.folders[0], variant.texts.get(TOKENIZER, b"")
    if not data and 0 < folder.files().get(TOKENIZER, 0) <= MOST:
        data = folder.path(TOKENIZER).read_bytes()
    try:
        tokenizer = strict_json(data)
        words = tokenizer["model"]["vocab"]
        if isinstance(words, list):  # of pieces and their scores
            words = {word: number for number, (word, _) in enumerate(words)}
        more = {one["id"]: one["content"] for one in tokenizer.get("added_tokens", ())}
        return {number: word for word, number in words.items()} | more
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
