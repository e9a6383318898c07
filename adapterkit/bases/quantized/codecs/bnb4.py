"""bnb4: bitsandbytes' 4-bit weights, as transformers stores them."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import shown, unrecoverable
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import (
    Parts,
    PlainWeight,
    QuantizedModules,
    QuantizedWeight,
    check_block_size,
    pair_in,
)
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.block_sizes import padded
from adapterkit.kernels.quant import blockwise
from adapterkit.kernels.quant.grid import NESTED, Grid
from adapterkit.kernels.quant.stochastic import Draws

STATE = ".quant_state.bitsandbytes__"
OFFSET = 0.012345678901234567  # as many digits as most offsets have
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
OTHER_MAP = "another table of values"
CODE_DTYPES = ("U8", "BF16", "F16", "F32", "I8")  # bnb_4bit_quant_storage


@dataclass(frozen=True, kw_only=True)
class Bnb4(QuantizedWeight):
    """W = map[code] * absmax, `block` values with one absmax; `double`:
    absmax = map8[code] * nested_absmax + offset.

    Its tensors: codes, absmax, map, with `double` nested_absmax and map8, and the state, a JSON
    text. Its length depends on the digits of its offset, so its size is estimated until it is
    written.
    """

    name = "bnb4"
    tier = "core"
    methods = ("bitsandbytes",)
    targets = ("nf4", "fp4")

    kind: Literal["nf4", "fp4"]
    block: int
    double: bool
    # bitsandbytes 0.50 saves the scales as a transposed bf16 matrix after a forward pass on some
    # CPUs: exact if the weight was bf16
    transposed_scales: bool = False
    nested_block: int = NESTED
    nested_dtype: str = "float32"

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> "Bnb4 | None":
        block = options.get("block_size") or 64
        check_block_size(block, blockwise.BLOCKS)
        double, kind = bool(options.get("double_quant")), "nf4" if target == "nf4" else "fp4"
        count = math.prod(weight.shape)
        blocks = math.ceil(count / block)
        parts = [
            weight.part("", "U8", ((count + 1) // 2, 1)),
            weight.part(".absmax", "U8" if double else "F32", (blocks,)),
            weight.part(".quant_map", "F32", (16,)),
        ]
        if double:
            nested = math.ceil(blocks / NESTED)
            parts.append(weight.part(".nested_absmax", "F32", (nested,)))
            parts.append(weight.part(".nested_quant_map", "F32", (256,)))
        record = cls.encoding(
            weight,
            parts,
            dtype="F32" if weight.upcast else weight.dtype,
            shape=weight.model_shape,
            kind=kind,
            block=block,
            double=double,
            transposed=weight.transposed,
        )
        size = len(record._state(OFFSET if double else None))
        return replace(record, parts=(*parts, weight.part(STATE + kind, "U8", (size,))))

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        weights = list(modules.packed.values())
        first = weights[0]
        assert isinstance(first, Bnb4)
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": first.kind,
            "bnb_4bit_use_double_quant": first.double,
        }
        dtype = Counter(weight.dtype for weight in weights).most_common(1)[0][0]
        settings["bnb_4bit_compute_dtype"] = dtypes.CONFIG_NAME[dtype]
        return bitsandbytes_config(settings, modules.skipped)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        tables = (".quant_map",) if scan.reads_freely else ()
        scan.fetch(
            spec for key, spec in scan.tensors.items() if STATE in key or key.endswith(tables)
        )
        for key, state in list(scan.tensors.items()):
            weight, mark, kind = key.rpartition(STATE)
            if mark and kind in ("nf4", "fp4"):
                record = cls._record(scan, weight, state, kind)
                if record is not None:
                    yield record
            elif mark:
                scan.check(key, False, f"a state of kind {kind!r}", "nf4 or fp4")

    @classmethod
    def _record(
        cls, scan: CheckpointScan, key: str, spec: TensorSpec, kind: Literal["nf4", "fp4"]
    ) -> "Bnb4 | None":
        there = scan.present(key, PARTS)
        # the length of the others' text depends on a number
        state = scan.read_json(spec, there if len(there) == len(PARTS) else [*there, spec])
        if not state:
            return None
        parts = scan.siblings(key, *PARTS[: 5 if "nested_offset" in state else 3])
        if parts is None:
            return None
        problem, known = f"the state {state}"[:300], _State.of(state, kind)
        scan.check(spec.key, known is not None, problem, "a state that bitsandbytes writes")
        if known is None:
            return None
        shape, dtype, block, double, nested_dtype = known
        absmax = parts[1]
        transposed_scales = (
            not double
            and absmax.dtype == "BF16"
            and absmax.shape[::-1] == (shape[0], shape[1] // block)
            and shape[1] % block == 0
        )
        problem = f"{absmax.dtype} {absmax.shape} of a {dtype} model"
        expected = (
            "F32 scales: bitsandbytes 0.50 saves rounded ones after a forward pass on this kind "
            "of CPU"
        )
        exact = not transposed_scales or dtype == "BF16"
        if not scan.check(absmax.key, exact, problem, expected):
            return None
        names = [part.key.removeprefix(key) or "codes" for part in parts]
        described = (
            f"{name} {part.dtype} {part.shape}" for name, part in zip(names, parts, strict=True)
        )
        expected = f"4-bit codes and scales for {shape} in blocks of {block}"
        fits = _parts_fit(parts, math.prod(shape), block, transposed_scales)
        if not scan.check(key, fits, ", ".join(described), expected):
            return None
        codes, absmax, table, *nested = parts
        scan.check_finite(*(nested[:2] if double else [absmax]))
        same = not scan.reads_freely or _is_map(scan.read(table, ()), kind)
        if not scan.check(table.key, same, OTHER_MAP, f"that of {kind}"):
            return None
        # in other dtypes the same bytes, that are no numbers
        codes = replace(codes, dtype="U8", shape=(codes.nbytes, 1))
        transposed = scan.names.transposed(key.removesuffix(".weight"))
        return cls.of(
            (codes, absmax, table, *nested, spec),
            key=key,
            dtype=dtype,
            shape=shape[::-1] if transposed else shape,
            kind=kind,
            block=block,
            double=double,
            transposed_scales=transposed_scales,
            transposed=transposed,
            nested_dtype=nested_dtype,
        )

    @property
    def read_only(self) -> str | None:
        if self.transposed_scales:
            return "bitsandbytes saved its scales wrongly, after a forward pass"
        return None

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        *outputs, state = super().max_outputs
        return (*outputs, replace(state, varies=self.double))

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        table, spec = self.parts[2], self.parts[-1]
        if not _is_map(stored[table.key].cpu().numpy(), self.kind):
            return f"{shown(table.key)}: {OTHER_MAP}", f"that of {self.kind}"
        try:
            state = nested_json(stored[spec.key].cpu().numpy().tobytes())
        except ValueError:
            state = {}
        own = (self._stored_shape, self.dtype, self.block, self.double, self.nested_dtype)
        found = _State.of(state, self.kind) if isinstance(state, dict) else None
        if found is not None and self.dtype == "F32":
            # comparisons take every weight for the float32 that it decodes to
            found = found._replace(dtype=self.dtype)
        if found == own:
            return None
        problem = f"{shown(spec.key)}: the state {shown(state)}"[:300]
        return problem, f"the state for the tensor's dtype and shape: {own}"

    def decode(self, stored: Parts) -> Tensor:
        codes, absmax, count = stored[self.key], self._scales(stored), math.prod(self.shape)
        flat = blockwise.decode_4bit(codes, absmax, self.kind, self.block, count)
        return self.out_in(flat.view(self._stored_shape))

    @property
    def _stored_shape(self) -> tuple[int, ...]:  # (out, in)
        return self.shape[::-1] if self.transposed else self.shape

    def _scales(self, stored: Parts) -> Tensor:  # (blocks,) float32
        """The scales of the blocks, decoded if they are quantized."""
        absmax = stored[self.parts[1].key]
        if self.transposed_scales:
            return absmax.T.reshape(-1).float()
        if not self.double:
            return absmax
        nested, values, state = self.values(stored)[3:]
        dtype, offset = getattr(torch, self.nested_dtype), self.stored_offset(state)
        return blockwise.decode_absmax(absmax, nested, values, offset, self.nested_block, dtype)

    def stored_offset(self, state: Tensor) -> float:
        """The offset in the text of a state."""
        return float(json.loads(state.cpu().numpy().tobytes())["nested_offset"])

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        weight = self.out_in(weight)
        with naming(self.key):
            if stored is not None and draws is not None:
                scales = self._widened_scales(stored, weight)
                absmax = self._scales(stored | scales)
                codes = blockwise.encode_4bit(weight, absmax, self.kind, self.block, draws)
                return scales | {self.key: codes}
            codes, absmax = blockwise.quantize_4bit(weight, self.kind, self.block)
        return self.join_nested({self.parts[0].key: codes, self.parts[1].key: absmax})

    @property
    def rows_per_block(self) -> int | None:
        if self.transposed or self.transposed_scales:
            return None
        each = self.block * (self.nested_block if self.double else 1)
        return each // math.gcd(each, self.shape[1])

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        sizes = {0: 2, 1: self.block}  # elements that share a byte, or a scale
        sizes |= {3: self.block * self.nested_block} if self.double else {}
        return {part: (0, self.shape[1], size) for part, size in sizes.items()}

    def split_nested(self, stored: Parts) -> tuple[QuantizedWeight, Parts]:
        if not self.double:
            return self, stored
        codes, absmax, table, *_, state = self.parts
        parts = (codes, replace(absmax, dtype="F32"), table, state)
        tensors = {part.key: stored[part.key] for part in parts}
        tensors[absmax.key] = self._scales(stored)
        return replace(self, double=False, parts=parts), tensors

    def join_nested(self, stored: Parts) -> Parts:
        """All tensors, from the codes and their scales in float32."""
        keys = [part.key for part in self.parts]
        codes, absmax = stored[keys[0]], stored[keys[1]]
        tensors = {keys[0]: codes, keys[2]: blockwise.quant_map(self.kind, codes.device)}
        if not self.double:
            return tensors | {keys[1]: absmax, keys[-1]: _as_tensor(self._state())}
        values = blockwise.dynamic_map(codes.device)
        nested = blockwise.quantize_absmax(absmax)
        tensors |= {keys[1]: nested.codes, keys[3]: nested.absmax, keys[4]: values}
        return tensors | {keys[-1]: _as_tensor(self._state(float(nested.offset)))}

    def grid(self, stored: Parts) -> Grid:
        scales, width = self._scales(stored), self._stored_shape[1]
        return blockwise.grid_of(scales, self.kind, self.block, width=width)

    def _widened_scales(self, stored: Parts, weight: Tensor) -> Parts:
        """New scales for blocks with a value beyond their largest code, if that makes the expected
        squared error smaller.

        Quantized scales get a new code, or a new group if theirs cannot represent the scale.
        """
        key, absmax = self.parts[1].key, self._scales(stored)
        w = blockwise.in_blocks(weight, self.block)
        decoded = lambda scales: self._scales(stored | scales)
        grid = lambda scales: blockwise.grid_of(decoded(scales), self.kind, self.block)
        errors = lambda scales: grid(scales).errors(w)[:, 0]
        overflows = grid({}).overflows(w)[:, 0]
        if not bool(overflows.any()):
            return {}
        largest = w.abs().amax(1)
        target = torch.where(overflows, largest, absmax)
        if not self.double:
            better = overflows & (errors({key: target}) < errors({}))
            return {key: torch.where(better, target, absmax)}
        nested, values, state = self.values(stored)[3:]
        nested_key, offset = self.parts[3].key, self.stored_offset(state)
        codes = blockwise.quantize_absmax(target, offset, nested, values).codes
        better = overflows & (errors({key: codes}) < errors({}))
        scales = {key: torch.where(better, codes, stored[key])}
        groups = blockwise.quantize_absmax(target, offset, values=values)
        widened = {key: groups.codes, nested_key: groups.absmax}
        rest = -len(absmax) % self.nested_block
        by_group = lambda each: padded(each, (0, rest)).view(-1, self.nested_block).sum(1)
        better = (groups.absmax > nested) & (by_group(errors(widened)) < by_group(errors(scales)))
        if not bool(better.any()):
            return scales
        blocks = better.repeat_interleave(self.nested_block)[: len(absmax)]
        return {
            key: torch.where(blocks, groups.codes, scales[key]),
            nested_key: torch.where(better, groups.absmax, nested),
        }

    def _state(self, offset: float | None = None) -> bytes:
        state: Json = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": dtypes.CONFIG_NAME[self.dtype],
            "shape": list(self._stored_shape),
        }
        if offset is not None:
            state["nested_blocksize"] = NESTED
            state["nested_dtype"] = "float32"
            state["nested_offset"] = offset
        return json.dumps(state).encode()


class _State(NamedTuple):
    """The fields of a state's text."""

    shape: tuple[int, ...]  # as stored
    dtype: str
    block: int  # values with one scale
    double: bool  # whether scales are quantized
    nested_dtype: str  # of scales of scales

    @classmethod
    def of(cls, state: Json, kind: str) -> "_State | None":
        """Parse a state; None if bitsandbytes writes no such state."""
        shape = pair_in(state.get("shape"))
        dtype = dtypes.HEADER_NAME.get(str(state.get("dtype")).removeprefix("torch."))
        block, double = state.get("blocksize"), "nested_offset" in state
        valid = state.get("quant_type") == kind and dtype in dtypes.FLOATS
        valid = valid and type(block) is int and block in blockwise.BLOCKS
        if double:
            offset = state["nested_offset"]
            valid = valid and isinstance(offset, float) and math.isfinite(offset)
            valid = valid and state.get("nested_blocksize") == NESTED
            valid = valid and state.get("nested_dtype") in dtypes.CONFIG_NAME.values()
        if not valid or shape is None or dtype is None or block is None:
            return None
        return cls(shape, dtype, block, double, state["nested_dtype"] if double else "float32")


