"""quantize: a checkpoint's linear layers into a quantized format."""

import re
from collections.abc import Callable
from dataclasses import replace

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import WARNING, AdapterkitError, Problems, Refused, listed
from adapterkit.formats.modules.names import NUMBER
from adapterkit.formats.one_file import GgufImageModel, OneFileModel
from adapterkit.gguf.file import check_types, gguf_package
from adapterkit.gguf.header import FLOATS, GgufFiles, find_gguf, read_model
from adapterkit.gguf.mixes import MIXES, image_types_of, types_of, with_number
from adapterkit.gguf.model import GgufCheckpoint
from adapterkit.gguf.tensors import as_stored
from adapterkit.gguf.weight import GgufWeight
from adapterkit.options import flag_of
from adapterkit.patterns import matcher
from adapterkit.plan import Compensation, Plan, Span, Task
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.model_checkpoint import one_file_of
from adapterkit.planning.inputs.pipeline import Pipeline, is_pipeline, read_pipeline
from adapterkit.planning.inputs.sources import if_given, open_model, open_statistics
from adapterkit.planning.merge.gguf import files_beside, read_importance
from adapterkit.planning.merge.one_file import file_notes
from adapterkit.planning.outputs.cards import model_card
from adapterkit.planning.outputs.gguf_model import gguf_files, retyped, weighed
from adapterkit.planning.outputs.model import QuantizedModel
from adapterkit.planning.outputs.one_file import output_file
from adapterkit.planning.pipelines import joined
from adapterkit.planning.quantization import QuantizationPlan, plan_quantization
from adapterkit.planning.targets.values_by_regex import selecting
from adapterkit.registry import members, written_formats
from adapterkit.shared_options import BlockOptions, missing_statistics
from adapterkit.tasks.quantize import EncodedWeight
from adapterkit.tasks.statistics import select_covariances
from adapterkit.verbs.quantize import Quantize
from adapterkit.weights.codec import PlainWeight, QuantizedWeight
from adapterkit.weights.detect import check_not_quantized

U_NET = re.compile(r"(?:input|middle|output)_blocks?\.\d")  # whose blocks are rows of tables
# of each kind of base: what to do instead, which lists of formats, and options that do not fit
KINDS = {
    "gguf": (
        "make floats of it first\nadapterkit dequantize BASE --out floats",
        "",
        ("skip", "block_size", "double_quant", "stats"),
    ),
    "image": (
        "give one of these formats",
        "image_targets",
        ("block_size", "double_quant", "stats", "imatrix", "modelfile"),
    ),
    "model": ("give a GGUF file, or one of an image model", "targets", ("imatrix", "modelfile")),
}


def plan_quantize(options: Quantize) -> Plan:
    """Everything a quantization will do, or `Refused`."""
    Problems(missing_statistics(options.rounding, options.stats)).raise_all()
    stats = if_given(open_statistics, options.stats)
    if is_pipeline(folder := open_model(options.base)):
        return plan_pipeline_quantization(read_pipeline(folder), options)
    files, model = find_gguf(folder), one_file_of(folder)
    kind = "gguf" if files else "model" if model is None else "image"
    Problems(_unfit_options(options, kind)).raise_all()
    if files:
        return _plan_gguf(options, files, model if isinstance(model, GgufImageModel) else None)
    if model is not None:
        return _plan_images(options, model)
    return _plan_model(open_checkpoint(folder), options, options.skip, stats)


