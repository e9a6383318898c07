"""What adapterkit reads in a source, as run.py asks for it.

python conformance/run.py python conformance/read.py
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.kinds import EXPERTS, FACTORS
from adapterkit.adapters.formats.modules.parts import scaled_role
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents
from adapterkit.adapters.formats.peft.dialects import arranged
from adapterkit.adapters.formats.planning.source import AdapterConversion, read_contents
from adapterkit.core.inputs.sources import open_base, open_unconverted
from adapterkit.core.weights.plan_reader import PlanReader


def contents_of(
    source: Path,
    base: Path | None,
    *,
    stacked: bool | None = None,
    allow_pickle: bool = True,
    **options,
) -> Contents:
    """What a source holds; `stacked`: in the names of the model of the base, experts as stacks, as
    sources in PEFT's layout are by default."""
    folder, peft = open_unconverted(source, allow_pickle), formats()["peft"]
    detection = detect(folder)
    checkpoint = None if base is None else open_base(base)
    conversion = AdapterConversion(
        folder, detection, ConvertOptions(to="peft", **options), checkpoint
    )
    contents = read_contents(conversion)
    stacked = detection.format.layout == "adapter" if stacked is None else stacked
    if conversion.model is None or not stacked:
        return contents
    return arranged(contents, peft, conversion.model, PlanReader(contents.folders))


def tensors_of(contents: Contents) -> dict[str, tuple[Tensor, float]]:
    """Name -> what the adapter holds, and the scale that is in it."""
    reader, found = PlanReader(contents.folders), {}
    for module in contents.modules:
        parts = {role: part.value(reader).double() for role, part in module.parts.items()}
        for role, (value, scale) in _values(module, parts).items():
            name = f"{module.path}#{role}" if role else module.path
            assert name not in found, name
            found[name] = value * scale, scale
    return found


def _values(module: AdapterModule, parts: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Role -> value and scale; "" is what is added to the weight."""
    scale, delta = module.scale, None
    if module.kind == FACTORS:
        a, b = parts.pop("a"), parts.pop("b").flatten(1)
        mid = parts.pop("mid", torch.eye(len(a)).double())
        delta = torch.einsum("om,mn...,n...->o...", b, mid, a) if mid.dim() == 2 else None
        if delta is None:  # a (r, in, 1, 1): the core has the kernel's axes
            delta = torch.einsum("om,mn...,ni->oi...", b, mid, a.flatten(1))
        delta = delta.T if module.embedding else delta
    elif module.kind == EXPERTS:
        delta = parts.pop("b") @ parts.pop("a")
    elif module.kind == "full":
        delta, scale = parts.pop("diff", None), 1.0
    elif module.kind in ("loha", "lokr"):  # its product is left to the reader: (out, in) or a core
        scaled = scaled_role(module)
        return {role: (one, scale if role == scaled else 1.0) for role, one in parts.items()}
    values = {} if delta is None else {"": (delta, scale)}
    return values | {role: (one, scale if role == "bias" else 1.0) for role, one in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--architecture")
    parser.add_argument("--alpha", type=float)
    args = vars(parser.parse_args())
    out, base, source = args.pop("out"), args.pop("base"), args.pop("source")
    given = {name: value for name, value in args.items() if value is not None}
    tensors = tensors_of(contents_of(source, base, **given))
    save_file({name: value.float().contiguous() for name, (value, _) in tensors.items()}, out)


if __name__ == "__main__":
    main()
