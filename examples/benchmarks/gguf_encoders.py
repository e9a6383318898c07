"""Compare encoders of llama.cpp's block types with libggml's: errors on real weights, and speed.

    python examples/benchmarks/gguf_encoders.py                      all types
    python examples/benchmarks/gguf_encoders.py --types Q4_K,Q6_K --repeat 1
    python examples/benchmarks/gguf_encoders.py --json gguf-encoders.json

libggml's `ggml_quantize_chunk` is that of the wheel xllamacpp. Each row is a type; its errors are
ours over libggml's, Σ weight · (w - value)², below 1 where ours is less. Without an importance
matrix the weights are 1, and those that libggml itself gives large values for this type; with one,
drawn lognormal with σ = 1, they are the importances, and these times what libggml multiplies them
with. `decoded` is the error on weights that were blocks of Q4_1 before.

The weights are MiniLM's feed-forward outputs (float32), and SmolLM2's, decoded from Q4_1, for
`decoded`. MB/s are of float32 input in one thread's own time, the best of all rounds, both sides in
turn.
"""

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable

import common
import torch
from safetensors import safe_open
from torch import Tensor

from adapterkit.kernels.quant.ggml import TYPES, decode, encode

SIGMA = 1.0  # of the logarithms of importances
LAYERS = 4
COLUMNS = ("plain", "own", "weighted", "own", "decoded")


# --- libggml --------------------------------------------------------------------------------------


def libggml() -> Callable[[str, Tensor, Tensor | None], Tensor]:
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("xllamacpp is not installed: python -m pip install --no-deps xllamacpp")
    chunk = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    pointers, sizes = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
    chunk.argtypes, chunk.restype = (
        [ctypes.c_int, *pointers, *sizes, ctypes.c_void_p],
        ctypes.c_size_t,
    )

    def quantize(name: str, w: Tensor, importance: Tensor | None) -> Tensor:
        kind = TYPES[name]
        out = torch.empty(len(w), w.shape[1] // kind.values * kind.nbytes, dtype=torch.uint8)
        weights = None if importance is None else importance.data_ptr()
        chunk(kind.kind, w.data_ptr(), out.data_ptr(), 0, *w.shape, weights)
        return out

    return quantize


def own_weight(name: str, w: Tensor, importance: Tensor | None) -> Tensor:
    """libggml's own weights of squared errors."""
    square = w.square()
    mean = square.view(len(w), -1, 256).mean(2).repeat_interleave(256, 1)
    if importance is not None:
        return importance * (2 * mean + square).sqrt()
    if name in ("Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"):
        return square
    if name in ("Q4_K", "Q5_K"):
        return mean.sqrt() + w.abs()
    return w.abs() if name == "Q2_K" else torch.ones_like(w)


# --- one type -------------------------------------------------------------------------------------


def weights() -> tuple[Tensor, Tensor]:
    """(rows, 1536) of MiniLM, and of SmolLM2."""
    sys.path.append(str(common.REPOSITORY / "examples"))
    import realmodel

    with safe_open(realmodel.minilm() / "model.safetensors", "pt") as file:
        names = [f"encoder.layer.{i}.output.dense.weight" for i in range(LAYERS)]
        ours = torch.cat([file.get_tensor(name) for name in names])
    with safe_open(realmodel.smollm2() / "model.safetensors", "pt") as file:
        decoded = file.get_tensor("model.layers.14.mlp.down_proj.weight").float()
    return ours.contiguous(), decoded.contiguous()


def best_seconds(repeat: int, *sides: Callable[[], Tensor]) -> list[tuple[float, Tensor]]:
    """The least time of this thread for each side, and its result."""
    best = [float("inf")] * len(sides)
    results = [side() for side in sides]
    for _ in range(repeat):
        for i, side in enumerate(sides):
            start = time.thread_time()
            side()
            best[i] = min(best[i], time.thread_time() - start)
    return list(zip(best, results, strict=True))


def measure(name: str, quantize: Callable, w: Tensor, decoded: Tensor, repeat: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    importance = (SIGMA * torch.randn(w.shape[1], generator=generator)).exp()
    row: dict = {"errors": [], "mb_per_second": [], "libggml_mb_per_second": []}
    error = lambda blocks, w, weight: float(
        ((decode(name, blocks) - w).double().square() * weight).sum()
    )
    for weight in (None, importance):
        (ours, blocks), (theirs, reference) = best_seconds(
            repeat,
            lambda weight=weight: encode(name, w, weight),
            lambda weight=weight: quantize(name, w, weight),
        )
        row["mb_per_second"].append(w.nbytes / ours / 1e6)
        row["libggml_mb_per_second"].append(w.nbytes / theirs / 1e6)
        plain = torch.ones(()) if weight is None else weight
        for each in (plain, own_weight(name, w, weight)):
            row["errors"].append(error(blocks, w, each) / error(reference, w, each))
    one = torch.ones(())
    other = error(encode(name, decoded), decoded, one)
    row["errors"].append(other / error(quantize(name, decoded, None), decoded, one))
    return row


# --- the report -----------------------------------------------------------------------------------


def print_row(name: str, row: dict) -> None:
    speeds = zip(row["mb_per_second"], row["libggml_mb_per_second"], strict=True)
    cells = [f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.2f}" for ours, theirs in speeds]
    print(f"{name:8}", *(f"{error:9.3f}" for error in row["errors"]), *(f"{c:>22}" for c in cells))


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--types", default=",".join(TYPES), help="separated by commas (all)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report = common.environment("adapterkit", "torch", "xllamacpp")
    report |= {"repeat": args.repeat, "columns": COLUMNS, "encoders": {}}
    with common.alone(args.work):
        quantize, (w, decoded) = libggml(), weights()
        heads = [f"{head:>9}" for head in COLUMNS]
        print(f"{'error':8}", *heads, f"{'MB/s':>22}", f"{'MB/s, weighted':>22}")
        for name in args.types.split(","):
            row = measure(name, quantize, w, decoded, args.repeat)
            report["encoders"][name] = row
            print_row(name, row)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
