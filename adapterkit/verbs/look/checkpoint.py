"""inspect of a checkpoint or a single file: tensors, dtypes, ties, quantization, problems."""

import math
import re
from collections.abc import Iterable

from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.shards import pickles, weight_files
from adapterkit.core.checkpoint.spec import Checkpoint, scan_checkpoint, scan_files
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, shown
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.core.weights.detect import CONFIG_KEYS, check_not_quantized
from adapterkit.doors import ADAPTERS
from adapterkit.verbs.look.configs import printable
from adapterkit.verbs.look.decoders import whole_decoder

OF_DIFFUSERS = "_class_name"  # key of its configs
VERSION = 1  # of the result's schema
MAX_NAMES = 6  # listed in one problem
HEAD_KEY = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.weight$")


def inspect_base(folder: Folder, headers: bool) -> Json:
    """inspect's result for a checkpoint; `headers`: without building its model."""
    scan = scan_checkpoint(folder)
    opens = not scan.errors
    _check_files(scan)
    quantization = _quantization(scan)
    check_tensors(scan, mixed=quantization is not None)
    loads = _loads(scan, quantization is not None) if opens and not headers else None
    tied = _tied(scan, loads is not None)
    classes = scan.config.get("architectures")
    classes = classes if isinstance(classes, list) else [scan.config.get(OF_DIFFUSERS)]
    classes = [name for name in classes if name is not None]
    architecture = {"classes": classes, "model_type": scan.config.get("model_type")}
    metrics = {"architecture": printable(architecture), "tied": tied, "quantization": quantization}
    return new_result("base", scan) | metrics | {"loads": loads} | finish_result(scan)


def inspect_file(folder: Folder) -> Json:
    from adapterkit.adapters.formats.detect import in_another_layout, no_model

    other = in_another_layout(folder)
    name = other.container.file if other is not None else next(iter(folder.files()))
    scan = scan_files(folder, [name], 0, Problems())
    model = kind_of(folder).images if other is None else None
    quantization = _quantization(scan)
    check_tensors(scan, mixed=quantization is not None)
    if other is not None:
        scan.errors.include(no_model(other, folder.name))
    elif any(".lora_" in key for key in scan.tensors):
        problem, hint = f"factors of a LoRA without {CONFIG}", "inspect the adapter's folder"
        add_problem(scan, problem, f"a folder with {CONFIG}", hint)
    result = new_result("file", scan) | {"quantization": quantization}
    if model is not None:
        result["architecture"] = {"classes": [*model.parts], "model_type": model.architecture}
    return result | finish_result(scan)


def add_problem(scan: Checkpoint, problem: str, expected: str, hint: str, where: str = "") -> None:
    scan.errors.include(
        Damaged(
            problem, expected=expected, where=where or scan.folder.name, hint=hint, code="AK202"
        )
    )


def _check_files(scan: Checkpoint) -> None:
    """Report files that may be mistaken for the model's weights, a missing config, a wrong
    total_size."""
    files = scan.folder.files()
    stray = [name for name in weight_files(scan.folder) if name not in {*scan.shards, *scan.unread}]
    if stray:
        problem = f"weights that are not part of the model: {some_names(stray)}"
        hint = "nothing, if nothing loads them; else move them away"
        add_problem(scan, problem, "only the model's shards", hint)
    check_pickles(scan, "the weights")
    if "config.json" not in files:
        hint = "copy it from the source of the weights"
        add_problem(scan, "no config.json", "the model's config", hint)
    metadata = (scan.index or {}).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(spec.nbytes for spec in scan.tensors.values())
    if total is not None and total != stored and scan.complete:
        where = f"{scan.folder.name}/{scan.index_name}"
        expected, hint = f"{stored}, the bytes of all tensors", "write the index again"
        add_problem(scan, f"total_size {shown(total)}", expected, hint, where)


def check_pickles(scan: Checkpoint, weights: str) -> None:
    pickled = pickles(scan.folder)
    if pickled and (scan.shards or scan.unread):  # without other weights there is a refusal already
        problem = f"pickles next to {weights}: {some_names(pickled)}"
        hint = "remove them: loading a pickle runs the code in it"
        add_problem(scan, problem, "safetensors files", hint)


