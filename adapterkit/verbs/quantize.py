"""quantize: a checkpoint's linear layers into a quantized format."""

from typing import Any

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.engines.execution import Execution, writes
from adapterkit.options import StrPath, choice
from adapterkit.plan import Plan, Progress
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.model_output import QuantizedModel
from adapterkit.planning.quantization import plan_quantization, targets
from adapterkit.planning.sources import open_model
from adapterkit.receipt import Receipt
from adapterkit.weights.detect import check_not_quantized


@writes(to=choice(lambda: targets()))
def quantize(
    base: StrPath,
    *,
    out: StrPath,
    to: str,
    block_size: int | None = None,
    double_quant: bool = False,
    skip: str | None = None,
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    engine: str = "local",
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
    """
    options = {"to": to, "block_size": block_size, "double_quant": double_quant, "skip": skip}
    plan = plan_quantize(open_model(base), options)
    execution = Execution(out, hash, device, memory, engine, resume, overwrite, dry_run, progress)
    return execution.run(plan)


def plan_quantize(folder: Folder, options: dict[str, Any]) -> Plan:
    """Everything a quantization will do, or `Refused`."""
    base = open_checkpoint(folder)
    check_not_quantized(base)
    quantization = plan_quantization(base, options)
    output = QuantizedModel(
        base, quantization.quantized, quantization.upcast_to_fp32(), quantization.config()
    )
    receipt_options = {key: value for key, value in options.items() if value}
    headers = header_hashes({0: base}, configs=(0,))
    decisions = {"left_out": sorted(quantization.skipped), "quantised": len(quantization.quantized)}
    quantization.notes.extend(quantization.size_notes())
    shards, files = output.shards(), output.files(f"quantized to {options['to']}")
    file_ids = identities((folder,), headers)
    return Plan(
        "quantize",
        receipt_options,
        (folder,),
        headers,
        file_ids,
        shards,
        files,
        decisions,
        tuple(quantization.notes),
    )
