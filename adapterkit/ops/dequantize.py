"""dequantize: a quantised checkpoint into floats."""

import os
from dataclasses import replace

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import Refused
from adapterkit.ops import produced
from adapterkit.ops.quantize import files_beside, model_headers, shards_of
from adapterkit.ops.requantised import Copied, Edited
from adapterkit.ops.sources import open_source
from adapterkit.plan import Bundle, Plan, Progress, Receipt, Step, identities
from adapterkit.weights.decoded import decoded, files_saying, packed_in
from adapterkit.weights.packed import Packed


def dequantize(
    base: str | os.PathLike,
    *,
    out: str | os.PathLike,
    dtype: str | None = None,
    hash: str = "sha256",
    device: str = "auto",
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Decode a quantised checkpoint: W = round(code * scale), in `dtype` (default: what its library computes in).

    Every format of which the command's help tells is read, also several in one checkpoint; tensors that are not quantised stay as
    they are. Raises `Refused` before anything is written.
    """
    plan = plan_dequantize(open_source(base), dtype)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(plan, out, engine=engine, device=device, dry_run=dry_run, **how)


def plan_dequantize(folder: Folder, dtype: str | None) -> Plan:
    """Everything a dequantisation will do, or `Refused`."""
    produced.check_choices(("--dtype", dtype, (None, *dtypes.SHORT)))
    original = open_checkpoint(folder)
    base = decoded(original)
    packed = packed_in(base.tensors)
    if not packed:
        raise Refused("no quantised weights", expected="a quantised checkpoint", where=folder.name, do="use it as it is")
    wanted = dtypes.parse(dtype) if dtype else None
    groups: dict[str, list[Bundle]] = {name: [] for name in original.shards}
    for key, spec in base.tensors.items():
        if isinstance(spec, Packed):
            groups[spec.file].append(Edited(Step(key, wanted or spec.dtype, spec.shape, spec)))
        else:
            groups[spec.file].append(Copied(spec))
    config = dict(base.config)
    if wanted and "config.json" in original.files:
        config["dtype"] = dtypes.CONFIG_NAME[wanted]
        config.pop("torch_dtype", None)
    shards = shards_of(original, {name: bundles for name, bundles in groups.items() if bundles})
    # what else the metadata says may be how tensors are quantised, as torchao's does
    shards = tuple(replace(shard, metadata={"format": shard.metadata.get("format", "pt")}) for shard in shards)
    headers = model_headers(original)
    facts = {"dequantised": len(packed)}
    files = files_beside(original, config, shards, "decoded to floats")
    files = {name: file for name, file in files.items() if name not in files_saying(base.tensors)}
    told = {"dtype": dtype} if dtype else {}
    return Plan("dequantize", told, (folder,), headers, identities((folder,), headers), shards, files, facts)
