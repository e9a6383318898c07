"""dequantize: a quantized checkpoint into floats."""

from adapterkit import dtypes
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import Problems, Refused
from adapterkit.gguf.header import GgufFiles, find_gguf
from adapterkit.gguf.model import loads_in_float32, open_gguf
from adapterkit.options import parse_size
from adapterkit.plan import Plan, Step
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.sources import open_model
from adapterkit.planning.outputs.cards import model_card
from adapterkit.planning.outputs.folder_files import as_json, model_files
from adapterkit.planning.outputs.model import check_gaps, plan_shard, plan_shards_of_size
from adapterkit.verbs.dequantize import Dequantize
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.decoded import decoded_view, quantization_files, quantized_weights

SHARD_SIZE = "5GB"  # of what comes from a GGUF file


def plan_dequantize(options: Dequantize) -> Plan:
    """Everything a dequantization will do, or `Refused`."""
    folder, dtype = open_model(options.base), options.dtype
    if files := find_gguf(folder):
        return _plan_gguf(files, options)
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
    Problems(check_gaps(base, None, notes)).raise_all()
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
    if options.max_shard_size:
        shards = plan_shards_of_size(
            [step for group in steps.values() for step in group], parse_size(options.max_shard_size)
        )
    else:
        shards = [
            plan_shard(name, group, original.shards[name], keep_format=False)
            for name, group in steps.items()
            if group
        ]
    decisions = {"dequantized": len(packed)}
    card, omit = model_card(original, "decoded to floats"), quantization_files(base.tensors)
    files = model_files(original, config, shards, card, omit=omit)
    return plan_of(
        "dequantize",
        options.recipe_options(),
        [original],
        configs=(0,),
        shards=shards,
        files=files,
        decisions=decisions,
        notes=notes,
    )


def _plan_gguf(source: GgufFiles, options: Dequantize) -> Plan:
    """Everything that is done to a GGUF file: every parameter decoded, put into its layout, rounded
    once."""
    model, dtype = open_gguf(source, tokenizer=True), options.dtype
    base, target_dtype = model.checkpoint, dtypes.parse(dtype) if dtype else model.dtype
    width = lambda key: "F32" if loads_in_float32(model.model, key, target_dtype) else target_dtype
    steps = [Step(key, width(key), spec.shape, spec) for key, spec in base.tensors.items()]
    shards = plan_shards_of_size(steps, parse_size(options.max_shard_size or SHARD_SIZE))
    config = base.config | {"dtype": dtypes.CONFIG_NAME[target_dtype]}
    files = (
        model_files(base, config, shards, model_card(base, "decoded to floats"))
        | model.texts
        | {"config.json": as_json(config)}
    )
    return plan_of(
        "dequantize",
        options.recipe_options(),
        [base],
        shards=shards,
        files=files,
        decisions={"dequantized": len(steps)},
        notes=model.notes,
    )
