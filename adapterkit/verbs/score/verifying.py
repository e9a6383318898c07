"""verify: measure the loss of an output next to those of its inputs."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapterkit.bases.quantized.records.dequantize import Dequantize
from adapterkit.bases.quantized.records.quantize import Quantize
from adapterkit.core.errors import Refused, shown
from adapterkit.core.inputs.sources import open_adapter, open_model
from adapterkit.core.inputs.weights_file import open_with_weights
from adapterkit.core.merge.verb import Merge, MergeOptions
from adapterkit.core.options import files, weighted
from adapterkit.core.records import Json
from adapterkit.core.verify.report import check_inputs
from adapterkit.core.verify.verb import Verify
from adapterkit.many.workflows.rerun_output import verb_in
from adapterkit.verbs.score.job import measured, measured_texts, score_document
from adapterkit.verbs.score.options import SampleOptions
from adapterkit.verbs.score.variants import Variant, stored, with_adapters

HINT = "give --base and --adapter"


def score_output(verify: Verify, receipt: Json) -> Json:
    """The document of a score of the output, its base, and the base with the adapters on it, from
    whose predictions the others' distance is measured. `Refused` for outputs that are no models,
    and for inputs that are missing or not the receipt's."""
    verb = verb_in(receipt, verify.folder, _given(verify, receipt), HINT)
    if not isinstance(verb, Merge | Quantize | Dequantize):
        raise Refused(
            f"this is an output of {shown(verb.name)}: its loss is not measured",
            expected="an output of merge, quantize or dequantize",
            where="--data",
            hint="remove --data",
            code="AK107",
        )
    check_inputs(verb.plan(), receipt)
    variants = _variants(verb)
    out = replace(stored(open_model(verify.folder)), name=os.fspath(verify.folder))
    options = SampleOptions(samples=verify.samples)
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as work:
        texts = measured_texts(variants[0], files(verify.data), options, Path(work))
        every = [variants[-1], out, *variants]
        sums = measured(every, texts, options, Path(work), verify.progress, compared=True)
        return score_document(every, sums, texts, True)


def _given(verify: Verify, receipt: Json) -> Json:
    """The inputs that the options name, with the weights of the receipt's call."""
    if verify.base is None:
        return {}
    sources: Sequence = [source for source, _ in weighted(verify.adapters)]
    weights = [weight for _, weight in weighted(receipt.get("call", {}).get("adapters", ()))]
    if len(weights) == len(sources):
        sources = [*zip(sources, (1.0 if w is None else w for w in weights), strict=True)]
    more = {"stats": verify.stats, "imatrix": verify.imatrix}
    given = {"base": verify.base, "adapters": sources} | more
    return {name: value for name, value in given.items() if value is not None}


def _variants(verb: Merge | Quantize | Dequantize) -> list[Variant]:
    """The base, and the base or original with the adapters on it."""
    folder = open_model(verb.base)
    if not isinstance(verb, Merge):
        return [stored(folder)]
    how, source = verb.only(MergeOptions), open_model(verb.original or verb.base)
    opener = partial(open_adapter, base=folder, for_merge=True, expert_layout=how.expert_layout)
    sources, weights = open_with_weights(verb.adapters, verb.weights, opener)
    live = with_adapters(source, sources, how=how, weights=weights)
    return [stored(folder), replace(live, name=" + ".join([source.name, *live.adapters]))]
