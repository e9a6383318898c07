"""dequantize: decode a quantized checkpoint to floats."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterkit.bases.quantized.records.dequantize import Dequantize
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.shards import stem_of
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import WARNING, Problems, Refused, listed
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import open_model
from adapterkit.core.options import parse_size
from adapterkit.core.outputs.cards import model_card
from adapterkit.core.outputs.folder_files import model_files
from adapterkit.core.outputs.model import check_gaps, plan_shard, plan_shards_of_size
from adapterkit.core.plan import Plan, Step
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantization_files, quantized_weights
from adapterkit.core.weights.parameters import Slot, known_slots


def plan_dequantize(options: Dequantize) -> Plan:
    """Plan a dequantization, or raise `Refused`."""
    base = kind_of(open_model(options.base))
    if own := base.own("dequantize"):
        return own(base, options)
    name = base.output_file(options.out)
    plan = plan_model_dequantization(open_checkpoint(base.folder), options, name)
    return replace(plan, is_file=name is not None)


def nothing_quantized(folder: Folder) -> Refused:
    return Refused(
        "no quantized weights",
        expected="a quantized checkpoint",
        where=folder.name,
        hint="use it as it is",
        code="AK206",
    )


def note_of_layout(base: str, slots: Mapping[str, Sequence[Slot]]) -> str:
    """The warning that the floats of a base keep a layout that transformers does not load."""
    stored = [slot.key for own in slots.values() for slot in own]
    return (
        f"{WARNING}{base}: transformers has another layout for {len(stored)} tensors: "
        f"{listed(stored)}; load the output with the program that made the base"
    )


def plan_model_dequantization(
    original: Checkpoint, options: Dequantize, name: str | None = None
) -> Plan:
    """The dequantization of one safetensors model; `name`: of a single output file."""
    base = decoded_view(original)
    packed = quantized_weights(base.tensors)
    if not packed:
        raise nothing_quantized(original.folder)
    notes: list[str] = []
    Problems(check_gaps(base, None, notes)).raise_all()
    if own := known_slots(base):
        notes.append(note_of_layout(original.name, own))
    target = dtypes.parse(options.dtype) if options.dtype else None
    steps: dict[str, list[Step]] = {name: [] for name in original.shards}
    for key, spec in base.tensors.items():
        dtype = target if target and isinstance(spec, QuantizedWeight) else spec.dtype
        steps[spec.file].append(Step(key, dtype, spec.shape, spec))
    config = dict(base.config)
    if target and "config.json" in original.files:
        config["dtype"] = dtypes.CONFIG_NAME[target]
        config.pop("torch_dtype", None)
    together = [step for group in steps.values() for step in group]
    steps = steps if name is None else {name: together}
    headers = dict(zip(steps, original.shards.values(), strict=True))
    if options.max_shard_size and name is None:
        size = parse_size(options.max_shard_size)
        shards = plan_shards_of_size(together, size, stem_of(headers))
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