def _is_map(table: np.ndarray, kind: Literal["nf4", "fp4"]) -> bool:
    return np.array_equal(table, np.array(blockwise.TABLES[kind], np.float32))


def _parts_fit(parts: list[TensorSpec], count: int, block: int, transposed_scales: bool) -> bool:
    """Return whether tensors have the dtypes and shapes of a weight with `count` elements."""
    codes, absmax, table, *nested = parts
    blocks = math.ceil(count / block)
    fits = codes.nbytes == (count + 1) // 2 and codes.dtype in CODE_DTYPES
    fits = fits and table.dtype == "F32" and table.shape == (16,)
    if not nested:
        plain = absmax.dtype == "F32" and absmax.shape == (blocks,)
        return fits and (transposed_scales or plain)
    groups = math.ceil(blocks / NESTED)
    fits = fits and absmax.dtype == "U8" and absmax.shape == (blocks,)
    fits = fits and all(part.dtype == "F32" for part in nested)
    return fits and nested[0].shape == (groups,) and nested[1].shape == (256,)


def bitsandbytes_config(settings: Json, skipped: list[str] | None) -> Json:
    """The quantization_config of bitsandbytes, as transformers writes it."""
    return {
        "_load_in_4bit": bool(settings.get("load_in_4bit")),
        "_load_in_8bit": bool(settings.get("load_in_8bit")),
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": False,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    } | settings


def naming(key: str) -> AbstractContextManager[None]:
    """A kernel's error about values names the weight."""
    hint = "keep it as floats with --skip, or choose another format"
    return unrecoverable(key, expected="values that the format can hold", hint=hint, code="AK404")


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