def _plan_model(
    base: Checkpoint,
    options: Quantize,
    skip: str | Callable[[str], bool] | None,
    stats: Folder | None = None,
) -> Plan:
    """The quantization of one model; `skip`: a pattern of modules, or what tells them."""
    check_not_quantized(base)
    how = {"to": options.to, **vars(options.only(BlockOptions)), "skip": skip}
    quantization = plan_quantization(base, how)
    tasks, inputs = quantization.upcast_to_fp32(), [base]
    if stats is not None:
        inputs.append(open_checkpoint(stats, 1))
        tasks |= _compensated(quantization, inputs[1])
    output = QuantizedModel(base, quantization.quantized, tasks, quantization.config())
    receipt_options = options.recipe_options()
    if options.rounding == "nearest":
        del receipt_options["rounding"]
    decisions = {"left_out": sorted(quantization.skipped), "quantized": len(quantization.quantized)}
    quantization.notes.extend(quantization.size_notes())
    return plan_of(
        "quantize",
        receipt_options,
        inputs,
        configs=(0,),
        shards=output.shards(),
        files=output.files(f"quantized to {options.to}"),
        decisions=decisions,
        notes=quantization.notes,
    )


def plan_pipeline_quantization(pipeline: Pipeline, options: Quantize) -> Plan:
    """The quantization of a pipeline's denoisers and text encoders, but for those that `--skip`
    matches; `Refused` with all problems of all parts."""
    errors = Problems(where="options", hint="quantize one part: the folder of a model")
    for name in ("stats", "imatrix", "modelfile"):
        if getattr(options, name):
            errors.add(f"{flag_of(name)} with a pipeline", "a base that is one model")
    errors += _unfit_options(options, "model")
    errors.raise_all()
    skips = matcher(options.skip, "--skip") if options.skip else lambda name: False
    plans: dict[str, Plan] = {}
    for name, part in pipeline.parts.items():
        if (part.is_denoiser or part.is_text_encoder) and not skips(name):
            of_part = lambda module, name=name: skips(f"{name}.{module}")
            with errors.collected(), part.named():
                plans[name] = _plan_model(open_checkpoint(part.folder), options, of_part)
    errors.raise_all()
    if not plans:
        raise pipeline.unknown("no part to quantize: no denoiser and no text encoder")
    card = model_card(pipeline.folder, f"quantized to {options.to}", "quantized", "diffusers")
    own = [plan.decisions for plan in plans.values()]
    left_out = [f"{part}.{n}" for part, p in plans.items() for n in p.decisions["left_out"]]
    decisions = {"left_out": left_out, "quantized": sum(each["quantized"] for each in own)}
    return replace(joined(pipeline, plans, card), decisions=decisions)


def _unfit_options(options: Quantize, kind: str) -> list[AdapterkitError]:
    """`Refused` for formats and options that this kind of base has no use for."""
    errors = Problems(where="options", hint=KINDS[kind][0])
    known = MIXES if kind == "gguf" else written_formats(KINDS[kind][1])
    wrong = [flag_of(name) for name in KINDS[kind][2] if getattr(options, name)]
    if wrong or options.to not in known:
        errors.add(f"--to {options.to} {' '.join(wrong)} with this base", ", ".join(known))
    return errors


def _plan_images(options: Quantize, model: OneFileModel) -> Plan:
    """Everything that is done to an image model in one file: the linear layers in its denoiser's
    blocks in one of ComfyUI's formats."""
    check_not_quantized(model)
    (codec,) = (
        one for one in members("weights.codecs").values() if options.to in one.image_targets
    )
    layers = [module for module in sorted(model.modules) if _is_in_block(model, module)]
    skip = selecting("--skip", options.skip, layers) if options.skip else lambda name: False
    quantized: dict[str, QuantizedWeight] = {}
    left_out: list[str] = []
    for module in layers:
        spec = model.tensors[f"{module}.weight"]
        weight = PlainWeight(spec.key, spec.shape, spec.dtype)
        packed = None if skip(module) else codec.for_encoding(options.to, weight, {})
        if packed is None:
            left_out.append(spec.key)
        else:
            quantized[spec.key] = packed
    if not quantized:
        raise Refused(
            f"no linear layer for {options.to}",
            expected="layers in blocks of the denoiser, of sizes that the format can hold",
            where=model.name,
            hint="check --skip, or use another format",
        )
    name = output_file(model.folder, options.out)
    output = QuantizedModel(model, quantized, {}, model.config, file=name)
    plan = plan_of(
        "quantize",
        {key: value for key, value in options.recipe_options().items() if key != "rounding"},
        [model],
        shards=output.shards(),
        files={} if name else output.files(f"quantized to {options.to}"),
        decisions={"left_out": left_out, "quantized": len(quantized)},
        notes=[*file_notes(model), f"{len(quantized)} linear layers of its blocks are quantized"],
    )
    return replace(plan, is_file=name is not None)


