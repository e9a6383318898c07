"""Quantize image models with their publisher's names to ComfyUI's formats."""

import re
from dataclasses import replace

from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.adapters.formats.modules.names import NUMBER
from adapterkit.bases.images.base import file_notes
from adapterkit.bases.quantized.planning.quantize import check_fit
from adapterkit.bases.quantized.records.quantize import Quantize
from adapterkit.core import dtypes
from adapterkit.core.adapter.targets import selecting
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.base_door import Base
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.outputs.model import QuantizedModel
from adapterkit.core.plan import Plan
from adapterkit.core.registry import members, written_formats
from adapterkit.core.weights.codec import PlainWeight, QuantizedWeight
from adapterkit.core.weights.detect import check_not_quantized

U_NET = re.compile(r"(?:input|middle|output)_blocks?\.\d")  # whose blocks are rows of tables
UNFIT = ("block_size", "double_quant", "stats", "imatrix", "modelfile")


def plan_image_quantization(base: Base, options: Quantize) -> Plan:
    """Plan an image model in one file with the linear layers of its denoiser's blocks in one of
    ComfyUI's formats."""
    check_fit(options, written_formats("image_targets"), UNFIT, "give one of these formats")
    model = base.images
    assert model is not None
    check_not_quantized(model)
    (codec,) = (one for one in members("codecs").values() if options.to in one.image_targets)
    layers = [module for module in sorted(model.modules) if is_in_block(model, module)]
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
            expected="layers in the denoiser's blocks, with sizes that the format supports",
            where=model.name,
            hint="check --skip, or use another format",
            code="AK105",
        )
    name = base.output_file(options.out)
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


def is_in_block(model: SingleFileModel, module: str) -> bool:
    """Return whether the module is a linear layer in a numbered block of the denoiser, or a kernel
    that a GGUF file stores as a matrix."""
    spec = model.tensors.get(f"{module}.weight")
    if spec is None or spec.dtype not in dtypes.FLOATS:
        return False
    if len(getattr(spec, "shapes", (spec.shape,))[0]) != 2:
        return False
    denoiser = next(iter(model.parts))
    found = (match for part, _, match in model.found(module) if part == denoiser)
    values = (value for match in found for value in match.values)
    return any(NUMBER.fullmatch(place) or U_NET.match(text) for place, text in values)
