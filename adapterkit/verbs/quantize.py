"""quantize: a checkpoint's linear layers into a quantized format."""

from typing import Any

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.execution import Execution, executes
from adapterkit.errors import listed, refuse_all
from adapterkit.options import Executor, StrPath, check_stats, choice
from adapterkit.plan import Compensation, Plan, Progress, Span, Task
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.model_output import QuantizedModel
from adapterkit.planning.quantization import QuantizationPlan, plan_quantization, targets
from adapterkit.planning.sources import open_model, open_statistics
from adapterkit.receipt import Receipt
from adapterkit.tasks.compensated import CompensatedWeight
from adapterkit.tasks.statistics import select_covariances
from adapterkit.weights.detect import check_not_quantized


@executes(to=choice(lambda: targets()), rounding=choice(("nearest", "compensated")))
def quantize(
    execution: Execution,
    base: StrPath,
    *,
    out: StrPath,
    to: str,
    block_size: int | None = None,
    double_quant: bool = False,
    skip: str | None = None,
    rounding: str = "nearest",
    stats: StrPath | None = None,
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
    """Quantize a checkpoint's linear layers, weight by weight: Q = encode(W).

    `to`: nf4, fp4 (bitsandbytes 4-bit, `block_size` values with one scale, `double_quant`: the
    scales quantized too), int8 (bitsandbytes), fp8 (blocks of 128 x 128), w4a16 and w8a16
    (compressed-tensors' int4 in groups of `block_size`, 128 where that divides the width, and int8
    in rows), mxfp4 (GPT-OSS: its experts, as OpenAI stores them; else compressed-tensors'). What
    transformers' `from_pretrained(quantization_config=...)` leaves alone is left alone: the output
    layer, what is tied to it, embeddings, norms; `skip`: a regex on modules that are too. The files
    are those that transformers saves, bit for bit where bitsandbytes defines them. The receipt has
    each weight's relative error. Raises `Refused` before anything is written.

    `rounding="compensated"` carries the rounding error of each input of a layer into the inputs
    that follow, so that ‖(W - Q) C^½‖_F is small (GPTQ, arXiv:2210.17323); `stats` is a file with
    `<module>.covariance`, C = E[x xᵀ], of every layer that is quantized. Scales are those of
    rounding to nearest; stacks of experts are rounded so.
    """
    options = {"to": to, "block_size": block_size, "double_quant": double_quant, "skip": skip}
    options |= {"rounding": rounding}
    refuse_all(check_stats(rounding, stats))
    plan = plan_quantize(
        open_model(base), options, None if stats is None else open_statistics(stats)
    )
    return execution.run(plan)


def plan_quantize(folder: Folder, options: dict[str, Any], stats: Folder | None = None) -> Plan:
    """Everything a quantization will do, or `Refused`."""
    base = open_checkpoint(folder)
    check_not_quantized(base)
    quantization = plan_quantization(base, options)
    tasks, inputs = quantization.upcast_to_fp32(), [base]
    if stats is not None:
        inputs.append(open_checkpoint(stats, 1))
        tasks |= _compensated(quantization, inputs[1])
    output = QuantizedModel(base, quantization.quantized, tasks, quantization.config())
    receipt_options = {key: value for key, value in options.items() if value and value != "nearest"}
    folders = tuple(one.folder for one in inputs)
    headers = header_hashes(dict(enumerate(inputs)), configs=(0,))
    decisions = {"left_out": sorted(quantization.skipped), "quantised": len(quantization.quantized)}
    quantization.notes.extend(quantization.size_notes())
    shards, files = output.shards(), output.files(f"quantized to {options['to']}")
    file_ids = identities(folders, headers)
    return Plan(
        "quantize",
        receipt_options,
        folders,
        headers,
        file_ids,
        shards,
        files,
        decisions,
        tuple(quantization.notes),
        models=tuple(range(len(folders))),
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
        tasks[weight.key] = CompensatedWeight(
            weight.key, base.tensors[weight.key], packed, compensation
        )
    return tasks
