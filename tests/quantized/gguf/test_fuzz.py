"""Random models in GGUF with random adapters, and files that are damaged at random."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adapterkit
from adapterkit.bases.gguf.header import TYPES
from adapterkit.core.errors import AdapterkitError
from adapterkit.kernels.quant import ggml
from tests.quantized.gguf import test_families as families
from tests.quantized.gguf.test_merges import header, stored, train
from tests.quantized.gguf.test_refusals import ATTACKS
from tests.support import oracle
from tests.support.gguf_files import gguf, llama, split, write

SEEDS = int(os.environ.get("GGUF_SEEDS", "4"))
ARCHITECTURES = (
    *("llama", "llama", "cohere2", "granite", "mistral3", "olmoe", "glm4moe", "deepseek2"),
    *("qwen3next", "gemma3n", "phi2"),
)
KINDS = ("F32", "F16", "BF16", *ggml.TYPES)
FREE = {
    "/custom.text": "a text",
    "/custom.numbers": [1, 2, 3],
    "/custom.flag": True,
    "/custom.real": 0.5,
    "/custom.words": ["a", "bc"],
}


def as_type(kind: str, values: np.ndarray) -> Any:
    """A tensor for the writer."""
    number = gguf.GGMLQuantizationType[kind]
    if kind == "BF16":
        return number, gguf.quantize(values.astype(np.float32), number)
    if kind in ("F32", "F16"):
        return values.astype(np.float32 if kind == "F32" else np.float16)
    rows = torch.from_numpy(values.reshape(-1, values.shape[-1])).float()
    return number, ggml.encode(kind, rows).numpy().reshape(*values.shape[:-1], -1)


def decoded(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in tensors}


def random_file(random_: random.Random, folder: Path) -> tuple[str, Any, Path, dict[str, Any]]:
    """An architecture, its model, its file in random types, and the model's own tensors."""
    arch = random_.choice(ARCHITECTURES)
    if arch == "llama":
        wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        model, message, tensors = llama(
            num_hidden_layers=1, **(wide if random_.random() < 0.7 else {})
        )
    else:
        model = families.model_of(arch)
        message, tensors = families.metadata_of(model), families.tensors_of(arch, model)
    tensors = {name: value.copy() for name, value in tensors.items()}  # the model's own memory
    names = [*tensors]
    random_.shuffle(names)
    file = {}
    for name in names:
        value = tensors[name]
        fits = [
            kind
            for kind in KINDS
            if value.ndim > 1 and value.shape[-1] % TYPES[kind][1] == 0 and "norm" not in name
        ]
        file[name] = as_type(random_.choice(fits or ["F32"]), np.ascontiguousarray(value))
    free = random_.sample(sorted(FREE), random_.randrange(len(FREE)))
    more: dict[str, Any] = {"/general.alignment": random_.choice([8, 32, 64, 4096])}
    more |= {key: FREE[key] for key in free}
    tokens = None if arch != "llama" else [f"t{i}" for i in range(96)]
    path = write(folder / "m.gguf", arch, message | more, file, tokens=tokens)
    return arch, model, path, tensors


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_models_with_random_adapters(seed: int, tmp_path: Path):
    random_ = random.Random(seed)
    arch, model, path, before = random_file(random_, tmp_path)
    if arch == "llama":
        modules, stacks = [*families.ATTENTION, *families.MLP], []
    else:
        *_, modules, stacks = families.FAMILIES[arch]
    some = random_.sample(modules, random_.randint(1, len(modules)))
    mlp = [name for name in modules if name.endswith((*families.MLP,))]
    if {*some} & {*mlp}:  # PEFT takes no gate without its up
        some += [name for name in mlp if name not in some]
    stacks = [] if random_.random() < 0.5 else stacks
    wrapped = families.train(model, tmp_path / "a", some, stacks)
    with oracle.quiet():
        after = families.tensors_of(arch, wrapped.merge_and_unload())
    weight = random_.choice([1.0, -0.5])
    rounding = random_.choice(["nearest", "nearest", "stochastic"])
    options: dict[str, Any] = {"rounding": rounding, "verify": random_.random() < 0.3}
    if rounding == "nearest" and random_.random() < 0.3:
        options["gguf_scales"] = "keep"
    changed_type = random_.choice([None, None, None, "q8_0", "f16"])
    out = tmp_path / "out.gguf"
    adapterkit.merge(path, {tmp_path / "a": weight}, out=out, changed_type=changed_type, **options)
    old, new, was, now = decoded(path), decoded(out), stored(path), stored(out)
    kinds = {entry.name: entry.type for entry in header(out).tensors}
    if changed_type is None:
        assert header(out).raw == header(path).raw and out.stat().st_size == path.stat().st_size
    assert header(out).metadata == header(path).metadata
    assert [e.name for e in header(out).tensors] == [e.name for e in header(path).tensors]
    touched = 0
    for name, value in before.items():
        delta = weight * (after[name].astype(np.float64) - value)
        if not delta.any():
            assert was[name] == now[name], name
            continue
        touched += 1
        wanted = old[name].reshape(value.shape) + delta
        error = np.linalg.norm(new[name].reshape(value.shape) - wanted)
        if kinds[name] in ("F32", "F16", "BF16"):
            room = {"F32": 1e-6, "F16": 6e-4, "BF16": 5e-3}[kinds[name]] * np.linalg.norm(wanted)
        else:
            rows = torch.from_numpy(wanted.reshape(-1, wanted.shape[-1])).float()
            again = ggml.decode(kinds[name], ggml.encode(kinds[name], rows)).numpy()
            room = np.linalg.norm(again.reshape(wanted.shape) - wanted)
        # draws double the error, kept scales are those of other values
        assert error <= (1.01 if options == {"rounding": "nearest"} else 4) * room + 1e-7, name
    assert touched


