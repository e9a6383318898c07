"""quantize: encode a checkpoint's linear layers in a quantized format."""

from collections.abc import Callable, Sequence

from adapterkit.bases.quantized.planning.weights import QuantizationPlan, plan_quantization
from adapterkit.bases.quantized.records.quantize import Quantize
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import Refused, listed
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import if_given, open_model, open_statistics
from adapterkit.core.options import flag_of
from adapterkit.core.outputs.model import QuantizedModel
from adapterkit.core.plan import Compensation, Plan, Span, Task
from adapterkit.core.registry import written_formats
from adapterkit.core.shared_options import check_has_statistics
from adapterkit.core.tasks.quantize import EncodedWeight
from adapterkit.core.weights.detect import check_not_quantized
from adapterkit.verbs.shared.options import BlockOptions
from adapterkit.verbs.shared.statistics_file import select_covariances

OF_GGUF = ("imatrix", "modelfile")


def plan_quantize(options: Quantize) -> Plan:
    """Plan a quantization, or raise `Refused`."""
    check_has_statistics(options.rounding, options.stats)
    stats = if_given(open_statistics, options.stats)
    base = kind_of(open_model(options.base))
    if own := base.own("quantize"):
        return own(base, options)
    check_fit(options)
    base.output_file(options.out)
    return plan_model_quantization(open_checkpoint(base.folder), options, options.skip, stats)


def plan_model_quantization(
    base: Checkpoint,
    options: Quantize,
    skip: str | Sequence[str] | Callable[[str], bool] | None,
    stats: Folder | None = None,
) -> Plan:
    """The quantization of one model; `skip`: a pattern of modules, or their matcher."""
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


def check_fit(
    options: Quantize,
    known: Sequence[str] | None = None,
    unfit: Sequence[str] = OF_GGUF,
    hint: str = "give a GGUF file, or one of an image model",
) -> None:
    """`Refused` for formats that this kind of base does not support (by default a model's), and for
    options that do not apply to it."""
    known = written_formats() if known is None else known
    wrong = [flag_of(name) for name in unfit if getattr(options, name)]
    if wrong or options.to not in known:
        raise Refused(
            f"{' and '.join([f'--to {options.to}', *wrong])} with this base",
            expected=", ".join(known),
            where="options",
            hint=hint,
            code="AK102",
        )


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
