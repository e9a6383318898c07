"""Blocks of ggml's quantized types as bytes: codes, float16 scales, and in super-blocks the
quantized scales of sub-blocks.

A value is (code - zero) · scale - min, or table[code] · scale. In a super-block, scale and min are
a sub-block's integers times a float16.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

SUPER = 256  # values of a super-block
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice OCP's values
TRITS, POWERS = 5, (1, 3, 9, 27, 81)  # base-3 digits in a byte


class Plane(NamedTuple):
    """Bits of codes in a field: a byte has those of codes `run` apart, the first in the lowest."""

    field: str
    bits: int
    run: int


class PartScales(NamedTuple):
    """The layout of a super-block's integers, first those of scales and then those of minima."""

    planes: tuple[Plane, ...]
    ends: tuple[int, int]
    zero: int = 0  # the code of 0


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One of ggml's types."""

    kind: int  # ggml's number of it
    values: int = 32  # of a block
    sub: int = 32  # values that share one scale
    fields: Mapping[str, int]  # bytes of each field, in order
    planes: tuple[Plane, ...]  # of the codes, the lowest bits first; none: digits of base 3
    ends: tuple[int, int]  # of code - zero, as written
    zero: int = 0  # the code of 0, where there is no table
    table: tuple[int, ...] = ()  # the value of each code
    nested: PartScales | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.fields.values())

    @property
    def has_min(self) -> bool:
        return "m" in self.fields

    @property
    def parts(self) -> int:
        return self.values // self.sub


@dataclass(frozen=True)
class BlockScales:
    """The stored scales of n blocks."""

    d: Tensor  # (n, 1) float16; of MXFP4 uint8, exponents
    m: Tensor | None = None  # (n, 1) float16
    scale: Tensor | None = None  # (n, parts) int16
    min: Tensor | None = None  # (n, parts) int16

    def at(self, blocks: Tensor) -> "BlockScales":
        """The scales of some blocks, by number or a mask."""
        return self._each(lambda x: x[blocks])

    def without(self, blocks: Tensor) -> "BlockScales":
        """The scales with 0 for these blocks, by number."""
        return self._each(lambda x: x.index_fill(0, blocks, 0)) if len(blocks) else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> "BlockScales":
        some = lambda x: None if x is None else change(x)
        return BlockScales(change(self.d), some(self.m), some(self.scale), some(self.min))

    def replaced(self, blocks: Tensor, new: "BlockScales") -> "BlockScales":
        """The scales with others for these blocks, by number."""
        if not len(blocks):
            return self
        put = lambda x, y: None if x is None or y is None else x.index_copy(0, blocks, y)
        d = self.d.index_copy(0, blocks, new.d)
        return BlockScales(
            d, put(self.m, new.m), put(self.scale, new.scale), put(self.min, new.min)
        )

    @cached_property
    def effective(self) -> tuple[Tensor, ...]:  # (n, parts) float32
        """The factor of codes, and the value subtracted afterwards, if there is one."""
        if self.d.dtype == torch.uint8:
            return (_half_powers(self.d.device)[self.d.int()],)
        scale = self.d.float()
        if self.scale is None:
            return (scale,) if self.m is None else (scale, -self.m.float())
        scale = scale * self.scale
        if self.m is None or self.min is None:
            return (scale,)
        return scale, self.m.float() * self.min


D, DM = {"d": 2}, {"d": 2, "m": 2}
NIBBLES, WIDE = (Plane("qs", 4, 16),), (Plane("qs", 4, 32),)
FIVE, WIDE_FIVE = (*NIBBLES, Plane("qh", 1, 1)), (*WIDE, Plane("qh", 1, 32))
TWO, EIGHT = (Plane("qs", 2, 32),), (Plane("qs", 8, 32),)
SIX_BITS = PartScales((), (0, 63))

