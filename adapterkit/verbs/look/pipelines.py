"""inspect and diff diffusers pipelines, component by component."""

from collections import Counter

from adapterkit.bases.images.pipeline import read_pipeline
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import Problems, shown
from adapterkit.core.inputs.base_door import INDEX, Base
from adapterkit.core.records import Json
from adapterkit.verbs.look import configs
from adapterkit.verbs.look.checkpoint import VERSION, inspect_base
from adapterkit.verbs.look.configs import printable
from adapterkit.verbs.look.matching import Matches, match_checkpoints, match_lone_checkpoint


def inspect_pipeline(base: Base, headers: bool) -> Json:
    """inspect's result for a pipeline: the sums of its components, and the result of each;
    `Refused` if its index cannot be read."""
    folder = base.folder
    pipeline = read_pipeline(folder)
    parts = {name: inspect_base(part.folder, headers) for name, part in pipeline.parts.items()}
    dtypes: dict[str, Counter[str]] = {}
    for result in parts.values():
        for dtype, sizes in result["dtypes"].items():
            dtypes.setdefault(dtype, Counter()).update(sizes)
    problems = Problems(where=folder.name, hint="download all of the pipeline", code="AK201")
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
            problem | {"problem": f"{name}: {problem['problem']}"}
            for name, result in parts.items()
            for problem in result["problems"]
        ],
        "modules": [],
        "parts": parts,
    }


def match_pipelines(folders: tuple[Folder, Folder]) -> tuple[Matches, list[Folder]]:
    """Match two pipelines component by component, including those of one side alone; names begin
    with the component. Also return the folders of all tensors. `Refused` or `Damaged` if a
    component cannot be read."""
    sides = read_pipeline(folders[0]).parts, read_pipeline(folders[1]).parts
    whole, inputs, errors = Matches([], [], []), [], Problems()
    indexes = [{INDEX: read_json(folder, INDEX)} for folder in folders]
    whole.config, _ = configs.compare_model_configs(*indexes)
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        own = [side.get(name) for side in sides]
        with errors.collected():
            first, second = own
            number, prefix = len(inputs), f"{name}."
            if first is not None and second is not None:
                inputs += [first.folder, second.folder]
                its = match_checkpoints((first.folder, second.folder), number, prefix)
            else:
                lone = first or second
                assert lone is not None
                inputs.append(lone.folder)
                its = match_lone_checkpoint(lone.folder, number, prefix, is_first=lone is first)
            whole.pairs += its.pairs
            whole.added += its.added
            whole.removed += its.removed
            whole.config += [row | {"name": prefix + row["name"]} for row in its.config]
            whole.notes += [f"{name}: {note}" for note in its.notes]
    errors.raise_all()
    return whole, inputs
