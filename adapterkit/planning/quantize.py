"""quantize: a checkpoint's linear layers into a quantized format."""

from collections.abc import Callable
from dataclasses import replace

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import WARNING, AdapterkitError, Problems, listed
from adapterkit.gguf.file import check_types, gguf_package
from adapterkit.gguf.header import FLOATS, GgufFiles, find_gguf, read_model
from adapterkit.gguf.mixes import MIXES, types_of, with_number
from adapterkit.gguf.model import GgufCheckpoint
from adapterkit.gguf.tensors import as_stored
from adapterkit.options import flag_of
from adapterkit.patterns import matcher
from adapterkit.plan import Compensation, Plan, Span, Task
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.pipeline import Pipeline, is_pipeline, read_pipeline
from adapterkit.planning.inputs.sources import if_given, open_model, open_statistics
from adapterkit.planning.merge.gguf import files_beside, read_importance
from adapterkit.planning.outputs.cards import model_card
from adapterkit.planning.outputs.gguf_model import gguf_files, retyped, weighed
from adapterkit.planning.outputs.model import QuantizedModel
from adapterkit.planning.outputs.one_file import output_file
from adapterkit.planning.pipelines import joined
from adapterkit.planning.quantization import QuantizationPlan, plan_quantization
from adapterkit.registry import written_formats
from adapterkit.shared_options import BlockOptions, missing_statistics
from adapterkit.tasks.quantize import EncodedWeight
from adapterkit.tasks.statistics import select_covariances
from adapterkit.verbs.quantize import Quantize
from adapterkit.weights.detect import check_not_quantized


def plan_quantize(options: Quantize) -> Plan:
    """Everything a quantization will do, or `Refused`."""
    Problems(missing_statistics(options.rounding, options.stats)).raise_all()
    stats = if_given(open_statistics, options.stats)
    if is_pipeline(folder := open_model(options.base)):
        return plan_pipeline_quantization(read_pipeline(folder), options)
    files = find_gguf(folder)
    Problems(_unfit_options(options, is_gguf=files is not None)).raise_all()
    if files:
        return _plan_gguf(options, files)
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
    errors += _unfit_options(options, is_gguf=False)
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


def _unfit_options(options: Quantize, *, is_gguf: bool) -> list[AdapterkitError]:
    """`Refused` for formats and options that this kind of base has no use for."""
    hint = "first adapterkit dequantize MODEL.gguf --out DIR" if is_gguf else "give a GGUF file"
    errors = Problems(where="options", hint=hint)
    known = MIXES if is_gguf else written_formats()
    others = ("imatrix", "modelfile"), ("skip", "block_size", "double_quant", "stats")
    wrong = [flag_of(name) for name in others[is_gguf] if getattr(options, name)]
    if wrong or options.to not in known:
        errors.add(f"--to {options.to} {' '.join(wrong)} with this base", ", ".join(known))
    return errors


def _plan_gguf(options: Quantize, files: GgufFiles) -> Plan:
    """Everything that is done to a GGUF file: its matrices in the types of a mix."""
    header, headers = read_model(files)
    check_types(gguf_package(), {entry.type for entry in header.tensors})
    imatrix = if_given(read_importance, options.imatrix)
    mix = types_of(header, options.to, weighed=imatrix is not None)
    stored = {entry.name: as_stored(entry) for entry in header.tensors}
    changed = [stored[name] for name, type_ in mix.items() if stored[name].types != (type_,)]
    shards = {name: one.header for name, one in headers.items()}
    headers = {name: with_number(one, MIXES[options.to][1]) for name, one in headers.items()}
    base = GgufCheckpoint(files.folder, shards, {}, None, None, {}, {}, headers=headers)
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