# fmt: off
TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(kind=2, fields={**D, "qs": 16}, planes=NIBBLES, ends=(-8, 7), zero=8),
    "Q4_1": BlockType(kind=3, fields={**DM, "qs": 16}, planes=NIBBLES, ends=(0, 15)),
    "Q5_0": BlockType(
        kind=6, fields={**D, "qh": 4, "qs": 16}, planes=FIVE, ends=(-16, 15), zero=16),
    "Q5_1": BlockType(kind=7, fields={**DM, "qh": 4, "qs": 16}, planes=FIVE, ends=(0, 31)),
    "Q8_0": BlockType(kind=8, fields={**D, "qs": 32}, planes=EIGHT, ends=(-127, 127), zero=128),
    "Q2_K": BlockType(
        kind=10, values=SUPER, sub=16, fields={"scales": 16, "qs": 64, **DM}, planes=TWO,
        ends=(0, 3), nested=PartScales((Plane("scales", 4, 16),), (0, 15))),
    "Q3_K": BlockType(
        kind=11, values=SUPER, sub=16, fields={"qh": 32, "qs": 64, "low": 8, "high": 4, **D},
        planes=(*TWO, Plane("qh", 1, 32)), ends=(-4, 3), zero=4,
        nested=PartScales((Plane("low", 4, 8), Plane("high", 2, 4)), (-32, 31), 32)),
    "Q4_K": BlockType(
        kind=12, values=SUPER, fields={**DM, "scales": 12, "qs": 128}, planes=WIDE, ends=(0, 15),
        nested=SIX_BITS),
    "Q5_K": BlockType(
        kind=13, values=SUPER, fields={**DM, "scales": 12, "qh": 32, "qs": 128}, planes=WIDE_FIVE,
        ends=(0, 31), nested=SIX_BITS),
    "Q6_K": BlockType(
        kind=14, values=SUPER, sub=16, fields={"qs": 128, "qh": 64, "scales": 16, **D},
        planes=(Plane("qs", 4, 64), Plane("qh", 2, 32)), ends=(-32, 31), zero=32,
        nested=PartScales((Plane("scales", 8, 16),), (-128, 127), 128)),
    "IQ4_NL": BlockType(kind=20, fields={**D, "qs": 16}, planes=NIBBLES, ends=(0, 15), table=IQ4),
    "IQ4_XS": BlockType(
        kind=23, values=SUPER, fields={**D, "high": 2, "low": 4, "qs": 128}, planes=NIBBLES,
        ends=(0, 15), table=IQ4,
        nested=PartScales((Plane("low", 4, 1), Plane("high", 2, 1)), (-32, 31), 32)),
    "TQ1_0": BlockType(
        kind=34, values=SUPER, sub=SUPER, fields={"qs": 52, **D}, planes=(), ends=(-1, 1), zero=1),
    "TQ2_0": BlockType(
        kind=35, values=SUPER, sub=SUPER, fields={"qs": 64, **D}, planes=TWO, ends=(-1, 1), zero=1),
    "MXFP4": BlockType(
        kind=39, fields={"e": 1, "qs": 16}, planes=NIBBLES, ends=(0, 15), table=E2M1),
}
# fmt: on


def unpack_scales(kind: BlockType, blocks: Tensor) -> BlockScales:  # (n, nbytes) uint8
    fields = _fields(kind, blocks)
    if "e" in fields:
        return BlockScales(fields["e"])
    d = fields["d"].clone().view(torch.float16)
    m = fields["m"].clone().view(torch.float16) if kind.has_min else None
    if kind.nested is None:
        return BlockScales(d, m)
    planes, _, zero = kind.nested
    codes = _unpack(planes, fields) if planes else _six_bits(fields["scales"])
    integers = _unsigned(codes, zero).to(torch.int16).sub_(zero)
    parts = kind.parts
    return BlockScales(d, m, integers[:, :parts], integers[:, parts:] if kind.has_min else None)


def unpack_codes(kind: BlockType, blocks: Tensor) -> Tensor:  # (n, values) uint8
    fields = _fields(kind, blocks)
    if not kind.planes:
        return _unpack_trits(fields["qs"])
    return _unsigned(_unpack(kind.planes, fields), kind.zero)


def pack(
    kind: BlockType,
    scales: BlockScales,
    codes: Tensor,  # (n, values) uint8
) -> Tensor:  # (n, nbytes) uint8
    blocks = torch.empty(len(codes), kind.nbytes, dtype=torch.uint8, device=codes.device)
    fields = _fields(kind, blocks)
    fields["e" if "e" in fields else "d"].copy_(scales.d.view(torch.uint8))
    if scales.m is not None:
        fields["m"].copy_(scales.m.view(torch.uint8))
    if kind.nested is not None and scales.scale is not None:
        planes, _, zero = kind.nested
        parts = scales.scale if scales.min is None else torch.cat([scales.scale, scales.min], 1)
        integers = _unsigned((parts + zero).to(torch.uint8), zero)
        if planes:
            _pack(planes, fields, integers)
        else:
            fields["scales"].copy_(_pack_six_bits(integers))
    if kind.planes:
        _pack(kind.planes, fields, _unsigned(codes, kind.zero))
    else:
        fields["qs"].copy_(_pack_trits(codes))
    return blocks


def _fields(kind: BlockType, blocks: Tensor) -> dict[str, Tensor]:
    """Views of the bytes of each field."""
    parts = blocks.split(list(kind.fields.values()), 1)
    return dict(zip(kind.fields, parts, strict=True))


def _unsigned(codes: Tensor, zero: int) -> Tensor:
    """Codes with 0 stored as 128, from two's complement or back."""
    return codes ^ 128 if zero == 128 else codes


