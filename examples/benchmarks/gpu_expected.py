"""Expected figures of gpu.py on an H100 with 16 cores and 128 GB, and hints for other results.

The figures of copies and rates are typical of the bus, memory and sha256 of such machines; those of
jobs are computed from these. A consumer GPU (PCIe Gen4 x16, or x8) has half of the copies, or a
quarter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

SOCKET = "half of it: the process runs on the other socket (numactl)"
SUMS = "sums in another order differ in the last place only: look at the job before any timing"
PRODUCTS = "a product was not in float32: look at the settings that `facts` names"
SMALL = "small linear algebra or waits: profile one"


@dataclass(frozen=True)
class Range:
    """The range [low, high] of figures whose path in a step matches the pattern."""

    pattern: str
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    otherwise: str = ""


@dataclass(frozen=True)
class Verdict:
    """A figure with its expected range."""

    place: str
    value: float
    range: Range

    @property
    def is_inside(self) -> bool:
        return self.range.low <= self.value <= self.range.high

    def __str__(self) -> str:
        low, high, unit = self.range.low, self.range.high, self.range.unit
        if math.isinf(low):
            wanted = f"at most {high:g}"
        else:
            wanted = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        text = f"{self.place}: {self.value:g}{unit}, expected {wanted}{unit}"
        return text if self.is_inside else f"! {text}; {self.range.otherwise}"


def true(pattern: str, otherwise: str) -> Range:
    return Range(pattern, 1, 1, "", otherwise)


def rate(pattern: str, low: float, high: float, otherwise: str) -> Range:
    return Range(pattern, low, high, " GB/s", otherwise)


def times(pattern: str, low: float, otherwise: str = SMALL) -> Range:
    return Range(pattern, low, unit=" times the CPU", otherwise=otherwise)


EXPECTED: dict[str, tuple[Range, ...]] = {
    "facts": (
        rate("pinned/to_*", 45, 60, SOCKET),
        rate("pinned/both", 80, 110, SOCKET),
        rate("pageable/to_*", 4, 16, SOCKET),
        rate("sha256_a_core", 1.5, 3, "a processor without SHA instructions: hashing decides"),
        rate("disk/1/written", 2, 4, "--work is no memory file system"),
        rate("disk/1/read", 6, 14, "--work is no memory file system"),
        rate("disk/16/*", 15, 80, "--work is no memory file system, or the other socket"),
    ),
    "right": (
        Range("misrounded_share/*", high=1e-4, otherwise=SUMS),
        *(Range(f"jobs/{verb}-*/share", high=1e-4, otherwise=SUMS)
          for verb in ("merge", "quantize", "dequantize", "convert")),
        Range("jobs/*/largest", high=1e-3, otherwise="signs of factors may differ: " + SUMS),
    ),
    "races": (
        Range("repeats/hashes", 1, 1, otherwise="an access that no event orders"),
        true("*/late_streams", "an access that no event orders"),
        true("tf32_outside", PRODUCTS),
        true("killed_and_resumed", "the journal names something that is not on the disk"),
    ),
    "stats": (
        Range("covariance/plain", high=1e-5, otherwise=PRODUCTS),
        Range("covariance/tf32_outside", high=1e-5, otherwise=PRODUCTS),
    ),
    "speed": (
        rate("merges/16 shards, none/gb_per_second", 12, 26, "py-spy dump: pwrite, clear_page"),
        rate("merges/16 shards, sha256/gb_per_second", 9, 18, "the hash: 2 GB/s a file"),
        rate("merges/4 shards, none/gb_per_second", 8, 14, "one writer a file"),
        rate("merges/4 shards, sha256/gb_per_second", 5, 8, "the hash: 2 GB/s a file"),
        Range("merges/*/reserved_of_planned", high=1.3, otherwise="pools of streams that go"),
        Range("overlap/busy", 0.3, 1, otherwise="waits: nsys profile -t cuda,osrt"),
    ),
    "decompositions": (
        times("svd r=64 8192x8192/times", 4),
        times("svd r=64 16384x53248/times", 10),
        times("qr 8192x8192/times", 3),
        times("init pissa/times", 3),
        times("extract/times", 3),
        times("loftq/times", 4),
        times("combine ties/times", 3),
        times("combine dare_ties/times", 3),
        times("quantize */times", 1.5, "reading decides: else launches, see the budgets"),
        times("dequantize nf4/times", 1),
        Range("*/apart", high=1e-3, otherwise=SUMS),
    ),
    "runtime": (
        Range("LoRA/seconds_of_peft", high=1.05, otherwise="launches: count them"),
        Range("DoRA/seconds_of_peft", high=0.9, otherwise="the norm's own kernel"),
        Range("DoRA/peak_of_peft", high=1, otherwise="a dense weight is kept"),
        Range("rows of 64 adapters/times_without", high=3, otherwise="factors are stacked anew"),
    ),
    "limits": (true("clean", "an error text that is not known as out of memory"),
               true("interrupted_and_resumed", "the journal")),
    "peers": (
        rate("safetensors", 2, 8, SOCKET),
        rate("fastsafetensors", 12, 40, SOCKET),
        rate("adapterkit", 8, 40, "pinned rooms, threads"),
    ),
}  # fmt: skip


def verdicts(step: str, figures: Mapping[str, object]) -> list[Verdict]:
    """The verdicts on a step's figures that have a range; the first matching range counts."""
    found = []
    for place, value in figures.items():
        if not isinstance(value, (int, float)):
            continue
        ranges = (one for one in EXPECTED[step] if fnmatchcase(place, one.pattern))
        if (one := next(ranges, None)) is not None:
            found.append(Verdict(place, float(value), one))
    return found
