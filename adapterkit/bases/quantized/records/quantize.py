"""quantize: encode a checkpoint's linear layers in a quantized format."""

from adapterkit.core.options import SOURCE, StrPath, argument, choice, option, record
from adapterkit.core.registry import load, written_formats
from adapterkit.core.shared_options import (
    QUANTIZED,
    compensation_option,
    importance_option,
    model_output_option,
    modelfile_option,
)
from adapterkit.core.verb import WritingVerb, function_of
from adapterkit.doors import CONTAINERS
from adapterkit.verbs.shared.options import BlockOptions


def targets() -> list[str]:
    """The formats that can be written, those of image models, and the mixes of a GGUF file."""
    mixes = load(CONTAINERS[".gguf"]["mixes"])
    return [*written_formats(), *written_formats("image_targets"), *mixes]


@record
class Quantize(WritingVerb, BlockOptions):
    """Quantize a checkpoint's linear layers, weight by weight: Q = encode(W).

    `to`: nf4, fp4 (bitsandbytes 4-bit, `block_size` values with one scale, `double_quant`: the
    scales quantized too), int8 (bitsandbytes), fp8 (blocks of 128 x 128), w4a16 and w8a16
    (compressed-tensors' int4 in groups of `block_size`, 128 where that divides the width, and int8
    in rows), mxfp4 (GPT-OSS: its experts, as OpenAI stores them; else compressed-tensors'). As with
    transformers' `from_pretrained(quantization_config=...)`, the output layer, weights tied to it,
    embeddings and norms do not change; `skip` names further modules, as `targets` of `init` does.
    The files equal those of transformers, bit for bit for bitsandbytes' formats. The receipt has
    each weight's relative error. Raises `Refused` before anything is written.

    `rounding="compensated"` carries the rounding error of each input of a layer into the inputs
    that follow, so that ‖(W - Q) C^½‖_F is small (GPTQ, arXiv:2210.17323); `stats` is a file with
    `<module>.covariance`, C = E[x xᵀ], of every quantized layer. Scales are those of rounding to
    nearest, which stacks of experts always use.

    In a diffusers pipeline, the denoisers and the text encoders are quantized, diffusers' models to
    nf4, fp4 or int8; `skip` matches components, and modules after their component's name.

    In a single-file image or video model, the linear layers in the denoiser's blocks become
    ComfyUI's comfy-fp8, comfy-mxfp8, comfy-nvfp4 or comfy-int8; other tensors do not change.

    The matrices of a GGUF file, also a split one, get the types of a llama.cpp mix (q8_0, q4_k_m,
    ...), in an image model those of ComfyUI-GGUF; other tensors do not change. `imatrix` weights
    the errors, `modelfile` writes a Modelfile.
    """

    planner = "bases.quantized.planning.quantize:plan_quantize"
    command = """Quantize a model's linear layers.

    As in transformers, the output layer, embeddings and norms are not quantized.

    \b
    Example:
      adapterkit quantize ./model --to nf4 --double-quant --out model-nf4
      adapterkit quantize ./model --to int8 --skip ".*layers[.]0[.].*" --out model-int8
      adapterkit quantize model.gguf --to q4_k_m --out model-q4_k_m.gguf
      adapterkit quantize flux.safetensors --to comfy-fp8 --out flux-fp8.safetensors
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    to: str = option(check=choice(targets), help="Format to write, listed below.")
    rounding: str = option(
        default="nearest",
        check=choice(("nearest", "compensated")),
        help="Round to nearest, or correct errors in later inputs (compensated), so that outputs "
        "change least.",
        section=QUANTIZED,
    )
    stats: StrPath | None = compensation_option()
    imatrix: StrPath | None = importance_option()
    out: StrPath = model_output_option()
    modelfile: bool = modelfile_option()


quantize = function_of(Quantize)