def outcome(path: Path, adapter: Path, out: Path) -> str:
    """What becomes of a file: merged, or refused with nothing written."""
    there = sorted(out.parent.iterdir())
    try:
        adapterkit.merge(path, adapter, out=out, overwrite=True)
    except AdapterkitError:
        assert sorted(out.parent.iterdir()) == there
        return "refused"
    return "merged"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "a"
    train(llama()[0], out, target_modules=["q_proj"])
    return out


def test_hostile_files_are_no_bases(tiny: Path, adapter: Path, tmp_path: Path):
    for name, (attack, text) in ATTACKS.items():
        path = tmp_path / "bad.gguf"
        path.write_bytes(attack(tiny.read_bytes()))
        with pytest.raises(AdapterkitError, match=text):
            adapterkit.merge(path, adapter, out=tmp_path / "out.gguf")
        assert [one.name for one in tmp_path.iterdir()] == ["bad.gguf"], name


@pytest.mark.parametrize("seed", range(SEEDS))
def test_headers_with_random_damage(seed: int, tiny: Path, adapter: Path, tmp_path: Path):
    random_, data = random.Random(seed), tiny.read_bytes()
    end = min(entry.start for entry in header(tiny).tensors)
    found = set()
    for _ in range(10):
        damaged = bytearray(data)
        for _ in range(random_.choice([1, 1, 2, 8])):
            damaged[random_.randrange(end)] = random_.randrange(256)
        if random_.random() < 0.2:
            del damaged[random_.randrange(len(damaged)) :]
        path = tmp_path / "bad.gguf"
        path.write_bytes(damaged)
        out = tmp_path / "out.gguf"
        found.add(outcome(path, adapter, out))
        if out.exists():  # a text, a number that nothing reads
            assert out.read_bytes()[:end] == damaged[:end]
            out.unlink()
            (tmp_path / "out.gguf.adapterkit.json").unlink()
    assert found


def test_parts_that_contradict_each_other(tiny: Path, adapter: Path, tmp_path: Path):
    count = len(header(tiny).tensors)
    first, second = split(tiny, tmp_path / "parts", [count - 4, 4])
    other = split(tiny, tmp_path / "other", [count - 5, 5])
    again = first.read_bytes(), second.read_bytes()
    number = lambda data, key: data.index(key) + len(key) + 4
    count_at = number(again[0], b"split.tensors.count")
    for data, text in (
        ((again[1], again[0]), "file 1 of 2"),
        ((again[0], other[1].read_bytes()), "tensors in all files|in two files"),
        ((again[0][:count_at] + b"\7\0\0\0" + again[0][count_at + 4 :], again[1]), "in all files"),
        ((again[0], again[1][: len(again[1]) // 2]), "in a file of"),
        ((again[0], b""), "begins with"),
    ):
        first.write_bytes(data[0])
        second.write_bytes(data[1])
        with pytest.raises(AdapterkitError, match=text):
            adapterkit.merge(first, adapter, out=tmp_path / "out")
        assert sorted(one.name for one in tmp_path.iterdir()) == ["other", "parts"]