def _is_in_block(model: OneFileModel, module: str) -> bool:
    """Whether it is a linear layer in a numbered block of the denoiser, or a kernel that a GGUF
    file has as a matrix."""
    spec = model.tensors.get(f"{module}.weight")
    if spec is None or spec.dtype not in dtypes.FLOATS:
        return False
    if len(spec.shapes[0] if isinstance(spec, GgufWeight) else spec.shape) != 2:
        return False
    denoiser = next(iter(model.parts))
    found = (match for part, _, match in model.found(module) if part == denoiser)
    values = (value for match in found for value in match.values)
    return any(NUMBER.fullmatch(place) or U_NET.match(text) for place, text in values)


def _plan_gguf(options: Quantize, files: GgufFiles, model: GgufImageModel | None) -> Plan:
    """Everything that is done to a GGUF file: its matrices in the types of a mix. `model`: it as
    one of images."""
    header, headers = read_model(files)
    check_types(gguf_package(), {entry.type for entry in header.tensors})
    imatrix = if_given(read_importance, options.imatrix)
    if model is None:
        mix = types_of(header, options.to, weighed=imatrix is not None)
    else:
        is_inside = lambda entry: _is_in_block(model, entry.name.removesuffix(".weight"))
        mix = image_types_of(filter(is_inside, header.tensors), options.to)
    stored = {entry.name: as_stored(entry) for entry in header.tensors}
    changed = [stored[name] for name, type_ in mix.items() if stored[name].types != (type_,)]
    shards = {name: one.header for name, one in headers.items()}
    headers = {name: with_number(one, MIXES[options.to][1]) for name, one in headers.items()}
    base = GgufCheckpoint(files.folder, shards, {}, None, None, {}, {}, headers=headers)
    if model is not None:
        base = replace(model, headers=headers)
    formats = [retyped(one, (mix[one.key],)) for one in changed]
    formats = [weighed(one, imatrix.sums) if imatrix else one for one in formats]
    tasks = [EncodedWeight(one.key, stored[one.key], one) for one in formats]
    again = [one.key for one in changed if one.format not in FLOATS]
    notes = [f"{WARNING}already rounded, to blocks: {listed(again)}"] if again else []
    own = gguf_files(base, tasks, formats, output_file(files.folder, options.out))
    plan = plan_of(
        "quantize",
        options.recipe_options() | ({"imatrix": imatrix.sha256} if imatrix else {}),
        [base],
        shards=own,
        files=files_beside(base, own, notes, asked=options.modelfile),
        decisions={"quantized": len(tasks)},
        notes=notes,
    )
    return replace(plan, is_file=len(own) == 1)


def _compensated(quantization: QuantizationPlan, stats: Checkpoint) -> dict[str, Task]:
    """The tasks of all linear layers, by key; a note on the other weights."""
    base, modules = quantization.base, quantization.modules
    linear = {name: w for name, w in modules.items() if w.key in quantization.weights}
    shapes = {name: quantization.weights[w.key] for name, w in linear.items()}
    selected = select_covariances(stats, {name: w.shape[1] for name, w in shapes.items()})
    others = [name for name in modules if name not in linear]
    if others:
        quantization.notes.append(f"rounded to nearest, no linear layers: {listed(others)}")
    tasks: dict[str, Task] = {}
    for name, packed in linear.items():
        weight = shapes[name]
        span = Span(range(weight.shape[0]), selected[name])
        compensation = Compensation((span,), weight.transposed)
        tasks[weight.key] = EncodedWeight(
            weight.key, base.tensors[weight.key], packed, compensation
        )
    return tasks
