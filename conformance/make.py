"""Makes the cases and index.json from the files that the formats' own tools wrote for the tests.

python conformance/make.py

Each file keeps its keys, shapes, dtypes, order, metadata and settings; its values become small
integers (equal tensors stay equal, zeros stay zeros), so that sums of products are exact in any
order and every reader gets the same bytes. Nothing of any published model is in them.
"""

import hashlib
import json
import re
import shutil
import struct
import sys
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # run as a script, it finds what follows there alone

from conformance.read import contents_of, tensors_of  # noqa: E402
from conformance.run import digest  # noqa: E402
from tests.support.adapter_samples import GOLDEN, Sample, all_samples  # noqa: E402

# beside the samples: what their tools computed or read, which the tests compare with
ANSWERS = ("logits.safetensors", "truth.safetensors", "vllm.safetensors", "sglang.safetensors")
LARGEST = 3  # of the values


def whole(value: Tensor) -> Tensor:
    """A tensor's values as integers that depend on its values alone; numbers stay as they are."""
    if value.numel() == 1 or not value.is_floating_point():
        return value
    data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    drawn = torch.randint(
        1, 2 * LARGEST + 1, value.shape, generator=torch.Generator().manual_seed(seed)
    )
    drawn = torch.where(drawn > LARGEST, LARGEST - drawn, drawn)
    return torch.where(value == 0, 0, drawn).to(value.dtype)


def safetensors(data: bytes) -> bytes:
    """A file with the same header, and integers."""
    (size,) = struct.unpack("<Q", data[:8])
    header, tensors, out = json.loads(data[8 : 8 + size]), load(data), bytearray(data)
    for name, tensor in tensors.items():
        first, stop = (8 + size + at for at in header[name]["data_offsets"])
        out[first:stop] = whole(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return bytes(out)


def gguf(data: bytes, path: Path) -> bytes:
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFReader

    floats = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    out = bytearray(data)
    for tensor in GGUFReader(path).tensors:
        first, stop = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
        raw = torch.frombuffer(bytearray(data[first:stop]), dtype=torch.uint8)
        if tensor.tensor_type == Type.Q8_0:  # blocks of a half and 32 bytes: the half is 1
            blocks = raw.view(-1, 34).clone()
            codes = whole(blocks[:, 2:].contiguous().view(torch.int8).float()).to(torch.int8)
            blocks[:, :2] = torch.tensor([1.0]).half().view(torch.uint8)
            blocks[:, 2:] = codes.view(torch.uint8)
            out[first:stop] = blocks.numpy().tobytes()
        else:
            values = whole(raw.view(floats[tensor.tensor_type]))
            out[first:stop] = values.view(torch.uint8).numpy().tobytes()
    return bytes(out)


def pickle(source: Path, target: Path) -> None:
    def integers(value):
        if isinstance(value, dict):
            return type(value)((key, integers(one)) for key, one in value.items())
        return whole(value) if isinstance(value, Tensor) else value

    torch.save(integers(torch.load(source, weights_only=True)), target)


def copy(source: Path, target: Path) -> None:
    """A file of a sample with integers; settings as they are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        target.write_bytes(safetensors(source.read_bytes()))
    elif source.suffix == ".gguf":
        target.write_bytes(gguf(source.read_bytes(), source))
    elif source.suffix in (".json", ".yaml"):
        shutil.copyfile(source, target)
    else:
        pickle(source, target)


def base_of(folder: Path) -> str:
    """A copy of a base, one for those that are the same."""
    files = sorted(p for p in folder.iterdir() if p.name in ("config.json", "model.safetensors"))
    digests = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = f"bases/{kind}-{digests[:6]}"
    if not (HERE / name).exists():
        for path in files:
            copy(path, HERE / name / path.name)
    return name


def case_of(sample: Sample) -> dict:
    name = sample.path.relative_to(GOLDEN)
    files = [sample.path] if sample.path.is_file() else sorted(sample.path.iterdir())
    for path in files:
        if path.is_file() and path.name not in ANSWERS:
            copy(path, HERE / "cases" / path.relative_to(GOLDEN))
    case = {"format": sample.form, "source": f"cases/{name.as_posix()}"}
    if base := sample.options.get("base"):
        case["base"] = base_of(base)
    case |= {n: sample.options[n] for n in ("architecture", "alpha") if n in sample.options}
    return case | {"tensors": expected(case)}


def expected(case: dict) -> dict[str, dict]:
    """What the tensors of a case are, by their names."""
    base = HERE / case["base"] if "base" in case else None
    options = {n: case[n] for n in ("architecture", "alpha") if n in case}
    found = tensors_of(contents_of(HERE / case["source"], base, **options))
    return {
        name: {
            "shape": list(value.shape),
            "scale": scale,
            "sha256": digest(value.flatten().tolist(), scale),
        }
        for name, (value, scale) in found.items()
    }


def text_of(index: dict) -> str:
    """The index as text, a tensor on each line."""
    text = json.dumps(index, indent=1)
    return re.sub(
        r'\{\s*"shape": \[([^\]]*)\],\s*"scale": (\S+),\s*"sha256": (\S+)\s*\}', _line, text
    )


def _line(found: re.Match[str]) -> str:
    shape = " ".join(found[1].split())
    return f'{{"shape": [{shape}], "scale": {found[2]}, "sha256": {found[3]}}}'


def main() -> None:
    for folder in ("cases", "bases"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    cases = {
        sample.path.relative_to(GOLDEN).with_suffix("").as_posix(): sample
        for sample in all_samples()
    }
    index = {"conformance": 1, "cases": {name: case_of(one) for name, one in cases.items()}}
    (HERE / "index.json").write_text(text_of(index), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