def _unpack(planes: tuple[Plane, ...], fields: Mapping[str, Tensor]) -> Tensor:
    codes, low = None, 0
    for field, bits, run in planes:
        words = _words(fields[field], run)
        each, mask = 8 // bits, _repeated((1 << bits) - 1, words.dtype)
        words = words.view(len(words), -1, run // words.element_size())
        part = words.new_empty(len(words), words.shape[1], each, words.shape[2])
        for i in range(each):
            torch.bitwise_right_shift(words, i * bits, out=part[:, :, i])
        if bits < 8:
            part.bitwise_and_(mask)
        part = part.view(len(words), -1).view(torch.uint8)
        codes = part if codes is None else codes.bitwise_or_(part << low)
        low += bits
    assert codes is not None
    return codes


def _pack(planes: tuple[Plane, ...], fields: Mapping[str, Tensor], codes: Tensor) -> None:
    low = 0
    for field, bits, run in planes:
        part = codes >> low if low else codes
        part = part & (1 << bits) - 1 if bits < 8 else part
        words = _words(part, run)
        words = words.view(len(codes), -1, 8 // bits, run // words.element_size())
        packed = words[:, :, 0]
        for i in range(1, 8 // bits):
            packed = packed | words[:, :, i] << i * bits
        fields[field].copy_(packed.reshape(len(codes), -1).view(torch.uint8))
        low += bits


def _words(x: Tensor, run: int) -> Tensor:
    """Bytes as the largest integers that divide their run."""
    dtype = next(t for t in (torch.int64, torch.int32, torch.uint8) if run % t.itemsize == 0)
    return x.clone(memory_format=torch.contiguous_format).view(dtype)  # aligned


def _repeated(byte: int, dtype: torch.dtype) -> int:
    return int.from_bytes(bytes([byte]) * dtype.itemsize, "little")


SIX, FOUR, HIGH = (_repeated(byte, torch.int32) for byte in (63, 15, 3 << 4))


def _six_bits(packed: Tensor) -> Tensor:  # (n, 12) -> (n, 16): 8 scales, 8 mins
    """Unpack six-bit integers, four bytes at a time; the high bits of the last four are in the high
    bits of the first four."""
    first, second, low = packed.clone().view(torch.int32).unbind(1)
    scale, last_scale = first & SIX, first >> 2 & HIGH | low & FOUR
    minimum, last_minimum = second & SIX, second >> 2 & HIGH | low >> 4 & FOUR
    four = torch.stack([scale, last_scale, minimum, last_minimum], 1)
    return four.view(torch.uint8)


def _pack_six_bits(codes: Tensor) -> Tensor:  # (n, 16) -> (n, 12)
    scale, last_scale, low, last_low = codes.split(4, 1)
    first, second = scale | last_scale >> 4 << 6, low | last_low >> 4 << 6
    return torch.cat([first, second, last_scale & 15 | last_low << 4], 1)


# Five base-3 digits in a byte, as a fraction of 256: the highest is floor(3 · byte / 256).
TRIT_RUNS = ((32, 5), (16, 5), (4, 4))  # bytes side by side, and digits of each


def _unpack_trits(packed: Tensor) -> Tensor:  # (n, 52) -> (n, 256)
    parts = []
    for bytes_, (_, digits) in zip(packed.split([32, 16, 4], 1), TRIT_RUNS, strict=True):
        powers = _powers(digits, packed.device)
        rest = (bytes_[:, None] * powers).to(torch.int16)  # modulo 256
        parts.append((rest * 3 >> 8).to(torch.uint8).flatten(1))
    return torch.cat(parts, 1)


def _pack_trits(codes: Tensor) -> Tensor:  # (n, 256) -> (n, 52)
    parts, counts = [], [run * digits for run, digits in TRIT_RUNS]
    for part, (run, digits) in zip(codes.split(counts, 1), TRIT_RUNS, strict=True):
        number = codes.new_zeros(len(codes), run)
        for digit in part.view(len(codes), digits, run).unbind(1):
            number.mul_(3).add_(digit)
        parts.append(number.mul_(3 ** (TRITS - digits)))
    numbers = torch.cat(parts, 1)
    return _fractions(codes.device)[numbers.int()]


@functools.cache
def _fractions(device: torch.device) -> Tensor:  # (243,) uint8
    count = 3**TRITS
    return ((torch.arange(count) * 256 + count - 1) // count).to(torch.uint8).to(device)


@functools.cache
def _powers(digits: int, device: torch.device) -> Tensor:  # (digits, 1) uint8
    return torch.tensor(POWERS[:digits], dtype=torch.uint8)[:, None].to(device)


@functools.cache
def table_values(table: tuple[int, ...], device: torch.device) -> Tensor:  # float32
    return torch.tensor(table, dtype=torch.float32).to(device)


@functools.cache
def _half_powers(device: torch.device) -> Tensor:  # (256,) float32
    """2^(e - 128), including the subnormals."""
    return (
        torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128)
        .float()
        .to(device)
    )
