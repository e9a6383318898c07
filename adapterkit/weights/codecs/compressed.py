"""compressed-tensors: what llm-compressor writes and vLLM reads; a config of groups, each with its scheme and its layout."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.kernels import fp4, fp8
from adapterkit.kernels.common import Scaled, block_amax
from adapterkit.kernels.integers import (
    Integers,
    decode_int8,
    decode_packed,
    encode_integers,
    expected_errors,
    pack,
    pack_zeros,
    unpack_zeros,
)
from adapterkit.kernels.stochastic import Draws
from adapterkit.patterns import matcher
from adapterkit.weights.codec import CheckpointScan, PlainWeight, QuantizedModules, QuantizedWeight

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
CODES = (f".{PACKED}", ".weight")
SIZES = (128, 64, 32)  # of groups, that kernels know
LAYOUTS = {  # of the config's format: what codes may be
    "pack-quantized": ("words",),
    "int-quantized": ("int8",),
    "float-quantized": ("fp8",),
    "naive-quantized": ("int8", "fp8"),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp8-quantized": ("mxfp8",),
    "mixed-precision": ("words", "int8", "fp8", "nvfp4", "mxfp4", "mxfp8"),
}
TYPES = {
    "words": "int",
    "int8": "int",
    "fp8": "float",
    "nvfp4": "float",
    "mxfp4": "float",
    "mxfp8": "float",
}
GROUPS = {"nvfp4": fp4.NV_GROUP, "mxfp4": fp4.MX_GROUP, "mxfp8": fp4.MX_GROUP}
BESIDE = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)
CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")  # of an attention
ROWS = 1 << 22  # elements that are encoded at a time


@dataclass(frozen=True, kw_only=True)
class Compressed(QuantizedWeight):
    """W = (code - zero) * scale of int4 and int8 (any bits), FP8, NVFP4 and MXFP4, one scale for a block of W."""

    name = "compressed-tensors"
    methods = ("compressed-tensors",)
    targets = ("w4a16", "w8a16", "mxfp4")
    modules = ("Linear",)
    allows_plain_experts = False

    kind: str
    bits: int
    block: tuple[int, int]  # of the weight, with one scale
    symmetric: bool
    indexed: bool  # weight_g_idx says which group a column is in

    @classmethod
    def for_encoding(
        cls, target: str, weight: PlainWeight, options: dict[str, Any]
    ) -> "Compressed | None":
        out, width = weight.shape
        if not weight.has_weight_name:
            return None
        if target == "mxfp4":
            if width % fp4.MX_GROUP:
                return None
            bits, size = 4, fp4.MX_GROUP
            parts = (
                weight.sibling(PACKED, "U8", (out, width // 2)),
                weight.sibling(SCALE, "U8", (out, width // size)),
            )
        else:
            bits, size = (
                (4, _size(width, options.get("block_size"))) if target == "w4a16" else (8, width)
            )
            codes = weight.sibling(PACKED, "I32", (out, math.ceil(width * bits / 32)))
            parts = (
                codes,
                weight.sibling(SCALE, weight.dtype, (out, width // size)),
                weight.sibling(SHAPE, "I64", (2,)),
            )
        return cls(
            key=weight.key, dtype=weight.dtype, shape=weight.shape, file="", start=0, stop=parts[0].nbytes, parts=parts,
            kind="mxfp4" if target == "mxfp4" else "words", bits=bits, block=(1, size), symmetric=True, indexed=False,
        )  # fmt: skip

    @classmethod
    def config(cls, choice: QuantizedModules) -> dict[str, Any]:
        """A group for each scheme, with its modules by name if there are several."""
        groups: dict[tuple, list[str]] = {}
        for module, one in choice.packed.items():
            assert isinstance(one, Compressed)
            size = (
                None if one.kind == "words" and one.block[1] == one.shape[1] else one.block[1]
            )  # MXFP4 is never of whole rows
            groups.setdefault((one.kind, one.bits, size), []).append(module)
        layout = "mxfp4-pack-quantized" if next(iter(groups))[0] == "mxfp4" else "pack-quantized"
        schemes = {}
        for number, ((kind, bits, size), modules) in enumerate(sorted(groups.items(), key=str)):
            weights = {
                "num_bits": bits,
                "type": TYPES[kind],
                "symmetric": True,
                "dynamic": False,
                "group_size": size,
            }
            weights |= {"strategy": "channel" if size is None else "group"}
            weights |= {"scale_dtype": "torch.uint8"} if kind == "mxfp4" else {}
            targets = ["Linear"] if len(groups) == 1 else modules
            schemes[f"group_{number}"] = {"targets": targets, "weights": weights, "format": layout}
        return {
            "config_groups": schemes,
            "format": layout,
            "ignore": choice.others,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        schemes = (
            _schemes(found)
            if found.method in cls.methods and found.has_keys(".weight_scale")
            else None
        )
        if schemes is None:
            return
        found.fetch(
            spec
            for key, spec in found.tensors.items()
            if key.endswith((".weight_shape", ".weight_g_idx"))
        )
        for key, spec in list(found.tensors.items()):
            ending = next((ending for ending in CODES if key.endswith(ending)), None)
            if ending is None:
                continue
            module = key.removesuffix(ending)
            whole = ending == ".weight" and spec.dtype not in ("I8", "F8_E4M3", "F8_E5M2")
            if whole and f"{module}.weight_scale" not in found.tensors:
                continue
            siblings = found.siblings(module, ".weight_scale")
            scheme = schemes(module) if siblings else None
            if siblings and scheme:
                record = _Look(found, module, spec, siblings[0], scheme).record(cls)
                if record is not None:
                    yield record

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        codes, scale = (stored[part.key] for part in self.parts[:2])
        if self.kind in ("words", "int8"):
            zero, group = self._zero(stored), self._group(stored)
            if self.kind == "words":
                return decode_packed(codes, scale, self.bits, self.shape[1], zero, group)
            return decode_int8(codes, scale, zero, group)
        if self.kind == "nvfp4":
            return fp4.decode_nvfp4(codes, scale, divisor=self._leaf(stored, "weight_global_scale"))
        if self.kind == "mxfp4":
            return fp4.decode_mxfp4(codes, scale)
        grid = [math.ceil(n / size) for n, size in zip(self.shape, self.block, strict=True)]
        return fp8.decode_fp8(codes, scale.view(grid), self.block)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Scales made anew, as compressed-tensors makes them from the weight's largest values."""
        if self.kind not in ("words", "int8"):
            return self._floats(weight, {}, None)
        assert not self.indexed
        size, dtype = math.prod(self.block), dtypes.torch_dtype(self.parts[1].dtype)
        lines = weight.reshape(self._lines)
        made = self._integers(
            encode_integers(lines, self.bits, size, symmetric=self.symmetric, scale_dtype=dtype)
        )
        return made | {
            part.key: torch.tensor(self.shape)
            for part in self.parts
            if part.key.endswith("." + SHAPE)
        }

    def encode_keeping_scales(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """Integers take each group's old scale where that is nearer to W than a new one is: so their codes are stable. NVFP4 keeps
        the weight's global scale, which fused layers share, as long as the largest value allows."""
        if self.kind not in ("words", "int8"):
            return stored | self._floats(weight, stored, draws)
        scale, zero, group = stored[self.parts[1].key], self._zero(stored), self._group(stored)
        lines = weight.reshape(self._lines)
        made = nearest(
            lines, self.bits, scale.reshape(len(lines), -1), zero, group, self.symmetric, draws
        )
        return stored | self._integers(made)

    @property
    def rows_per_block(self) -> int | None:
        if self.kind == "nvfp4" or self._lines[0] != self.shape[0]:
            return None
        zero = None if self.symmetric else self._part("weight_zero_point")
        return (
            self.block[0] if zero is None or zero.dtype != "I32" else 32 // math.gcd(32, self.bits)
        )  # words along the rows

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        codes, scale = (part.key for part in self.parts[:2])
        height, zero = self.block[0], None if self.symmetric else self._part("weight_zero_point")
        views = {
            codes: stored[codes][first:last],
            scale: stored[scale][first // height : math.ceil(last / height)],
        }
        if zero is None:
            return views
        words = (
            slice(first * self.bits // 32, math.ceil(last * self.bits / 32))
            if zero.dtype == "I32"
            else slice(first, last)
        )
        return views | {zero.key: stored[zero.key][words]}

    @property
    def read_only(self) -> str | None:
        return "mxfp8-quantized" if self.kind == "mxfp8" else None

    @property
    def _lines(self) -> tuple[int, int]:
        """The weight so that the groups of a row follow each other: with one scale for all it is one row."""
        return (
            (1, math.prod(self.shape))
            if self.block == self.shape and self.shape[0] > 1
            else (self.shape[0], self.shape[1])
        )

    def _leaf(self, stored: dict[str, Tensor], leaf: str) -> Tensor | None:
        return stored.get(self.key.removesuffix("weight") + leaf)

    def _part(self, leaf: str) -> TensorSpec | None:
        return next(
            (part for part in self.parts if part.key == self.key.removesuffix("weight") + leaf),
            None,
        )

    def _zero(self, stored: dict[str, Tensor]) -> Tensor | None:
        zero = None if self.symmetric else self._leaf(stored, "weight_zero_point")
        if zero is None:
            return None
        if zero.dtype == torch.int32:
            zero = unpack_zeros(zero, self.bits, self.shape[0])
        return zero.reshape(self._lines[0], -1)

    def _group(self, stored: dict[str, Tensor]) -> Tensor | None:
        return self._leaf(stored, "weight_g_idx") if self.indexed else None

    def _integers(self, made: Integers) -> dict[str, Tensor]:
        codes, scale = self.parts[:2]
        whole = made.codes.reshape(self.shape)
        found = {codes.key: pack(whole, self.bits) if self.kind == "words" else whole}
        found[scale.key] = made.scale.to(dtypes.torch_dtype(scale.dtype)).view(scale.shape)
        zero = self._part("weight_zero_point")
        if zero is not None and made.zero is not None:
            found[zero.key] = (
                pack_zeros(made.zero, self.bits)
                if zero.dtype == "I32"
                else made.zero.view(zero.shape)
            )
        return found

    def _floats(
        self, weight: Tensor, stored: dict[str, Tensor], draws: Draws | None
    ) -> dict[str, Tensor]:
        codes, scale = self.parts[:2]
        found: dict[str, Tensor] = {}
        if self.kind == "nvfp4":
            key, divisor = (
                self.key.removesuffix("weight") + "weight_global_scale",
                self._leaf(stored, "weight_global_scale"),
            )
            largest = block_amax(weight, (self.shape[0], self.shape[1])).reshape(1)
            if draws is not None:
                made = fp4.requantize_nvfp4(weight, stored[scale.key], draws, divisor=divisor)
                divisor = made.tensor_scale
            else:
                if divisor is None or float(largest) * float(
                    divisor
                ) > fp4.FP4_MAX * fp8.FP8_MAX * (1 + 2.0**-20):
                    divisor = fp4.nvfp4_divisor(largest)
                made = fp4.encode_nvfp4(weight, divisor=divisor)
            found[key] = divisor
        elif self.kind == "mxfp4":
            if draws is not None:
                made = fp4.requantize_mxfp4(
                    weight, stored[scale.key].view(torch.uint8), "even", draws
                )
            else:
                made = fp4.encode_mxfp4(weight, rule="even")
            made = Scaled(made.codes.flatten(-2), made.scale.view(dtypes.torch_dtype(scale.dtype)))
        elif draws is not None:
            made = fp8.requantize_fp8(weight, self.block, stored[scale.key], draws)
        else:
            made = fp8.encode_fp8(weight, self.block, scale_dtype=dtypes.torch_dtype(scale.dtype))
        return found | {codes.key: made.codes, scale.key: made.scale.view(scale.shape)}


def _size(width: int, wanted: int | None) -> int:
    """Columns with one scale: what is wanted, or the largest of SIZES, if they divide the width; else all."""
    if wanted is not None and wanted not in SIZES:
        expected = " ".join(map(str, SIZES))
        raise Refused(
            f"--block-size {wanted}", expected=expected, where="options", hint="give one of these"
        )
    return next(
        (size for size in SIZES if size <= (wanted or SIZES[0]) and width % size == 0), width
    )


def nearest(
    w: Tensor,  # (out, in) float32
    bits: int,
    scale: Tensor,  # (out, groups)
    zero: Tensor | None,  # (out, groups) int8
    group: Tensor | None,  # (in,)
    symmetric: bool,
    draws: Draws | None = None,
) -> Integers:
    """Codes of each group with its old scale or a new one, whichever is nearer to w; drawn beside the old one, but where a value is
    beyond it and the expected square of the error is smaller with a new one."""
    (out, width), groups = w.shape, scale.shape[1]
    order = (
        torch.arange(width, device=w.device) if group is None else torch.argsort(group, stable=True)
    )
    if group is not None and not torch.equal(
        group[order].long(), torch.arange(width, device=w.device) // (width // groups)
    ):
        return encode_integers(w, bits, scale=scale, zero=zero, group=group, draws=draws)
    made = Integers(
        torch.empty(w.shape, dtype=torch.int8, device=w.device),
        scale.clone(),
        None if zero is None else zero.clone(),
    )
    step = max(1, ROWS // width)
    for first in range(0, out, step):
        rows = slice(first, first + step)
        x = w[rows][:, order] if group is not None else w[rows]
        old = Integers(x, scale[rows], None if zero is None else zero[rows])
        new = encode_integers(
            x, bits, width // groups, symmetric=symmetric, scale_dtype=scale.dtype
        )
        if draws is None:
            old = encode_integers(x, bits, scale=old.scale, zero=old.zero)
            better = _error(x, new) < _error(x, old)
        else:
            lost, beyond = expected_errors(x, bits, old.scale, old.zero)
            better = beyond & (expected_errors(x, bits, new.scale, new.zero)[0] < lost)
        made.scale[rows] = torch.where(better, new.scale, old.scale)
        if made.zero is not None and new.zero is not None and old.zero is not None:
            made.zero[rows] = torch.where(better, new.zero, old.zero)
        if draws is None:
            codes = torch.where(better.repeat_interleave(width // groups, 1), new.codes, old.codes)
        else:
            zeros = None if made.zero is None else made.zero[rows]
            codes = encode_integers(
                x, bits, scale=made.scale[rows], zero=zeros, draws=draws.at(first * width)
            ).codes
        made.codes[rows.start : rows.start + len(x), order] = codes
    return made


def _error(w: Tensor, made: Integers) -> Tensor:  # (out, groups)
    lost = decode_int8(made.codes, made.scale, made.zero).sub_(w).square_()
    return lost.unflatten(1, (made.scale.shape[1], -1)).sum(2)


# the config


def _schemes(found: CheckpointScan) -> Callable[[str], dict[str, Any] | None] | None:
    """Which scheme of the config a module has; None, with errors, where the config is of another kind."""
    said, before = found.settings, len(found.errors)
    status = said.get("quantization_status")
    if status != "compressed":
        found.refuse(
            f"quantization_status {shown(status)}", "compressed", hint="save the model compressed"
        )
    sparsity = said.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        found.refuse(f"sparsity_config of format {shown(sparsity['format'])}", "dense weights")
    if said.get("transform_config"):
        found.refuse("transform_config: weights that are rotated", "weights as the model has them")
    groups = said.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    good = all(
        isinstance(scheme, dict) and isinstance(scheme.get("targets"), list) for scheme in schemes
    )
    if not found.check(
        "quantization_config",
        bool(schemes) and good,
        "config_groups",
        "groups with targets and weights",
    ):
        return None
    schemes = [
        {"format": said.get("format"), **_without_none(scheme)}
        for scheme in schemes
        if isinstance(scheme.get("weights"), dict)
    ]
    for form in dict.fromkeys(shown(scheme["format"]) for scheme in schemes):
        if form not in LAYOUTS:
            found.refuse(f"compressed-tensors' format {form}", ", ".join(LAYOUTS))
    asked: list[tuple[int, Callable[[str], bool], dict]] = []
    for scheme in schemes:
        for target in map(str, scheme["targets"]):
            try:
                asked.append((*_target(target, found.base.name), scheme))
            except AdapterkitError as error:
                found.errors.append(error)
    if len(found.errors) > before:
        return None

    def scheme_of(module: str) -> dict[str, Any] | None:
        if len(schemes) == 1:
            return schemes[0]
        named = lambda name: [(rank, scheme) for rank, matches, scheme in asked if matches(name)]
        hits = named(module) or named(found.model_name(module))
        best = [scheme for rank, scheme in hits if rank == min(rank for rank, _ in hits)]
        same = bool(best) and all(scheme["weights"] == best[0]["weights"] for scheme in best)
        expected = "one that names its module"
        return (
            best[0]
            if found.check(module, same, f"{len(best)} of the config's groups fit", expected)
            else None
        )

    return scheme_of


def _without_none(scheme: dict) -> dict:
    return {key: value for key, value in scheme.items() if value is not None}


def _target(target: str, where: str) -> tuple[int, Callable[[str], bool]]:
    """How specific a target is (a name, a pattern, a class of layers), and which modules it may mean."""
    if target.startswith("re:"):
        return 1, matcher(target[3:], f"{where}/config.json", "^(?:{})")
    if target[:1].isupper() and "." not in target:
        return 2, lambda module: True
    return 0, lambda module: module == target


@dataclass
class _Look:
    """One module's tensors, held against its scheme."""

    found: CheckpointScan
    module: str
    codes: TensorSpec
    scale: TensorSpec
    scheme: dict[str, Any]

    def record(self, cls: type[Compressed]) -> Compressed | None:
        args, kind = self.scheme["weights"], self._kind()
        if kind is None or not self._says(args, kind):
            return None
        shape, shape_part = self._shape(kind, args["num_bits"])
        block = self._block(args, shape, kind) if shape else None
        if shape is None or block is None or not self._scales_fit(kind, shape, block):
            return None
        symmetric = args.get("symmetric", True) is not False
        zero = self._zeros(kind, args["num_bits"], shape, symmetric)
        group = self._groups(shape, block)
        scales = self._scales(kind)
        if zero is None or group is None or scales is None:
            return None
        names = [f"{self.module}.{name}" for name in BESIDE]
        names += [f"{self.module.rpartition('.')[0]}.{name}" for name in CACHE]
        beside = [self.found.tensors[name] for name in names if name in self.found.tensors]
        key, dtype, spec = f"{self.module}.weight", self.found.compute_dtype, self.codes
        parts = (self.codes, self.scale, *scales, *shape_part, *zero, *group[0], *beside)
        about = {
            "kind": kind,
            "bits": args["num_bits"],
            "block": block,
            "symmetric": symmetric,
            "indexed": group[1],
        }
        place = {"file": spec.file, "start": spec.start, "stop": spec.stop, "folder": spec.folder}
        return cls(key=key, dtype=dtype, shape=shape, parts=parts, **about, **place)

    def _check(self, fits: bool, found: str, expected: str) -> bool:
        return self.found.check(self.codes.key, fits, found, expected)

    def _kind(self) -> str | None:
        """What the codes are, by their dtypes; it must be what the config's format says."""
        codes, scale = self.codes.dtype, self.scale.dtype
        powers = scale in ("U8", "F8_E8M0")
        if self.codes.key.endswith("_packed"):
            kind = {"I32": "words", "U8": "mxfp4" if powers else "nvfp4"}.get(codes)
        else:
            kind = {"I8": "int8", "F8_E4M3": "mxfp8" if powers else "fp8"}.get(codes)
        said = self.scheme["format"]
        text = f"{codes} codes with {scale} scales, format {shown(said)}"
        return (
            kind
            if self._check(kind in LAYOUTS[said], text, "what the config's format says")
            else None
        )

    def _says(self, args: dict[str, Any], kind: str) -> bool:
        bits, form = args.get("num_bits"), args.get("type", "int")
        fits = type(bits) is int and form == TYPES[kind] and 1 <= bits <= 8
        fits = fits and bits == {"fp8": 8, "mxfp8": 8, "nvfp4": 4, "mxfp4": 4}.get(kind, bits)
        return self._check(
            fits,
            f"{shown(bits)} bits of type {shown(form)} in {self.codes.dtype}",
            "bits that its codes have",
        )

    def _shape(self, kind: str, bits: int) -> tuple[tuple[int, ...] | None, tuple[TensorSpec, ...]]:
        """The weight's (out, in), and the tensor that says it."""
        stored = self.codes.shape
        if not self._check(len(stored) == 2 and 0 not in stored, f"shape {stored}", "a matrix"):
            return None, ()
        if kind in ("nvfp4", "mxfp4"):
            return (stored[0], 2 * stored[1]), ()
        if kind != "words":
            return stored, ()
        siblings = self.found.siblings(self.module, ".weight_shape")
        if siblings is None:
            return None, ()
        spec = siblings[0]
        said = (
            self.found.read(spec).tolist()
            if spec.dtype in ("I64", "I32") and spec.shape == (2,)
            else []
        )
        words = math.ceil(said[1] * bits / 32) if said else 0
        text = f"weight_shape {said}, {stored[0]} rows of {stored[1]} words of {bits} bits"
        if not self._check(
            bool(said) and said[0] == stored[0] and said[1] > 0 and words == stored[1],
            text,
            "sizes that agree",
        ):
            return None, ()
        each = 32 // bits
        loose = 32 % bits != 0 and said[1] > each and math.ceil(said[1] / each) == words
        if not self._check(
            not loose,
            text,
            "a size that tells whether codes run across words (older versions' do not)",
        ):
            return None, ()
        return (said[0], said[1]), (spec,)

    def _block(
        self, args: dict[str, Any], shape: tuple[int, ...], kind: str
    ) -> tuple[int, int] | None:
        """The part of the weight that has one scale."""
        size = args.get("group_size")
        strategy = args.get("strategy") or (
            "tensor" if size is None else "channel" if size == -1 else "group"
        )
        out, width = shape
        blocks = {"tensor": (out, width), "channel": (1, width)}
        good = size is None or type(size) is int
        if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
            good = width % size == 0
            blocks[strategy] = (1, size)
        said = args.get("block_structure")
        if (
            strategy == "block"
            and isinstance(said, list)
            and len(said) == 2
            and all(type(n) is int and n > 0 for n in said)
        ):
            good = kind == "fp8"
            blocks[strategy] = (said[0], said[1])
        block = blocks.get(strategy)
        good = good and block is not None and (kind not in GROUPS or block == (1, GROUPS[kind]))
        text = f"{shape}, strategy {shown(strategy)}, group_size {shown(size)}, block_structure {shown(said)}"
        return block if self._check(good, text, "groups that divide the weight") else None

    def _scales_fit(self, kind: str, shape: tuple[int, ...], block: tuple[int, int]) -> bool:
        grid = tuple(math.ceil(n / size) for n, size in zip(shape, block, strict=True))
        scale = self.scale
        shapes = [grid, *([(), (1,)] if grid == (1, 1) else [grid[:1]] if grid[1] == 1 else [])]
        known = {"nvfp4": ("F8_E4M3",), "mxfp4": ("U8", "F8_E8M0"), "mxfp8": ("U8", "F8_E8M0")}.get(
            kind, ("BF16", "F16", "F32")
        )
        text = f"{scale.dtype} scales {scale.shape} for a weight {shape} in blocks {block}"
        return self._check(
            scale.shape in shapes and scale.dtype in known, text, f"{' or '.join(known)} {grid}"
        )

    def _scales(self, kind: str) -> list[TensorSpec] | None:
        """Further tensors of scales; all are finite."""
        more: list[TensorSpec] | None = []
        if kind == "nvfp4":
            more = self.found.siblings(self.module, ".weight_global_scale")
            if more is None or not self._check(
                more[0].dtype == "F32" and math.prod(more[0].shape) == 1,
                f"weight_global_scale {more[0].dtype} {more[0].shape}",
                "one F32",
            ):
                return None
        self.found.check_finite(self.scale)
        self.found.check_finite(*more, positive=True)
        return more

    def _zeros(
        self, kind: str, bits: int, shape: tuple[int, ...], symmetric: bool
    ) -> tuple[TensorSpec, ...] | None:
        name = f"{self.module}.weight_zero_point"
        spec = self.found.tensors.get(name)
        if symmetric:
            if spec is None:
                return ()
            unused = spec.dtype in ("I8", "I32", "I64", *dtypes.FLOATS, "F8_E4M3") and not bool(
                self.found.read(spec).float().any()
            )
            return (
                (spec,)
                if self._check(
                    unused, "symmetric, with a weight_zero_point", "zeros, or symmetric: false"
                )
                else None
            )
        if not self._check(
            kind in ("words", "int8"), "not symmetric", "integers where they are not"
        ):
            return None
        if spec is None:
            self.found.siblings(self.module, ".weight_zero_point")
            return None
        single = math.prod(self.scale.shape) == 1
        grid = self.scale.shape if len(self.scale.shape) == 2 else (*self.scale.shape, 1)
        packed = kind == "words" and not (single and spec.dtype == "I8")
        dtype, size = (
            ("I32", (math.ceil(shape[0] * bits / 32), grid[-1]))
            if packed
            else ("I8", self.scale.shape)
        )
        text = f"weight_zero_point {spec.dtype} {spec.shape}"
        return (
            (spec,)
            if self._check(spec.dtype == dtype and spec.shape == size, text, f"{dtype} {size}")
            else None
        )

    def _groups(
        self, shape: tuple[int, ...], block: tuple[int, int]
    ) -> tuple[tuple[TensorSpec, ...], bool] | None:
        """weight_g_idx if it is there, and whether it says anything."""
        spec = self.found.tensors.get(f"{self.module}.weight_g_idx")
        if spec is None:
            return (), False
        text = f"weight_g_idx {spec.dtype} {spec.shape}"
        if not self._check(
            spec.dtype in ("I32", "I64") and spec.shape == shape[1:], text, "I32, one of a column"
        ):
            return None
        index, groups = self.found.read(spec), shape[1] // block[1]
        if bool((index == -1).all()):
            return (spec,), False
        good = bool((index >= 0).all()) and bool((index < groups).all()) and block[0] == 1
        return (
            ((spec,), True)
            if self._check(good, "weight_g_idx out of range", f"0 to {groups - 1}")
            else None
        )
