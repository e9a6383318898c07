"""Checks a program that reads adapters against this folder; needs Python's standard library alone.

    python conformance/run.py [--only FORMAT] COMMAND ...

For every case of index.json COMMAND runs with `SOURCE OUT` behind it, and, where the file does not
tell, `--base DIR`, `--architecture NAME` or `--alpha NUMBER`. It writes the safetensors file OUT in
F32 or F64: under MODULE what the adapter adds to that module's weight, under MODULE#ROLE what it
holds besides (see docs/conformance.md). Exits with 1 where a case differs.
"""

import argparse
import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

HERE = Path(__file__).parent
NEAR = 1e-3  # how far from a whole number a value may be, divided by the scale


def read(path: Path) -> dict[str, tuple[list[int], array]]:
    """The tensors of a safetensors file: shape and values, row by row."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        first, stop = entry["data_offsets"]
        values = array(
            {"F32": "f", "F64": "d"}[entry["dtype"]], data[8 + size + first : 8 + size + stop]
        )
        if sys.byteorder == "big":
            values.byteswap()
        tensors[name] = entry["shape"], values
    return tensors


def digest(values: array, scale: float) -> str:
    """sha256 of values / scale as little-endian 32-bit integers; "" where they are no integers."""
    quotients = [value / scale for value in values]
    whole = array("i", map(round, quotients)) if all(map(math.isfinite, quotients)) else array("i")
    if len(whole) != len(values) or any(
        abs(q - w) > NEAR for q, w in zip(quotients, whole, strict=True)
    ):
        return ""
    if sys.byteorder == "big":
        whole.byteswap()
    return hashlib.sha256(whole.tobytes()).hexdigest()


def differences(expected: dict[str, dict], found: dict[str, tuple[list[int], array]]) -> list[str]:
    """What a program's tensors do not have in common with those of a case."""
    texts = [f"{name}: not expected" for name in found.keys() - expected.keys()]
    for name, one in expected.items():
        if name not in found:
            texts.append(f"{name}: missing")
        elif found[name][0] != one["shape"]:
            texts.append(f"{name}: shape {found[name][0]}, expected {one['shape']}")
        elif digest(found[name][1], one["scale"]) != one["sha256"]:
            texts.append(f"{name}: other values")
    return sorted(texts)


def options(case: dict) -> list[str]:
    """What a program has to be told of a case besides its file."""
    given = {"--base": case.get("base") and str(HERE / case["base"])}
    given |= {f"--{name}": case.get(name) for name in ("architecture", "alpha")}
    return [word for name, value in given.items() if value for word in (name, str(value))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="FORMAT", help="cases of one format, or one case")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    cases = json.loads((HERE / "index.json").read_text("utf-8"))["cases"]
    cases = {name: one for name, one in cases.items() if args.only in (None, name, one["format"])}
    failed = 0
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.safetensors"
            words = [*args.command, str(HERE / case["source"]), str(out), *options(case)]
            done = subprocess.run(words, capture_output=True, text=True)
            texts = differences(case["tensors"], read(out)) if out.exists() else []
            if done.returncode or not out.exists():
                texts = [f"status {done.returncode}: {done.stderr.strip()[-500:]}"]
        failed += bool(texts)
        print(f"{'differs' if texts else 'ok'}  {name}", *texts, sep="\n    ")
    print(f"{len(cases) - failed} of {len(cases)} cases as expected")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
