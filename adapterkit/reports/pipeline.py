"""inspect of pipelines of diffusers, part by part."""

from collections import Counter

from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import Problems, shown
from adapterkit.planning.inputs.model_checkpoint import INDEX, Base
from adapterkit.planning.inputs.pipeline import read_pipeline
from adapterkit.records import Json
from adapterkit.reports.checkpoint import VERSION, inspect_base
from adapterkit.reports.configs import printable


def inspect_pipeline(base: Base, headers: bool) -> Json:
    """inspect's result for a pipeline: the sums of its parts, and the result of each; `Refused`
    where its index cannot be read."""
    folder = base.folder
    pipeline = read_pipeline(folder)
    parts = {name: inspect_base(part.folder, headers) for name, part in pipeline.parts.items()}
    dtypes: dict[str, Counter[str]] = {}
    for result in parts.values():
        for dtype, sizes in result["dtypes"].items():
            dtypes.setdefault(dtype, Counter()).update(sizes)
    problems = Problems(where=folder.name, hint="download all of the pipeline")
    for name in pipeline.absent:
        problems.add(f"{INDEX} names {shown(name)}", "the folder of that name")
    return {
        "inspect": VERSION,
        "kind": "pipeline",
        "name": folder.name,
        "origin": folder.origin,
        "parameters": sum(result["parameters"] for result in parts.values()),
        "bytes": sum(result["bytes"] for result in parts.values()),
        "dtypes": {dtype: dict(sizes) for dtype, sizes in sorted(dtypes.items())},
        "shards": [
            shard | {"file": f"{name}/{shard['file']}"}
            for name, result in parts.items()
            for shard in result["shards"]
        ],
        "architecture": printable(
            {"classes": [read_json(folder, INDEX).get("_class_name")], "model_type": None}
        ),
        "tied": None,
        "quantization": None,
        "loads": None,
        "readable": not pipeline.absent and all(result["readable"] for result in parts.values()),
        "problems": [error.row() for error in problems]
        + [
            problem | {"found": f"{name}: {problem['found']}"}
            for name, result in parts.items()
            for problem in result["problems"]
        ],
        "modules": [],
        "parts": parts,
    }
