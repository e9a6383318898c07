"""dequantize: a quantised checkpoint into floats."""

import os

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import Refused
from adapterkit.ops import produced
from adapterkit.ops.quantize import files_beside, model_headers
from adapterkit.ops.requantised import shard_of, shards_of_size
from adapterkit.ops.sizes import parse_size
from adapterkit.ops.sources import open_source
from adapterkit.plan import Plan, Progress, Receipt, Step, identities
from adapterkit.weights.decoded import decoded, files_saying, packed_in
from adapterkit.weights.packed import Packed


def dequantize(
    base: str | os.PathLike,
    *,
    out: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: str | None = None,
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
    they are. The files are the base's, or with `max_shard_size` (5GB) of that size at most. Raises `Refused` before anything is
    written.
    """
    plan = plan_dequantize(open_source(base), dtype, max_shard_size)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(plan, out, engine=engine, device=device, dry_run=dry_run, **how)


def plan_dequantize(folder: Folder, dtype: str | None, max_shard_size: str | None = None) -> Plan:
    """Everything a dequantisation will do, or `Refused`."""
    produced.check_choices(("--dtype", dtype, (None, *dtypes.SHORT)))
    original = open_checkpoint(folder)
    base = decoded(original)
    packed = packed_in(base.tensors)
    if not packed:
        raise Refused("no quantised weights", expected="a quantised checkpoint", where=folder.name, do="use it as it is")
    wanted = dtypes.parse(dtype) if dtype else None
    steps: dict[str, list[Step]] = {name: [] for name in original.shards}
    for key, spec in base.tensors.items():
        steps[spec.file].append(Step(key, (wanted or spec.dtype) if isinstance(spec, Packed) else spec.dtype, spec.shape, spec))
    config = dict(base.config)
    if wanted and "config.json" in original.files:
        config["dtype"] = dtypes.CONFIG_NAME[wanted]
        config.pop("torch_dtype", None)
    if max_shard_size:
        shards = shards_of_size(
            [step for group in steps.values() for step in group], parse_size(max_shard_size, "--max-shard-size")
        )
    else:
        shards = [shard_of(name, group, original.shards[name], keep=False) for name, group in steps.items() if group]
    headers = model_headers(original)
    facts = {"dequantised": len(packed)}
    files = files_beside(original, config, shards, "decoded to floats")
    files = {name: file for name, file in files.items() if name not in files_saying(base.tensors)}
    told = {key: value for key, value in (("dtype", dtype), ("max_shard_size", max_shard_size)) if value}
    return Plan("dequantize", told, (folder,), headers, identities((folder,), headers), tuple(shards), files, facts)
