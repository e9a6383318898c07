"""Stored layout of compressed-tensors: the config's groups of modules with their schemes and code
formats, and the tensors of a module, checked against its scheme."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError, shown
from adapterkit.core.patterns import matcher
from adapterkit.core.records import ANYTHING, TEXT, Json, also, entries, list_of, table_of
from adapterkit.core.weights.codec import blocks_in, pair_in, shapes_of_scales
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import integers
from adapterkit.kernels.quant.grid import MX_GROUP, NV_GROUP

FORMATS = {  # of the config: kinds of codes
    "pack-quantized": ("words",),
    "int-quantized": ("int8",),
    "float-quantized": ("fp8",),
    "naive-quantized": ("int8", "fp8"),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp8-quantized": ("mxfp8",),
    "mixed-precision": ("words", "int8", "fp8", "nvfp4", "mxfp4", "mxfp8"),
}
TYPES = {  # of the scheme, by the kind of codes
    "words": "int",
    "int8": "int",
    "fp8": "float",
    "nvfp4": "float",
    "mxfp4": "float",
    "mxfp8": "float",
}
CONFIG_GROUPS = also(table_of(TEXT, entries({"targets": list_of(ANYTHING)})), "groups", len)
Scheme = Json  # with the keys `weights` and `format`
SHAPE, ZERO, INDEX = "weight_shape", "weight_zero_point", "weight_g_idx"
BITS = {"fp8": 8, "mxfp8": 8, "nvfp4": 4, "mxfp4": 4}
GROUPS = {"nvfp4": NV_GROUP, "mxfp4": MX_GROUP, "mxfp8": MX_GROUP}
POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of 2
SCALE_DTYPES = {"nvfp4": ("F8_E4M3",), "mxfp4": POWERS, "mxfp8": POWERS}
ACTIVATION_SCALES = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")  # of an attention


def schemes(scan: CheckpointScan) -> Callable[[str], Scheme | None] | None:
    """The scheme of each module; None, with errors, for a config of another kind."""
    settings, errors = scan.settings, len(scan.errors)
    _check_settings(scan)
    groups = settings.get("config_groups") or {}
    expected = "groups with targets and weights"
    if not scan.check("quantization_config", CONFIG_GROUPS.fits(groups), "config_groups", expected):
        return None
    known: list[Scheme] = [
        {"format": settings.get("format")} | {k: v for k, v in entry.items() if v is not None}
        for entry in groups.values()
        if isinstance(entry.get("weights"), dict)
    ]
    for name in dict.fromkeys(shown(scheme["format"]) for scheme in known):
        if name not in FORMATS:
            scan.errors.add(f"compressed-tensors' format {name}", ", ".join(FORMATS), code="AK404")
    targets: list[tuple[int, Callable[[str], bool], Scheme]] = []
    for scheme in known:
        for target in map(str, scheme["targets"]):
            try:
                targets.append((*_target(target, scan.base.name), scheme))
            except AdapterkitError as error:
                scan.errors.append(error)
    if len(scan.errors) > errors:
        return None

    def scheme_of(module: str) -> Scheme | None:
        if len(known) == 1:
            return known[0]
        matching = lambda name: [
            (rank, scheme) for rank, matches, scheme in targets if matches(name)
        ]
        found = matching(module) or matching(scan.model_name(module))
        first = min((rank for rank, _ in found), default=0)
        best = [scheme for rank, scheme in found if rank == first]
        agree = bool(best) and all(scheme["weights"] == best[0]["weights"] for scheme in best)
        problem = f"{len(best)} of the config's groups fit"
        return best[0] if scan.check(module, agree, problem, "one that names its module") else None

    return scheme_of


def _check_settings(scan: CheckpointScan) -> None:
    """Note errors for weights that are not stored compressed, or are also changed in other ways."""
    settings = scan.settings
    status, sparsity = settings.get("quantization_status"), settings.get("sparsity_config")
    if status != "compressed":
        problem = f"quantization_status {shown(status)}"
        scan.errors.add(problem, "compressed", hint="save the model compressed", code="AK404")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        scan.errors.add(
            f"sparsity_config of format {shown(sparsity['format'])}", "dense weights", code="AK404"
        )
    if settings.get("transform_config"):
        scan.errors.add(
            "transform_config: weights that are rotated",
            "weights as the model has them",
            code="AK404",
        )


def _target(target: str, where: str) -> tuple[int, Callable[[str], bool]]:
    """The precedence of a target (name 0, pattern 1, class of layers 2), and modules it may
    match."""
    if target.startswith("re:"):
        return 1, matcher(target[3:], f"{where}/config.json", "^(?:{})")
    if target[:1].isupper() and "." not in target:
        return 2, lambda module: True
    return 0, lambda module: module == target


@dataclass
class StoredModule:
    """One module's tensors and its scheme."""

    scan: CheckpointScan
    module: str
    codes: TensorSpec
    scale: TensorSpec
    scheme: Scheme

    def layout(self) -> Json | None:
        """The tensors, shape and arithmetic of its weight; None, with an error, for another
        scheme."""
        weights, kind = self.scheme["weights"], self._kind()
        if kind is None or not self._bits_fit(weights, kind):
            return None
        bits = weights["num_bits"]
        shape, shape_parts = self._shape(kind, bits)
        block = self._block(weights, shape, kind) if shape else None
        if shape is None or block is None or not self._scales_fit(kind, shape, block):
            return None
        symmetric = weights.get("symmetric", True) is not False
        zeros = self._zeros(kind, bits, shape, symmetric)
        index = self._index(shape, block)
        scales = self._global_scale(kind)
        if zeros is None or index is None or scales is None:
            return None
        index_parts, indexed = index
        names = [f"{self.module}.{name}" for name in ACTIVATION_SCALES]
        names += [f"{self.module.rpartition('.')[0]}.{name}" for name in CACHE_SCALES]
        others = (self.scan.tensors[name] for name in names if name in self.scan.tensors)
        parts = (self.codes, self.scale, *scales, *shape_parts, *zeros, *index_parts, *others)
        return {
            "parts": parts,
            "shape": shape,
            "kind": kind,
            "bits": bits,
            "block": block,
            "symmetric": symmetric,
            "indexed": indexed,
        }

    def _check(self, fits: bool, problem: str, expected: str) -> bool:
        return self.scan.check(self.codes.key, fits, problem, expected)

    def _kind(self) -> str | None:
        """The format of codes from their dtypes, which must be one of the config's."""
        codes, scale = self.codes.dtype, self.scale.dtype
        powers = scale in POWERS
        if self.codes.key.endswith("_packed"):
            kind = {"I32": "words", "U8": "mxfp4" if powers else "nvfp4"}.get(codes)
        else:
            kind = {"I8": "int8", "F8_E4M3": "mxfp8" if powers else "fp8"}.get(codes)
        name = self.scheme["format"]
        problem = f"{codes} codes with {scale} scales, format {shown(name)}"
        known = kind in FORMATS[name]
        return kind if self._check(known, problem, "what the config's format says") else None

    def _bits_fit(self, weights: Scheme, kind: str) -> bool:
        bits, type_ = weights.get("num_bits"), weights.get("type", "int")
        fits = type(bits) is int and type_ == TYPES[kind] and 1 <= bits <= 8
        fits = fits and bits == BITS.get(kind, bits)
        problem = f"{shown(bits)} bits of type {shown(type_)} in {self.codes.dtype}"
        return self._check(fits, problem, "bits that its codes have")

    def _shape(self, kind: str, bits: int) -> tuple[tuple[int, ...] | None, tuple[TensorSpec, ...]]:
        """The weight's (out, in), and the tensor that gives it."""
        stored = self.codes.shape
        if not self._check(len(stored) == 2 and 0 not in stored, f"shape {stored}", "a matrix"):
            return None, ()
        if kind in ("nvfp4", "mxfp4"):
            return (stored[0], 2 * stored[1]), ()
        if kind != "words":
            return stored, ()
        siblings = self.scan.siblings(self.module, f".{SHAPE}")
        if siblings is None:
            return None, ()
        spec = siblings[0]
        readable = spec.dtype in ("I64", "I32") and spec.shape == (2,)
        next_to = (self.codes, self.scale)
        shape = self.scan.read(spec, next_to).tolist() if readable else []
        words = math.ceil(shape[1] * bits / 32) if shape else 0
        problem = f"{SHAPE} {shape}, {stored[0]} rows of {stored[1]} words of {bits} bits"
        fits = bool(shape) and shape[0] == stored[0] and shape[1] > 0 and words == stored[1]
        if not self._check(fits, problem, "sizes that agree"):
            return None, ()
        each = 32 // bits
        ambiguous = 32 % bits != 0 and shape[1] > each and math.ceil(shape[1] / each) == words
        expected = "a size that shows whether codes run across words (older versions' do not)"
        if not self._check(not ambiguous, problem, expected):
            return None, ()
        return (shape[0], shape[1]), (spec,)

    def _block(self, weights: Scheme, shape: tuple[int, ...], kind: str) -> tuple[int, int] | None:
        """The rows and columns of the weight with one scale."""
        size = weights.get("group_size")
        structure = pair_in(weights.get("block_structure"))
        default = "tensor" if size is None else "channel" if size == -1 else "group"
        strategy = weights.get("strategy") or default
        blocks = {"tensor": (shape[0], shape[1]), "channel": (1, shape[1])}
        fits = size is None or type(size) is int
        if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
            fits = shape[1] % size == 0
            blocks[strategy] = (1, size)
        if strategy == "block" and structure is not None:
            fits = kind == "fp8"
            blocks[strategy] = structure
        block = blocks.get(strategy)
        fits = fits and block is not None and (kind not in GROUPS or block == (1, GROUPS[kind]))
        problem = f"{shape}, strategy {shown(strategy)}, group_size {shown(size)}, "
        problem += f"block_structure {shown(weights.get('block_structure'))}"
        return block if self._check(fits, problem, "groups that divide the weight") else None

    def _scales_fit(self, kind: str, shape: tuple[int, ...], block: tuple[int, int]) -> bool:
        grid, scale = blocks_in(shape, block), self.scale
        known = SCALE_DTYPES.get(kind, ("BF16", "F16", "F32"))
        problem = f"{scale.dtype} scales {scale.shape} for a weight {shape} in blocks {block}"
        fits = scale.shape in shapes_of_scales(grid) and scale.dtype in known
        return self._check(fits, problem, f"{' or '.join(known)} {grid}")

    def _global_scale(self, kind: str) -> list[TensorSpec] | None:
        """The scale of NVFP4's scales; the values of all such scales are checked."""
        scales: list[TensorSpec] | None = []
        if kind == "nvfp4":
            scales = self.scan.siblings(self.module, ".weight_global_scale")
            if scales is None:
                return None
            dtype, shape = scales[0].dtype, scales[0].shape
            fits = dtype == "F32" and math.prod(shape) == 1
            if not self._check(fits, f"weight_global_scale {dtype} {shape}", "one F32"):
                return None
        self.scan.check_finite(self.scale)
        self.scan.check_finite(*scales, positive=True)
        return scales

    def _zeros(
        self, kind: str, bits: int, shape: tuple[int, ...], symmetric: bool
    ) -> tuple[TensorSpec, ...] | None:
        """weight_zero_point, if there is one; None, with an error, if it does not fit."""
        spec = self.scan.tensors.get(f"{self.module}.{ZERO}")
        if symmetric:
            if spec is None:
                return ()
            readable = spec.dtype in ("I8", "I32", "I64", *dtypes.FLOATS, "F8_E4M3")
            unused = readable and not (
                self.scan.reads_freely and bool(self.scan.read(spec, ()).any())
            )
            problem = f"symmetric, with a {ZERO}"
            return (spec,) if self._check(unused, problem, "zeros, or symmetric: false") else None
        is_integer = TYPES[kind] == "int"
        if not self._check(is_integer, "not symmetric", "integers where they are not"):
            return None
        if spec is None:
            self.scan.siblings(self.module, f".{ZERO}")
            return None
        one = math.prod(self.scale.shape) == 1
        grid = self.scale.shape if len(self.scale.shape) == 2 else (*self.scale.shape, 1)
        dtype, size = "I8", self.scale.shape
        if kind == "words" and not (one and spec.dtype == "I8"):
            dtype, size = "I32", (math.ceil(shape[0] * bits / 32), grid[-1])
        fits = spec.dtype == dtype and spec.shape == size
        problem = f"{ZERO} {spec.dtype} {spec.shape}"
        return (spec,) if self._check(fits, problem, f"{dtype} {size}") else None

    def _index(
        self, shape: tuple[int, ...], block: tuple[int, int]
    ) -> tuple[tuple[TensorSpec, ...], bool] | None:
        """weight_g_idx if there is one, and whether it assigns columns to groups."""
        spec = self.scan.tensors.get(f"{self.module}.{INDEX}")
        if spec is None:
            return (), False
        fits = spec.dtype in ("I32", "I64") and spec.shape == shape[1:]
        if not self._check(fits, f"{INDEX} {spec.dtype} {spec.shape}", "I32, one of a column"):
            return None
        groups = shape[1] // block[1]
        if not self.scan.reads_freely:
            return (spec,), True
        index = self.scan.read(spec, ())
        if bool((index == -1).all()):
            return (spec,), False
        valid = block[0] == 1 and integers.are_groups(index, groups)
        valid = self._check(valid, f"{INDEX} out of range", f"0 to {groups - 1}")
        return ((spec,), True) if valid else None
