"""dequantize: a quantized checkpoint into floats."""

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.engines.execution import Execution, executes
from adapterkit.errors import Refused, refuse_all
from adapterkit.gguf.header import gguf_file
from adapterkit.gguf.model import loads_in_float32, open_gguf
from adapterkit.options import Executor, StrPath, parse_size
from adapterkit.plan import Plan, Progress, Step
from adapterkit.planning.cards import model_card
from adapterkit.planning.folder_files import as_json, model_files
from adapterkit.planning.gaps import check_gaps
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.model_output import plan_shard, plan_shards_of_size
from adapterkit.planning.sources import open_model
from adapterkit.receipt import Receipt
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.decoded import decoded_view, quantization_files, quantized_weights

SHARD_SIZE = "5GB"  # of what comes from a GGUF file


@executes()
def dequantize(
    execution: Execution,
    base: StrPath,
    *,
    out: StrPath,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    disk_limit: str | int | None = None,
    engine: str | Executor = "local",
    ray_address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Decode a quantized checkpoint: W = round(code * scale), in `dtype` (default: what its library
    computes in).

    Every format of which the command's help tells is read, also several in one checkpoint; tensors
    that are not quantized stay as they are. The files are the base's, or with `max_shard_size`
    (5GB) of that size at most. Raises `Refused` before anything is written.

    A GGUF model file (`pip install 'adapterkit[gguf]'`) becomes a checkpoint of transformers' names
    and layouts, with config and tokenizer, in files of 5 GB at most. Its `dtype` is bf16 where it
    has blocks: W = code * scale has an error of its own that is larger than the rounding; a file of
    plain floats keeps its dtype.
    """
    return execution.run(plan_dequantize(open_model(base), dtype, max_shard_size))


def plan_dequantize(
    folder: Folder, dtype: str | None, max_shard_size: str | int | None = None
) -> Plan:
    """Everything a dequantization will do, or `Refused`."""
    if name := gguf_file(folder):
        return _plan_gguf(folder, name, dtype, max_shard_size)
    original = open_checkpoint(folder)
    base = decoded_view(original)
    packed = quantized_weights(base.tensors)
    if not packed:
        raise Refused(
            "no quantized weights",
            expected="a quantized checkpoint",
            where=folder.name,
            hint="use it as it is",
        )
    notes: list[str] = []
    refuse_all(check_gaps(base, None, notes))
    target_dtype = dtypes.parse(dtype) if dtype else None
    steps: dict[str, list[Step]] = {name: [] for name in original.shards}
    for key, spec in base.tensors.items():
        steps[spec.file].append(
            Step(
                key,
                (target_dtype or spec.dtype) if isinstance(spec, QuantizedWeight) else spec.dtype,
                spec.shape,
                spec,
            )
        )
    config = dict(base.config)
    if target_dtype and "config.json" in original.files:
        config["dtype"] = dtypes.CONFIG_NAME[target_dtype]
        config.pop("torch_dtype", None)
    if max_shard_size:
        shards = plan_shards_of_size(
            [step for group in steps.values() for step in group],
            parse_size("max_shard_size", max_shard_size),
        )
    else:
        shards = [
            plan_shard(name, group, original.shards[name], keep_format=False)
            for name, group in steps.items()
            if group
        ]
    headers = header_hashes({0: original}, configs=(0,))
    decisions = {"dequantised": len(packed)}
    card, omit = model_card(original, "decoded to floats"), quantization_files(base.tensors)
    files = model_files(original, config, shards, card, omit=omit)
    receipt_options = {
        key: value for key, value in (("dtype", dtype), ("max_shard_size", max_shard_size)) if value
    }
    return Plan(
        "dequantize",
        receipt_options,
        (folder,),
        headers,
        identities((folder,), headers),
        tuple(shards),
        files,
        decisions,
        tuple(notes),
    )


def _plan_gguf(
    folder: Folder, name: str, dtype: str | None, max_shard_size: str | int | None
) -> Plan:
    """Everything that is done to a GGUF file: every parameter decoded, put into its layout, rounded
    once."""
    model = open_gguf(folder, name)
    base, target_dtype = model.checkpoint, dtypes.parse(dtype) if dtype else model.dtype
    width = lambda key: "F32" if loads_in_float32(model.model, key, target_dtype) else target_dtype
    steps = [Step(key, width(key), spec.shape, spec) for key, spec in base.tensors.items()]
    shards = plan_shards_of_size(steps, parse_size("max_shard_size", max_shard_size or SHARD_SIZE))
    config = base.config | {"dtype": dtypes.CONFIG_NAME[target_dtype]}
    files = (
        model_files(base, config, shards, model_card(base, "decoded to floats"))
        | model.texts
        | {"config.json": as_json(config)}
    )
    headers = header_hashes({0: base})
    receipt_options = {
        key: value for key, value in (("dtype", dtype), ("max_shard_size", max_shard_size)) if value
    }
    decisions, notes = {"dequantised": len(steps)}, tuple(model.notes)
    return Plan(
        "dequantize",
        receipt_options,
        (folder,),
        headers,
        identities((folder,), headers),
        shards,
        files,
        decisions,
        notes,
    )
