"""mxfp4: OpenAI's GPT-OSS, experts in blocks of 32 FP4 values with a power of 2: `X_blocks` and `X_scales` hold the stack X."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.errors import Refused, shown
from adapterkit.kernels import fp4
from adapterkit.kernels.stochastic import Draws
from adapterkit.weights.codec import CheckpointScan, PlainWeight, QuantizedModules, QuantizedWeight

BLOCKS, SCALES = "_blocks", "_scales"
STACKS = (".gate_up_proj", ".down_proj")  # of GptOssExperts
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@dataclass(frozen=True, kw_only=True)
class Mxfp4(QuantizedWeight):
    """W[e, in, out] = code * 2^(scale - 127), stored [e, out, in / 32, 16] with a scale for each block (OCP MX 1.0)."""

    name = "mxfp4"
    methods = ("mxfp4",)
    targets = ("mxfp4",)
    modules = ("GptOssExperts",)

    @classmethod
    def for_encoding(
        cls, target: str, weight: PlainWeight, options: dict[str, Any]
    ) -> "Mxfp4 | None":
        experts, width, out = weight.shape
        if width % fp4.MX_GROUP:
            return None
        scales = weight.part(SCALES, "U8", (experts, out, width // fp4.MX_GROUP))
        blocks = weight.part(BLOCKS, "U8", (*scales.shape, fp4.MX_GROUP // 2))
        place = {"file": "", "start": 0, "stop": blocks.nbytes}
        return cls(
            key=weight.key, dtype=weight.dtype, shape=weight.shape, parts=(blocks, scales), **place
        )

    @classmethod
    def config(cls, choice: QuantizedModules) -> dict[str, Any]:
        halves = {name.rpartition(".")[0] for name in choice.packed} & {
            name.rpartition(".")[0] for name in choice.skipped or ()
        }
        if halves:
            found, expected = (
                f"one of the stacks of {', '.join(map(shown, sorted(halves)))} is quantized",
                "both or none",
            )
            raise Refused(
                found,
                expected=expected,
                where="--skip",
                hint="give a regex that matches the module",
            )
        whole = {name.rpartition(".")[0] for name in choice.skipped or () if name.endswith(STACKS)}
        return {"modules_to_not_convert": [*KEPT, *sorted(whole)], "quant_method": "mxfp4"}

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        if found.method not in cls.methods:
            return
        for key, spec in list(found.tensors.items()):
            if not key.endswith(BLOCKS):
                continue
            name = key.removesuffix(BLOCKS)
            scales = found.siblings(name, SCALES)
            if scales is None:
                continue
            (scale,) = scales
            fits = len(spec.shape) == 4 and spec.dtype == scale.dtype == "U8"
            fits = fits and spec.shape[-1] == fp4.MX_GROUP // 2 and spec.shape[:-1] == scale.shape
            text = f"{spec.dtype} {spec.shape}, scales {scale.dtype} {scale.shape}"
            if found.check(
                key, fits, text, "U8 (experts, out, blocks, 16), U8 scales without the 16"
            ):
                found.check_finite(scale)
                experts, out, blocks, _ = spec.shape
                shape, dtype = (experts, blocks * fp4.MX_GROUP, out), found.compute_dtype
                place = {
                    "file": spec.file,
                    "start": spec.start,
                    "stop": spec.stop,
                    "folder": spec.folder,
                }
                yield cls(key=name, dtype=dtype, shape=shape, parts=(spec, scale), **place)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        blocks, scales = (stored[part.key] for part in self.parts)
        return fp4.decode_mxfp4(blocks, scales).transpose(-2, -1).contiguous()

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """As triton_kernels and so transformers quantize: nothing saturates."""
        blocks, scales = self.parts
        made = fp4.encode_mxfp4(weight.transpose(-2, -1).contiguous(), rule="up")
        return {blocks.key: made.codes, scales.key: made.scale}

    def encode_drawn(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        blocks, scales = (part.key for part in self.parts)
        turned = draws.by_columns(*weight.shape[-2:])
        made = fp4.requantize_mxfp4(
            weight.transpose(-2, -1).contiguous(), stored[scales], "up", turned
        )
        return {blocks: made.codes, scales: made.scale}

    @property
    def rows_per_block(self) -> int:
        return fp4.MX_GROUP

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        groups = slice(first // fp4.MX_GROUP, last // fp4.MX_GROUP)
        return {part.key: stored[part.key][matrix, :, groups] for part in self.parts}
