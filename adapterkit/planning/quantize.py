"""quantize: a checkpoint's linear layers into a quantized format."""

from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import Problems, listed
from adapterkit.plan import Compensation, Plan, Span, Task
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.sources import if_given, open_model, open_statistics
from adapterkit.planning.outputs.model import QuantizedModel
from adapterkit.planning.quantization import QuantizationPlan, plan_quantization
from adapterkit.shared_options import BlockOptions, missing_statistics
from adapterkit.tasks.quantize import EncodedWeight
from adapterkit.tasks.statistics import select_covariances
from adapterkit.verbs.quantize import Quantize
from adapterkit.weights.detect import check_not_quantized


def plan_quantize(options: Quantize) -> Plan:
    """Everything a quantization will do, or `Refused`."""
    Problems(missing_statistics(options.rounding, options.stats)).raise_all()
    stats = if_given(open_statistics, options.stats)
    base = open_checkpoint(open_model(options.base))
    check_not_quantized(base)
    how = {"to": options.to, **vars(options.only(BlockOptions))}
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
