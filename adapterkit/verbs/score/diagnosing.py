"""diagnose: compare a model's loss with that of its base with the adapters on it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.errors import Failed
from adapterkit.core.options import Progress, StrPath, files
from adapterkit.verbs.score.job import measured, measured_texts
from adapterkit.verbs.score.options import SampleOptions
from adapterkit.verbs.score.results import mean_per_token
from adapterkit.verbs.score.variants import stored, with_adapters


@torch.inference_mode(False)
def other_predictions(
    model: Folder,
    base: Folder,
    adapters: Sequence[Folder],
    data: Sequence[StrPath],
    samples: int,
    progress: Progress,
) -> tuple[str, str] | None:
    """(problem, evidence) if the model's loss on texts is not that of the base with the adapters:
    not finite, or, by more than the noise of the samples, farther from it than from the base's or
    than that is."""
    live = with_adapters(base, [(one, 1.0) for one in adapters])
    every = [stored(model), live, stored(base)]
    options = SampleOptions(samples=samples)
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as work:
        texts = measured_texts(every[-1], files(data), options, Path(work))
        try:
            own, both, alone = measured(every, texts, options, Path(work), progress)
        except Failed as error:
            return error.problem, error.where
    tokens = own.tokens
    more = mean_per_token(own.losses - both.losses, tokens)
    every_loss = [float(one.losses.sum() / tokens.sum()) for one in (own, both, alone)]
    model_loss, expected, without = every_loss
    near = min(abs(model_loss - without), abs(expected - without))
    if more.has_zero or abs(model_loss - expected) < near:
        return None
    count, number = texts.about["tokens"], texts.about["samples"]
    return (
        "the model does not do what base and adapter do together",
        f"loss {model_loss:.4f} nats per token; the base with the adapters has {expected:.4f}, the "
        f"base alone {without:.4f} ({count:,} tokens of {number:,} samples)",
    )
