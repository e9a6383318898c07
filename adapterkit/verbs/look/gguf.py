"""inspect of models in GGUF."""

from adapterkit.bases.gguf.base import GgufBase
from adapterkit.bases.gguf.header import FLOATS, HEAD, read_model
from adapterkit.core.checkpoint.header import Header, TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems
from adapterkit.core.records import Json
from adapterkit.verbs.look.checkpoint import finish_result, new_result


def inspect_gguf(base: GgufBase, headers_alone: bool) -> Json:
    """inspect's result for a model in GGUF; its dtypes are ggml's types."""
    files = base.files
    errors, headers, first = Problems(), {}, None
    with errors.collected():
        first, headers = read_model(files)
    shards: dict[str, Header] = {}
    for name, header in headers.items():
        specs = [TensorSpec(t.name, t.type, t.shape, name, t.start, t.stop) for t in header.tensors]
        shards[name] = Header(header.raw, tuple(specs), {})
    tensors = {spec.key: spec for header in shards.values() for spec in header.tensors}
    unread = tuple(name for name in files.names if name not in shards)
    more = {"unread": unread, "readable": first is not None}
    scan = Checkpoint(files.folder, shards, tensors, None, None, {}, {}, errors, **more)
    blocks = sorted({spec.dtype for spec in scan.tensors.values()} - {*FLOATS})
    found = {"found": f"blocks of GGUF: {', '.join(blocks)}", "config": None} if blocks else None
    metrics: Json = {"quantization": found}
    if first is not None:
        metrics["architecture"] = {"classes": [], "model_type": first.architecture}
        if (model := base.images) is not None:
            classes, family = [*model.parts], model.architecture
            metrics["architecture"] = {"classes": classes, "model_type": family}
        else:
            metrics["tied"] = {"config": None, "head_stored": HEAD in scan.tensors}
    return new_result("base", scan) | metrics | finish_result(scan)
