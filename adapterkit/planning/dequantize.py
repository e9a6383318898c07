"""dequantize: a quantized checkpoint into floats."""

from dataclasses import replace

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import Header
from adapterkit.checkpoint.shards import stem_of, weight_files
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import Problems, Refused
from adapterkit.formats.one_file import OneFileModel
from adapterkit.gguf.header import FLOATS, GgufFiles, find_gguf
from adapterkit.gguf.model import loads_in_float32, open_gguf
from adapterkit.gguf.weight import GgufWeight
from adapterkit.options import parse_size
from adapterkit.plan import Plan, Step
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.model_checkpoint import one_file_of
from adapterkit.planning.inputs.pipeline import Pipeline, is_pipeline, read_pipeline
from adapterkit.planning.inputs.sources import open_model
from adapterkit.planning.merge.one_file import file_notes
from adapterkit.planning.outputs.cards import model_card
from adapterkit.planning.outputs.folder_files import as_json, model_files
from adapterkit.planning.outputs.model import check_gaps, plan_shard, plan_shards_of_size
from adapterkit.planning.outputs.one_file import one_safetensors_file, output_file
from adapterkit.planning.pipelines import joined
from adapterkit.verbs.dequantize import Dequantize
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.decoded import decoded_view, quantization_files, quantized_weights
from adapterkit.weights.detect import quantization_evidence

SHARD_SIZE = "5GB"  # of what comes from a GGUF file


def plan_dequantize(options: Dequantize) -> Plan:
    """Everything a dequantization will do, or `Refused`."""
    folder = open_model(options.base)
    if is_pipeline(folder):
        return plan_pipeline_dequantization(read_pipeline(folder), options)
    if files := find_gguf(folder):
        model = one_file_of(folder)
        return _plan_gguf(files, options) if model is None else _plan_gguf_images(model, options)
    name = output_file(folder, options.out)
    return replace(_plan_model(open_checkpoint(folder), options, name), is_file=name is not None)


def plan_pipeline_dequantization(pipeline: Pipeline, options: Dequantize) -> Plan:
    """The dequantization of all parts of a pipeline that are quantized."""
    errors = Problems()
    plans: dict[str, Plan] = {}
    for name, part in pipeline.parts.items():
        with errors.collected(), part.named():
            base = open_checkpoint(part.folder) if weight_files(part.folder) else None
            if base is not None and quantization_evidence(base.config, base.tensors) is not None:
                plans[name] = _plan_model(base, options)
    errors.raise_all()
    if not plans:
        raise _nothing(pipeline.folder)
    card = model_card(pipeline.folder, "decoded to floats", library="diffusers")
    count = sum(plan.decisions["dequantized"] for plan in plans.values())
    return replace(joined(pipeline, plans, card), decisions={"dequantized": count})


def _nothing(folder: Folder) -> Refused:
    return Refused(
        "no quantized weights",
        expected="a quantized checkpoint",
        where=folder.name,
        hint="use it as it is",
    )


def _plan_model(original: Checkpoint, options: Dequantize, name: str | None = None) -> Plan:
    """The dequantization of one model of safetensors; `name`: of an output that is one file."""
    dtype = options.dtype
    base = decoded_view(original)
    packed = quantized_weights(base.tensors)
    if not packed:
        raise _nothing(original.folder)
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
    if name is not None:
        steps = {name: [step for group in steps.values() for step in group]}
    headers = dict(zip(steps, original.shards.values(), strict=True))
    if options.max_shard_size and name is None:
        shards = plan_shards_of_size(
            [step for group in steps.values() for step in group],
            parse_size(options.max_shard_size),
            stem_of(headers),
        )
    else:
        shards = [
            plan_shard(file, group, headers[file], keep_format=False)
            for file, group in steps.items()
            if group
        ]
    decisions = {"dequantized": len(packed)}
    card, omit = model_card(original.folder, "decoded to floats"), quantization_files(base.tensors)
    files = {} if name else model_files(original, config, shards, card, omit=omit)
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


def _plan_gguf_images(base: OneFileModel, options: Dequantize) -> Plan:
    """An image model in GGUF as one file of safetensors: blocks decoded, in BF16 or `dtype`; what
    is of floats keeps its own."""
    name = one_safetensors_file(options.out)
    given = dtypes.parse(options.dtype) if options.dtype else "BF16"
    steps, count = [], 0
    for key, spec in base.tensors.items():
        assert isinstance(spec, GgufWeight)
        is_float = spec.format in FLOATS
        count += not is_float
        steps.append(Step(key, spec.format if is_float else given, spec.shape, spec))
    if not count:
        raise _nothing(base.folder)
    shards = [plan_shard(name, steps, Header(b"", (), {"format": "pt"}), keep_format=False)]
    plan = plan_of(
        "dequantize",
        options.recipe_options(),
        [base],
        shards=shards,
        files={},
        decisions={"dequantized": count},
        notes=file_notes(base),
    )
    return replace(plan, is_file=True)


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
        model_files(base, config, shards, model_card(base.folder, "decoded to floats"))
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
