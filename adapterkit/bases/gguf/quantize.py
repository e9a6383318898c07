"""Requantize GGUF files to other types of blocks, or decode them to floats."""

import re
from dataclasses import replace

from adapterkit.bases.gguf.base import GgufBase, GgufImageModel, small_files
from adapterkit.bases.gguf.file import check_types, gguf_package
from adapterkit.bases.gguf.header import FLOATS, read_model
from adapterkit.bases.gguf.imatrix import read_importance
from adapterkit.bases.gguf.mixes import MIXES, image_types_of, types_of, with_number
from adapterkit.bases.gguf.model import GgufCheckpoint, loads_in_float32, open_gguf
from adapterkit.bases.gguf.output import gguf_files, retyped, weighed
from adapterkit.bases.gguf.tensors import as_stored
from adapterkit.bases.gguf.weight import GgufWeight
from adapterkit.bases.images.base import file_notes
from adapterkit.bases.images.quantize import is_in_block
from adapterkit.bases.quantized.planning.dequantize import nothing_quantized
from adapterkit.bases.quantized.planning.quantize import check_fit
from adapterkit.bases.quantized.records.dequantize import Dequantize
from adapterkit.bases.quantized.records.quantize import Quantize
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import Header
from adapterkit.core.errors import WARNING, Refused, listed, shown
from adapterkit.core.inputs.base_door import SAFETENSORS
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import if_given
from adapterkit.core.options import StrPath, parse_size
from adapterkit.core.outputs.cards import model_card
from adapterkit.core.outputs.folder_files import as_json, model_files
from adapterkit.core.outputs.model import plan_shard, plan_shards_of_size
from adapterkit.core.plan import Plan, Step
from adapterkit.core.tasks.quantize import EncodedWeight

SHARD_SIZE = "5GB"  # of floats
FIRST = "make floats of it first\nadapterkit dequantize BASE --out floats"
UNFIT = ("skip", "block_size", "double_quant", "stats")


def plan_gguf_quantization(kind: GgufBase, options: Quantize) -> Plan:
    """Plan a GGUF file with its matrices in the types of a mix."""
    files, model = kind.files, kind.images
    check_fit(options, [*MIXES], UNFIT, FIRST)
    header, headers = read_model(files)
    check_types(gguf_package(), {entry.type for entry in header.tensors})
    imatrix = if_given(read_importance, options.imatrix)
    if model is None:
        mix = types_of(header, options.to, weighed=imatrix is not None)
    else:
        is_inside = lambda entry: is_in_block(model, entry.name.removesuffix(".weight"))
        mix = image_types_of(filter(is_inside, header.tensors), options.to)
    stored = {entry.name: as_stored(entry) for entry in header.tensors}
    changed = [stored[name] for name, type_ in mix.items() if stored[name].types != (type_,)]
    # inputs are known by the headers that they have, outputs have the number of the mix
    base = GgufCheckpoint.of(files.folder, headers, {}) if model is None else model
    headers = {name: with_number(one, MIXES[options.to][1]) for name, one in headers.items()}
    base = replace(base, headers=headers)
    formats = [retyped(one, (mix[one.key],)) for one in changed]
    formats = [weighed(one, imatrix.sums) if imatrix else one for one in formats]
    tasks = [EncodedWeight(one.key, stored[one.key], one) for one in formats]
    again = [one.key for one in changed if one.format not in FLOATS]
    notes = [f"{WARNING}already rounded, to blocks: {listed(again)}"] if again else []
    own = gguf_files(base, tasks, formats, kind.output_file(options.out))
    plan = plan_of(
        "quantize",
        options.recipe_options() | ({"imatrix": imatrix.sha256} if imatrix else {}),
        [base],
        shards=own,
        files=small_files(base, own, notes, asked=options.modelfile),
        decisions={"quantized": len(tasks)},
        notes=notes,
    )
    return replace(plan, is_file=len(own) == 1)


def plan_gguf_dequantization(kind: GgufBase, options: Dequantize) -> Plan:
    """Plan a file with every parameter decoded, moved into its layout and rounded once."""
    if kind.images is not None:
        return _plan_images(kind.images, options)
    model, dtype = open_gguf(kind.files, tokenizer=True), options.dtype
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


def _plan_images(base: GgufImageModel, options: Dequantize) -> Plan:
    """An image model in GGUF as one safetensors file: blocks decoded, in BF16 or `dtype`; floats
    keep their dtype."""
    name = _safetensors_file(options.out)
    given = dtypes.parse(options.dtype) if options.dtype else "BF16"
    steps, count = [], 0
    for key, spec in base.tensors.items():
        assert isinstance(spec, GgufWeight)
        is_float = spec.format in FLOATS
        count += not is_float
        steps.append(Step(key, spec.format if is_float else given, spec.shape, spec))
    if not count:
        raise nothing_quantized(base.folder)
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


def _safetensors_file(out: StrPath) -> str:
    """The name of an output that is one safetensors file; `Refused` for other names."""
    name = re.split(r"[/\\:]", str(out))[-1]
    if not name.lower().endswith(SAFETENSORS):
        raise Refused(
            f"--out {shown(out)} for an image model in GGUF",
            expected=f"a name that ends in {SAFETENSORS}",
            where="--out",
            hint=f"give --out {shown(out)}{SAFETENSORS}",
            code="AK601",
        )
    return name
