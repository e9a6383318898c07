"""Random jobs on image and video models: a drawn family as one file, in GGUF or as a pipeline,
adapters whose layers are of drawn kinds, and the sums in float64."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.errors import AdapterkitError
from tests.support.gguf_files import read_images, write_images
from tests.support.one_file import (
    DENOISER,
    FAMILIES,
    in_the_file,
    models_of,
    state_of,
    write_family,
    write_pipeline,
)

Tensors = dict[str, Tensor]
KINDS = [*FAMILIES]
KINDS_OF_DELTAS = ["lora", "lora", "loha", "lokr", "full"]
STEP = 1 / 127  # of Q8_0, of the largest value; scales of least error clip the largest ones
NEAR = 4e-6


@dataclass
class Outcome:
    """What came of a job."""

    settings: dict[str, Any]
    wrong: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    unusable: str | None = None


def unjudged(outcome: Outcome) -> list[tuple[str, str]]:
    """Nothing of such a job may be refused."""
    return outcome.refusals


def counts(outcome: Outcome) -> Counter[str]:
    return Counter({outcome.settings["as"]: 1})


def drawn_module(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Tensors, Tensor]:
    """The tensors of a delta of one kind for a weight of that shape, and the delta in float64."""
    generator = torch.Generator().manual_seed(seed)
    out, *tail = shape
    size = torch.Size(tail).numel()
    new = lambda *axes: torch.randn(axes, generator=generator) / 4
    rank, alpha = 2, torch.tensor([0.5, 2.0, 3.0][seed % 3])
    if kind == "full":
        diff = new(*shape)
        return {"diff": diff}, diff.double()
    if kind == "loha":
        pairs = [(new(out, rank), new(rank, size)) for _ in "12"]
        parts = {f"hada_w{n}_{x}": one for n, pair in enumerate(pairs, 1)
                 for x, one in zip("ab", pair, strict=True)}  # fmt: skip
        one, two = (a.double() @ b.double() for a, b in pairs)
        return parts | {"alpha": alpha}, float(alpha) / rank * one * two
    if kind == "lokr":
        first = 2 if out % 2 == 0 and tail[0] % 2 == 0 else 1
        w1, w2 = new(first, first), new(out // first, tail[0] // first, *tail[1:])
        delta = torch.kron(w1.double(), w2.double().flatten(1))
        if tail[1:]:
            delta = torch.kron(w1.double()[..., None, None], w2.double())
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, delta
    a, b = new(rank, *tail), new(out, rank, *(1 for _ in tail[1:]))
    delta = float(alpha) / rank * b.double().flatten(1) @ a.double().flatten(1)
    return {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha}, delta


def write_kinds(path: Path, modules: dict[str, Tensors]) -> Path:
    """A file of LyCORIS in diffusers' names (`lycoris_`)."""
    tensors = {
        f"lycoris_{name.replace('.', '_')}.{role}": value.clone()
        for name, parts in modules.items()
        for role, value in parts.items()
    }
    save_file(tensors, path)
    return path


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """One job on a family."""
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    draw = lambda items: items[int(torch.randint(len(items), (1,), generator=random))]
    part, model = next(iter(models_of(kind).items()))
    state = {key: value.double() for key, value in state_of(model).items()}
    layers = [
        key.removesuffix(".weight")
        for key, value in state.items()
        if key.endswith(".weight") and value.dim() in (2, 4) and "embed" not in key
        if "conv_depth" not in key
    ]
    adapters: dict[Path, float] = {}
    for number in range(2):
        weight, modules = draw([1.0, 0.5, -0.75]), {}
        for layer in layers[number :: draw([2, 3, 5])]:
            shape = tuple(state[f"{layer}.weight"].shape)
            one = drawn_module(draw(KINDS_OF_DELTAS), shape, seed * 1000 + len(modules))
            modules[layer], delta = one
            key = f"{layer}.weight"
            state[key] = state[key] + weight * delta.reshape(state[key].shape)
        adapters[write_kinds(folder / f"{number}.safetensors", modules)] = weight
    form = draw([*FORMS])
    outcome = Outcome({"family": kind, "seed": seed, "as": form})
    try:
        FORMS[form](kind, part, state, adapters, folder, outcome)
    except AdapterkitError as error:
        outcome.refusals.append((form, str(error)))
    return outcome


def _compare(after: Tensors, right: Tensors, outcome: Outcome, near: Any = NEAR) -> None:
    for key, value in right.items():
        error = (after[key].double() - value).abs()
        allowed = near(value) if callable(near) else near * (1 + value.abs())
        if after[key].shape != value.shape or bool((error > allowed).any()):
            outcome.wrong.append(f"{key}: {float(error.max())}")


def _merge(base: Path, adapters: dict[Path, float], out: Path) -> None:
    adapterkit.merge(base, adapters, out=out, verify=True)
    adapterkit.verify(out, base=base, adapters=adapters)


def _file(kind, part, state, adapters, folder, outcome) -> None:
    base, out = write_family(kind, folder / "base.safetensors"), folder / "out.safetensors"
    _merge(base, adapters, out)
    right = in_the_file(kind, {part: state})
    after = load_file(out)
    _compare(after, {k: v.double() for k, v in load_file(base).items()} | right, outcome)


def _gguf(types: str) -> Callable[..., None]:
    def job(kind, part, state, adapters, folder, outcome) -> None:
        prefix = "net." if FAMILIES[kind].parts[part][2] == "net." else DENOISER
        bare = lambda one: {
            key.removeprefix(prefix): value for key, value in in_the_file(kind, {part: one}).items()
        }
        before = bare(state_of(models_of(kind)[part]))
        base = write_images(folder / "base.gguf", before, types, in_rows=kind.startswith("sd"))
        _merge(base, adapters, folder / "out.gguf")
        decoded, after = read_images(base), read_images(folder / "out.gguf")
        exact = bare(state)
        right = {
            key: value.double() + exact[key] - before[key].double()
            for key, value in decoded.items()
        }
        whole = lambda value: value.abs().max() * (STEP if types == "Q8_0" else NEAR)
        step = lambda value: whole(value) + value.abs() * 2.0**-10 + NEAR  # or of F16
        _compare(after, right, outcome, step)

    return job


def _pipeline(kind, part, state, adapters, folder, outcome) -> None:
    base = write_pipeline(folder / "base", part, models_of(kind)[part])
    _merge(base, adapters, folder / "out")
    after = load_file(folder / "out" / part / "diffusion_pytorch_model.safetensors")
    _compare(after, {key: state[key] for key in after}, outcome)


FORMS: dict[str, Callable[..., None]] = {
    "file": _file,
    "gguf": _gguf("F32"),
    "gguf in blocks": _gguf("Q8_0"),
    "pipeline": _pipeline,
}
