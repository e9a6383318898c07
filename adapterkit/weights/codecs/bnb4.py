"""bnb4: bitsandbytes' 4-bit weights (nf4, fp4), as transformers stores them; their scales plain, or quantized once more."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.errors import Refused, Unrecoverable, shown
from adapterkit.kernels import blockwise
from adapterkit.kernels.stochastic import Draws
from adapterkit.weights.codec import CheckpointScan, PlainWeight, QuantizedModules, QuantizedWeight

STATE = ".quant_state.bitsandbytes__"
OFFSET = 0.012345678901234567  # as long as most


@dataclass(frozen=True, kw_only=True)
class Bnb4(QuantizedWeight):
    """W = map[code] * absmax, `block` values with one absmax; `double`: absmax = map8[code] * nested_absmax + offset.

    The state's JSON text is as long as its offset has digits, so its size is a guess until it is written.
    """

    name = "bnb4"
    methods = ("bitsandbytes",)
    targets = ("nf4", "fp4")

    kind: Literal["nf4", "fp4"]
    block: int
    double: bool
    transposed_scales: bool = False  # the scales are stored as a transposed bf16 matrix: exact where the weight was bf16, else refused
    transposed: bool = False  # the model keeps it (in, out), as GPT-2 does
    offset: float = 0.0
    nested_block: int = blockwise.NESTED
    nested_dtype: str = "float32"

    @classmethod
    def for_encoding(
        cls, target: str, weight: PlainWeight, options: dict[str, Any]
    ) -> "Bnb4 | None":
        block = options.get("block_size") or 64
        if block not in blockwise.BLOCKS:
            found, expected = f"--block-size {block}", " ".join(map(str, blockwise.BLOCKS))
            raise Refused(found, expected=expected, where="options", hint="give one of these")
        double, kind = bool(options.get("double_quant")), "nf4" if target == "nf4" else "fp4"
        count = math.prod(weight.shape)
        blocks = math.ceil(count / block)
        parts = [weight.part("", "U8", ((count + 1) // 2, 1))]
        parts += [
            weight.part(".absmax", "U8" if double else "F32", (blocks,)),
            weight.part(".quant_map", "F32", (16,)),
        ]
        if double:
            nested = math.ceil(blocks / blockwise.NESTED)
            parts += [
                weight.part(".nested_absmax", "F32", (nested,)),
                weight.part(".nested_quant_map", "F32", (256,)),
            ]
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        made = cls(
            key=weight.key, dtype="F32" if weight.wide else weight.dtype, shape=shape, file="", start=0, stop=parts[0].nbytes,
            parts=tuple(parts),
            kind=kind, block=block, double=double, transposed=weight.transposed,
        )  # fmt: skip
        text = made._text(OFFSET if double else None)
        return replace(made, parts=(*parts, weight.part(STATE + kind, "U8", (len(text),))))

    @classmethod
    def config(cls, choice: QuantizedModules) -> dict[str, Any]:
        one: Any = next(iter(choice.packed.values()))
        said = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": one.kind,
            "bnb_4bit_use_double_quant": one.double,
        }
        common = Counter(packed.dtype for packed in choice.packed.values()).most_common(1)[0][0]
        return config(said | {"bnb_4bit_compute_dtype": dtypes.CONFIG_NAME[common]}, choice.skipped)

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        found.fetch(
            spec
            for key, spec in found.tensors.items()
            if STATE in key or key.endswith(".quant_map")
        )
        for key, state in list(found.tensors.items()):
            weight, mark, kind = key.rpartition(STATE)
            if mark and kind in ("nf4", "fp4"):
                one = cls._found(found, weight, state, kind)
                if one is not None:
                    yield one
            elif mark:
                found.check(key, False, f"a state of kind {kind!r}", "nf4 or fp4")

    @classmethod
    def _found(
        cls, found: CheckpointScan, key: str, state: TensorSpec, kind: Literal["nf4", "fp4"]
    ) -> "Bnb4 | None":
        said = found.read_json(state)
        if not said:
            return None
        double = "nested_offset" in said
        endings = [
            "",
            ".absmax",
            ".quant_map",
            *((".nested_absmax", ".nested_quant_map") if double else ()),
        ]
        parts = found.siblings(key, *endings)
        if parts is None:
            return None
        words = {word: name for name, word in dtypes.CONFIG_NAME.items()}
        shape, block, dtype = (
            said.get("shape"),
            said.get("blocksize"),
            words.get(str(said.get("dtype")).removeprefix("torch.")),
        )
        fits = (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(n) is int and n > 0 for n in shape)
        )
        fits = fits and said.get("quant_type") == kind and dtype in dtypes.FLOATS
        fits = fits and type(block) is int and block in blockwise.BLOCKS
        if double:
            offset, nested_block = said.get("nested_offset"), said.get("nested_blocksize")
            fits = (
                fits
                and isinstance(offset, float)
                and math.isfinite(offset)
                and nested_block == blockwise.NESTED
            )
            fits = fits and said.get("nested_dtype") in dtypes.CONFIG_NAME.values()
        if not found.check(
            state.key, fits, f"the state {said}"[:300], "a state that bitsandbytes writes"
        ):
            return None
        assert isinstance(shape, list) and isinstance(block, int) and dtype is not None
        count = math.prod(shape)
        blocks = math.ceil(count / block)
        codes, absmax, table, *nested = parts
        text = ", ".join(
            f"{part.key.removeprefix(key) or 'codes'} {part.dtype} {part.shape}" for part in parts
        )
        fits = codes.nbytes == (count + 1) // 2 and codes.dtype in (
            "U8",
            "BF16",
            "F16",
            "F32",
            "I8",
        )
        spoiled = False
        fits &= table.dtype == "F32" and table.shape == (16,)
        if double:
            fits &= (
                absmax.dtype == "U8"
                and absmax.shape == (blocks,)
                and all(part.dtype == "F32" for part in nested)
            )
            fits &= nested[0].shape == (math.ceil(blocks / blockwise.NESTED),) and nested[
                1
            ].shape == (256,)
        else:
            spoiled = (
                absmax.dtype == "BF16"
                and absmax.shape[::-1] == (shape[0], shape[1] // block)
                and shape[1] % block == 0
            )
            exact = not spoiled or dtype == "BF16"
            expected = "F32 scales: bitsandbytes 0.50 saves rounded ones after a forward pass on this kind of CPU"
            if not found.check(
                absmax.key, exact, f"{absmax.dtype} {absmax.shape} of a {dtype} model", expected
            ):
                return None
            fits &= spoiled or (absmax.dtype == "F32" and absmax.shape == (blocks,))
        if not found.check(
            key, fits, text, f"4-bit codes and scales for {tuple(shape)} in blocks of {block}"
        ):
            return None
        found.check_finite(*(nested[:2] if double else [absmax]))
        ours = blockwise.quant_map(kind)
        if not found.check(
            table.key,
            bool((found.read(table) == ours).all()),
            "another table of values",
            f"that of {kind}",
        ):
            return None
        codes = replace(
            codes, dtype="U8", shape=(codes.nbytes, 1)
        )  # in other dtypes the same bytes, that are no numbers
        parts[0] = codes
        turned = found.transposed(key.removesuffix(".weight"))
        more: dict[str, Any] = {"transposed_scales": spoiled}
        more |= (
            {"offset": float(said["nested_offset"]), "nested_dtype": said["nested_dtype"]}
            if double
            else {}
        )
        return cls(
            key=key, dtype=dtype, shape=tuple(shape[::-1] if turned else shape), file=codes.file, start=codes.start,
            stop=codes.stop, folder=codes.folder, parts=(*parts, state), kind=kind, block=block, double=double,
            transposed=turned, **more,
        )  # fmt: skip

    @property
    def read_only(self) -> str | None:
        return (
            "bitsandbytes saved its scales wrongly, after a forward pass"
            if self.transposed_scales
            else None
        )

    @property
    def variable_size(self) -> tuple[str, ...]:
        return (self.parts[-1].key,) if self.double else ()

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        count = math.prod(self.shape)
        stored = {part.key: Stored(part.key, part.dtype, part.shape) for part in self.parts}
        stored[self.key] = Stored(self.key, "U8", ((count + 1) // 2, 1))
        return tuple(stored.values())

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        codes, absmax = stored[self.key], self._scales(stored)
        flat = blockwise.decode_4bit(codes, absmax, self.kind, self.block, math.prod(self.shape))
        return (
            flat.view(self.shape[::-1]).T.contiguous() if self.transposed else flat.view(self.shape)
        )

    def _scales(self, stored: dict[str, Tensor]) -> Tensor:  # (blocks,) float32
        """Of the blocks; they are codes too if they are quantized."""
        absmax = stored[self.parts[1].key]
        if self.transposed_scales:
            return absmax.T.reshape(-1).float()
        if not self.double:
            return absmax
        nested, values, state = (stored[part.key] for part in self.parts[3:])
        dtype = getattr(torch, self.nested_dtype)
        return blockwise.decode_absmax(
            absmax, nested, values, self.offset_of(state), self.nested_block, dtype
        )

    def offset_of(self, state: Tensor) -> float:
        """The offset that a state's text says."""
        return float(json.loads(state.cpu().numpy().tobytes())["nested_offset"])

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.T if self.transposed else weight
        with named(self.key):
            packed, absmax = blockwise.quantize_4bit(weight.contiguous(), self.kind, self.block)
        return self.join_nested({self.parts[0].key: packed, self.parts[1].key: absmax})

    @property
    def rows_per_block(self) -> int | None:
        if self.transposed or self.transposed_scales:
            return None
        each = self.block * (self.nested_block if self.double else 1)
        return each // math.gcd(each, self.shape[1])

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        sizes = [2, self.block]  # elements that share a byte, or a scale
        specs = list(self.parts[:2])
        if self.double:
            sizes, specs = [*sizes, self.block * self.nested_block], [*specs, self.parts[3]]
        ends = (first * self.shape[1], last * self.shape[1])
        return {
            spec.key: stored[spec.key][ends[0] // size : math.ceil(ends[1] / size)]
            for spec, size in zip(specs, sizes, strict=True)
        }

    def split_nested(self, stored: dict[str, Tensor]) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        if not self.double:
            return self, stored
        codes, absmax, table, *_, state = self.parts
        parts = (codes, replace(absmax, dtype="F32"), table, state)
        return replace(self, double=False, parts=parts), {
            part.key: stored[part.key] for part in parts
        } | {absmax.key: self._scales(stored)}

    def join_nested(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parts, of the codes and their scales in float32."""
        keys = [part.key for part in self.parts]
        packed, absmax = stored[keys[0]], stored[keys[1]]
        made = {keys[0]: packed, keys[2]: blockwise.quant_map(self.kind).to(packed.device)}
        if not self.double:
            return made | {keys[1]: absmax, keys[-1]: _bytes(self._text())}
        values = blockwise.dynamic_map().to(packed.device)
        nested = blockwise.quantize_absmax(absmax)
        made |= {keys[1]: nested.codes, keys[3]: nested.absmax, keys[4]: values}
        return made | {keys[-1]: _bytes(self._text(float(nested.offset)))}

    def encode_drawn(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        weight = (weight.T if self.transposed else weight).contiguous()
        scales = self._renewed_scales(stored, weight)
        with named(self.key):
            return scales | {
                self.key: blockwise.encode_4bit(
                    weight, self._scales(stored | scales), self.kind, self.block, draws
                )
            }

    def _renewed_scales(self, stored: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Those of blocks with a value beyond their largest code, where that makes the expected squared error smaller; of quantized
        ones the code, or where their group cannot hold that either, the whole group's."""
        key, absmax = self.parts[1].key, self._scales(stored)
        largest, beyond = blockwise.amax_and_overflow(weight, absmax, self.block)
        if not bool(beyond.any()):
            return {}
        errors = lambda scales: blockwise.expected_errors(
            weight, self._scales(stored | scales), self.kind, self.block
        )
        wanted = torch.where(beyond, largest, absmax)
        if not self.double:
            return {key: torch.where(beyond & (errors({key: wanted}) < errors({})), wanted, absmax)}
        nested, values, state = (stored[part.key] for part in self.parts[3:])
        fresh = blockwise.quantize_absmax(wanted, self.offset_of(state), nested, values).codes
        found = {key: torch.where(beyond & (errors({key: fresh}) < errors({})), fresh, stored[key])}
        whole = blockwise.quantize_absmax(wanted, self.offset_of(state), values=values)
        widened = {key: whole.codes, self.parts[3].key: whole.absmax}
        grouped = lambda each: (
            pad(each, (0, -len(each) % self.nested_block)).view(-1, self.nested_block).sum(1)
        )
        better = (whole.absmax > nested) & (grouped(errors(widened)) < grouped(errors(found)))
        if bool(better.any()):
            blocks = better.repeat_interleave(self.nested_block)[: len(absmax)]
            found = {
                key: torch.where(blocks, whole.codes, found[key]),
                self.parts[3].key: torch.where(better, whole.absmax, nested),
            }
        return found

    def _text(self, offset: float | None = None) -> bytes:
        shape = self.shape[::-1] if self.transposed else self.shape
        said: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": dtypes.CONFIG_NAME[self.dtype],
        }
        said["shape"] = list(shape)
        if offset is not None:
            said |= {
                "nested_blocksize": blockwise.NESTED,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        return json.dumps(said).encode()


def config(said: dict[str, Any], skipped: list[str] | None) -> dict[str, Any]:
    """The quantization_config of bitsandbytes, as transformers writes it."""
    return {
        "_load_in_4bit": bool(said.get("load_in_4bit")),
        "_load_in_8bit": bool(said.get("load_in_8bit")),
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
    } | said


@contextmanager
def named(key: str) -> Iterator[None]:
    """A kernel's complaint of values, as `Unrecoverable` that says whose they are."""
    try:
        yield
    except ValueError as error:
        found = f"{shown(key)}: {error}"
        raise Unrecoverable(
            found,
            expected="values that the format can hold",
            hint="leave it out, or use another format",
        ) from error


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