def check_tensors(scan: Checkpoint, *, mixed: bool) -> None:
    """Report empty tensors, and floats of several dtypes unless quantization explains them."""
    tensors = scan.tensors.values()
    empty = [spec.key for spec in tensors if 0 in spec.shape]
    if empty:
        problem = f"{len(empty)} empty tensors: {some_names(empty)}"
        hint = load(ADAPTERS["how to join"])(scan.folder)
        add_problem(scan, problem, "tensors with elements", hint)
    floats = {
        name: count["tensors"] for name, count in _dtypes(tensors).items() if name in dtypes.FLOATS
    }
    if len(floats) > 1 and not mixed:
        counts = ", ".join(f"{name} ({count} tensors)" for name, count in floats.items())
        hint = "nothing, if the model keeps some layers in float32"
        add_problem(scan, f"floats of several dtypes: {counts}", "one dtype", hint)


def _tied(scan: Checkpoint, gaps_known: bool) -> Json:
    setting = _nested_flag(scan.config, "tie_word_embeddings")
    heads = [key for key in scan.tensors if HEAD_KEY.search(key)]
    if setting is True and any(key.endswith("lm_head.weight") for key in heads):
        problem = "lm_head.weight is stored, and tie_word_embeddings is true"
        hint = "set tie_word_embeddings to false if the head was trained separately, else drop it"
        add_problem(scan, problem, "one of them: a loader may drop the head", hint)
    classes = scan.config.get("architectures")
    causal = isinstance(classes, list) and any(
        str(name).endswith("ForCausalLM") for name in classes
    )
    if setting is False and causal and not (heads or gaps_known) and scan.tensors and scan.complete:
        hint = "set tie_word_embeddings to true if the embedding is the head, else restore the head"
        problem = "no head is stored, and tie_word_embeddings is false"
        add_problem(scan, problem, "lm_head.weight", hint)
    return {"config": setting, "head_stored": bool(heads)}


def _loads(scan: Checkpoint, is_quantized: bool) -> Json | None:
    """The class that transformers loads, with counts of the parameters that it does not find; None
    if it does not know the model."""
    whole = None if is_quantized else whole_decoder(scan)
    if whole is not None:
        return {"class": whole, "missing": 0, "misshapen": 0}
    from adapterkit.core.weights.loading import gaps_of  # of torch

    try:
        gaps = gaps_of(scan)
    except AdapterkitError:  # an unknown model, or a format without known weights
        return None
    scan.errors.extend(gaps.errors())
    return {
        "class": gaps.class_name,
        "missing": len(gaps.missing),
        "misshapen": len(gaps.misshapen) + len(gaps.failed),
    }


def _nested_flag(config: dict, key: str) -> bool | None:
    """A flag of the config, or else of its sub-configs."""
    values = [
        config.get(key),
        *(
            sub.get(key)
            for name, sub in config.items()
            if isinstance(sub, dict) and name.endswith("_config")
        ),
    ]
    return next((value for value in values if isinstance(value, bool)), None)


def _quantization(scan: Checkpoint) -> Json | None:
    try:
        check_not_quantized(scan)
    except Refused as error:
        configs = (scan.config.get(key) for key in CONFIG_KEYS)
        config = next((config for config in configs if isinstance(config, dict)), None)
        evidence = error.problem.removeprefix("this base is quantized: ")
        return {"found": evidence, "config": printable(config)}
    return None


def new_result(kind: str, scan: Checkpoint) -> Json:
    """The keys that all kinds have, in schema order."""
    files = scan.folder.files()
    tensors = [spec for header in scan.shards.values() for spec in header.tensors]
    counts = {name: len(header.tensors) for name, header in scan.shards.items()}
    shards = [
        {"file": name, "bytes": files.get(name, 0), "tensors": counts.get(name)}
        for name in sorted({*counts, *scan.unread})
    ]
    return {
        "inspect": VERSION,
        "kind": kind,
        "name": scan.folder.name,
        "origin": scan.folder.origin,
        "parameters": sum(math.prod(spec.shape) for spec in tensors),
        "bytes": sum(shard["bytes"] for shard in shards),
        "dtypes": _dtypes(tensors),
        "shards": shards,
        "architecture": None,
        "tied": None,
        "quantization": None,
        "loads": None,
    }


def finish_result(scan: Checkpoint, modules: list[Json] | None = None) -> Json:
    """The last keys of all kinds: problems, each once, and modules."""
    distinct = {str(error): error for error in scan.errors}.values()
    problems = [error.row() for error in distinct]
    return {"readable": scan.readable, "problems": printable(problems), "modules": modules or []}


def _dtypes(tensors: Iterable[TensorSpec]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for spec in tensors:
        count = counts.setdefault(spec.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        count["tensors"] += 1
        count["parameters"] += math.prod(spec.shape)
        count["bytes"] += spec.nbytes
    return dict(sorted(counts.items()))


def some_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(shown, names[:MAX_NAMES])) + more
