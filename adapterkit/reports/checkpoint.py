"""inspect of a checkpoint or a single file: tensors, dtypes, ties, quantization, problems."""

import math
import re
from collections.abc import Iterable
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.foreign import no_model, other_lora
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.shards import pickles, weight_files
from adapterkit.checkpoint.spec import Scan, scan_checkpoint
from adapterkit.errors import Damaged, Refused, shown
from adapterkit.reports.configs import printable
from adapterkit.weights.detect import CONFIG_KEYS, check_not_quantized

VERSION = 1  # of the result's schema
SHOWN = 6  # names listed in one problem
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.weight$")


def inspect_base(folder: Folder) -> dict[str, Any]:
    seen = scan_checkpoint(folder)
    _check_files(seen)
    quantization = _quantization(seen)
    check_tensors(seen, mixed=quantization is not None)
    tied = _tied(seen)
    classes = seen.config.get("architectures")
    architecture = {
        "classes": classes if isinstance(classes, list) else [],
        "model_type": seen.config.get("model_type"),
    }
    metrics = {"architecture": printable(architecture), "tied": tied, "quantization": quantization}
    return new_result("base", seen) | metrics | finish_result(seen)


def inspect_file(folder: Folder) -> dict[str, Any]:
    seen, other = Scan(folder), other_lora(folder)
    seen.header(other[0] if other is not None else next(iter(folder.files())))
    quantization = _quantization(seen)
    check_tensors(seen, mixed=quantization is not None)
    if other is not None:
        seen.add_error(no_model(*other, folder.name))
    elif any(".lora_" in key for key in seen.tensors):
        add_problem(
            seen,
            f"factors of a LoRA without {CONFIG}",
            f"a folder with {CONFIG}",
            "inspect the adapter's folder",
        )
    return new_result("file", seen) | {"quantization": quantization} | finish_result(seen)


def add_problem(seen: Scan, found: str, expected: str, hint: str, where: str = "") -> None:
    seen.add_error(Damaged(found, expected=expected, where=where or seen.folder.name, hint=hint))


def _check_files(seen: Scan) -> None:
    """What lies beside the weights and may be taken for them, and an index whose total is another."""
    files = seen.folder.files()
    stray = [name for name in weight_files(seen.folder) if name not in seen.shards]
    if stray:
        hint = "nothing, if nothing loads them; else move them away"
        add_problem(
            seen,
            f"weights that are not part of the model: {some_names(stray)}",
            "the model's shards alone",
            hint,
        )
    check_pickles(seen, "the weights")
    if "config.json" not in files:
        add_problem(
            seen, "no config.json", "the model's config", "copy it from where the weights came from"
        )
    metadata = (seen.index or {}).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(spec.nbytes for spec in seen.tensors.values())
    if said is not None and said != stored and seen.complete:
        where = f"{seen.folder.name}/{seen.index_name}"
        add_problem(
            seen,
            f"total_size {shown(said)}",
            f"{stored}, the bytes of all tensors",
            "write the index again",
            where,
        )


def check_pickles(seen: Scan, beside: str) -> None:
    pickled = pickles(seen.folder)
    if pickled and seen.shards:  # where they are all there is, they are refused in other words
        hint = "remove them: loading a pickle runs the code in it"
        add_problem(
            seen, f"pickles beside {beside}: {some_names(pickled)}", "safetensors files", hint
        )


def check_tensors(seen: Scan, *, mixed: bool) -> None:
    """Empty tensors, and floats of several dtypes unless quantization accounts for them."""
    tensors = seen.tensors.values()
    empty = [spec.key for spec in tensors if 0 in spec.shape]
    if empty:
        hint = "gather the shards before saving (ZeRO-3, FSDP)"
        add_problem(
            seen, f"{len(empty)} empty tensors: {some_names(empty)}", "tensors with elements", hint
        )
    floats = {
        name: count["tensors"] for name, count in _dtypes(tensors).items() if name in dtypes.FLOATS
    }
    if len(floats) > 1 and not mixed:
        found = ", ".join(f"{name} ({count} tensors)" for name, count in floats.items())
        add_problem(
            seen,
            f"floats of several dtypes: {found}",
            "one dtype",
            "nothing, if the model keeps some layers in float32",
        )


def _tied(seen: Scan) -> dict[str, Any]:
    said = _nested(seen.config, "tie_word_embeddings")
    heads = [key for key in seen.tensors if HEAD.search(key)]
    if said is True and any(key.endswith("lm_head.weight") for key in heads):
        hint = "set tie_word_embeddings to false if the head was trained apart, else drop it"
        add_problem(
            seen,
            "lm_head.weight is stored, and tie_word_embeddings is true",
            "one of them: a loader may drop the head",
            hint,
        )
    classes = seen.config.get("architectures")
    causal = isinstance(classes, list) and any(
        str(name).endswith("ForCausalLM") for name in classes
    )
    if said is False and causal and seen.tensors and not heads and seen.complete:
        hint = "set tie_word_embeddings to true if the embedding is the head, else restore the head"
        add_problem(
            seen, "no head is stored, and tie_word_embeddings is false", "lm_head.weight", hint
        )
    return {"config": said, "head_stored": bool(heads)}


def _nested(config: dict, key: str) -> bool | None:
    """A switch of the config, or of the text model's part in it."""
    values = [
        config.get(key),
        *(
            sub.get(key)
            for name, sub in config.items()
            if isinstance(sub, dict) and name.endswith("_config")
        ),
    ]
    return next((value for value in values if isinstance(value, bool)), None)


def _quantization(seen: Scan) -> dict[str, Any] | None:
    try:
        check_not_quantized(seen.checkpoint())
    except Refused as error:
        config = next(
            (seen.config[key] for key in CONFIG_KEYS if isinstance(seen.config.get(key), dict)),
            None,
        )
        return {
            "found": error.problem.removeprefix("a quantized base: "),
            "config": printable(config),
        }
    return None


def new_result(kind: str, seen: Scan) -> dict[str, Any]:
    """The metrics that every kind has, in the order of the schema."""
    files = seen.folder.files()
    tensors = [spec for header in seen.headers for spec in header.tensors]
    shards = [
        {
            "file": name,
            "bytes": files.get(name, 0),
            "tensors": None if header is None else len(header.tensors),
        }
        for name, header in seen.shards.items()
    ]
    return {
        "inspect": VERSION,
        "kind": kind,
        "name": seen.folder.name,
        "origin": seen.folder.origin,
        "parameters": sum(math.prod(spec.shape) for spec in tensors),
        "bytes": sum(shard["bytes"] for shard in shards),
        "dtypes": _dtypes(tensors),
        "shards": shards,
        "architecture": None,
        "tied": None,
        "quantization": None,
    }


def finish_result(seen: Scan, modules: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    different = {str(error): error for error in seen.errors}.values()
    parts = [
        {"found": e.problem, "expected": e.expected, "where": e.where, "do": e.hint}
        for e in different
    ]
    return {"readable": seen.readable, "problems": printable(parts), "modules": modules or []}


def _dtypes(tensors: Iterable[TensorSpec]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for spec in tensors:
        count = found.setdefault(spec.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        count["tensors"] += 1
        count["parameters"] += math.prod(spec.shape)
        count["bytes"] += spec.nbytes
    return dict(sorted(found.items()))


def some_names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + more
