"""mxfp4: the experts of OpenAI's GPT-OSS, blocks of 32 FP4 values that share a power of 2."""

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core.errors import Refused, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import Parts, PlainWeight, QuantizedModules, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp4
from adapterkit.kernels.quant.grid import MX_GROUP
from adapterkit.kernels.quant.stochastic import Draws

BLOCKS, SCALES = "_blocks", "_scales"
STACKS = (".gate_up_proj", ".down_proj")  # of GptOssExperts
# modules that transformers' own config of GPT-OSS excludes
EXCLUDED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]


@dataclass(frozen=True, kw_only=True)
class Mxfp4(QuantizedWeight):
    """W[e, in, out] = code * 2^(scale - 127), stored [e, out, in / 32, 16] with a scale for each
    block (OCP MX 1.0)."""

    name = "mxfp4"
    methods = ("mxfp4",)
    targets = ("mxfp4",)
    modules = ("GptOssExperts",)

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> "Mxfp4 | None":
        experts, width, out = weight.shape
        if width % MX_GROUP:
            return None
        scales = weight.part(SCALES, "U8", (experts, out, width // MX_GROUP))
        blocks = weight.part(BLOCKS, "U8", (*scales.shape, MX_GROUP // 2))
        return cls.encoding(weight, (blocks, scales))

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        skipped = modules.skipped or ()
        parent = lambda name: name.rpartition(".")[0]
        halves = {*map(parent, modules.packed)} & {*map(parent, skipped)}
        if halves:
            raise Refused(
                f"one of the stacks of {', '.join(map(shown, sorted(halves)))} is quantized",
                expected="both or none",
                where="--skip",
                hint="give a regex that matches the module",
                code="AK407",
            )
        plain = {parent(name) for name in skipped if name.endswith(STACKS)}
        return {"modules_to_not_convert": [*EXCLUDED, *sorted(plain)], "quant_method": "mxfp4"}

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        if scan.method not in cls.methods:
            return
        for name, spec in scan.with_ending(BLOCKS):
            scales = scan.siblings(name, SCALES)
            if scales is None:
                continue
            (scale,) = scales
            fits = len(spec.shape) == 4 and spec.dtype == scale.dtype == "U8"
            fits = fits and spec.shape[-1] == MX_GROUP // 2 and spec.shape[:-1] == scale.shape
            problem = f"{spec.dtype} {spec.shape}, scales {scale.dtype} {scale.shape}"
            expected = "U8 (experts, out, blocks, 16), U8 scales without the 16"
            if scan.check(spec.key, fits, problem, expected):
                scan.check_finite(scale)
                experts, out, blocks, _ = spec.shape
                shape = (experts, blocks * MX_GROUP, out)
                yield cls.of((spec, scale), key=name, dtype=scan.compute_dtype, shape=shape)

    def decode(self, stored: Parts) -> Tensor:
        blocks, scales = self.values(stored)
        return fp4.decode_mxfp4(blocks, scales).transpose(-2, -1).contiguous()

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode as triton_kernels, and so transformers, quantize: nothing saturates."""
        rows = weight.transpose(-2, -1).contiguous()
        draws = draws and draws.by_columns(*weight.shape[-2:])
        return self.as_parts(*fp4.requantize_mxfp4(rows, self.stored_scale(stored), "up", draws))

    @property
    def rows_per_block(self) -> int:
        return MX_GROUP

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return dict.fromkeys((0, 1), (1, 1, MX_GROUP))
