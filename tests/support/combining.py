"""Calls of combine, ours and PEFT's."""

import re
import warnings
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core import registry
from tests.support import oracle
from tests.support.deltas import LAYERS, net

BEYOND_PEFT = ("line", "volume", "narrow")
WEIGHTS = (1.0, -0.4, 0.7)


def combined(sources: list[Path], out: Path, weights=WEIGHTS, **options) -> dict:
    """The receipt's metrics by module."""
    options = statistics_for(options["method"], sources, out) | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = [f"{source}={weight}" for source, weight in zip(sources, weights, strict=True)]
        return adapterkit.combine(named, out=out, **options).data["parameters"]


def peft_combined(
    sources: list[Path], out: Path, kind: str, weights=WEIGHTS, **options
) -> dict[str, torch.Tensor]:
    """PEFT's combination, saved: its tensors by key."""
    with oracle.quiet():
        model = oracle.peft_model(net(), *sources)
        names = [f"a{i}" for i in range(len(sources))]
        model.add_weighted_adapter(names, list(weights), "new", combination_type=kind, **options)
        model.save_pretrained(out, selected_adapters=["new"])
    return load_file(out / "new" / "adapter_model.safetensors")


def pairs_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """b @ a by module, of a file."""
    actual = {}
    for key, a in tensors.items():
        if match := re.match(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?$", key):
            b = tensors[key.replace("_A", "_B")]
            actual[match[1]] = b.double().flatten(1) @ a.double().flatten(1)
    return actual


def narrowed(source: Path, folder: Path) -> Path:
    """The adapter without the layers that PEFT's svd cannot do."""
    out = oracle.edit_config(
        source, folder / source.name, target_modules=[n for n in LAYERS if n not in BEYOND_PEFT]
    )
    tensors = load_file(out / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if not any(f".{name}." in k for name in BEYOND_PEFT)}
    save_file(kept, out / "adapter_model.safetensors")
    return out


NEEDS = {"density": 0.5, "decay": 0.9, "beta": 0.6}


def statistics_of(source: Path, out: Path) -> Path:
    """A file of covariances of what each linear layer saw with an adapter, by its name."""
    tensors = load_file(source / "adapter_model.safetensors")
    covariances = {}
    for key, a in tensors.items():
        if (match := re.match(r"base_model\.model\.(.*)\.lora_A\.weight$", key)) and a.dim() == 2:
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{source.name} {match[1]}".encode())
            )
            x = torch.randn(50, a.shape[1], generator=generator)
            x = x * torch.linspace(0.2, 2, a.shape[1]) + x[:, :1]
            covariances[f"{match[1]}.covariance"] = x.T @ x / len(x)
    save_file(covariances, out)
    return out


def statistics_for(method: str, sources: list[Path], out: Path) -> dict:
    """The option of a method that needs statistics, with a file for each source beside `out`."""
    record = registry.members("combinations").get(method)
    if record is None or record.acts_on != "covariances":
        return {}
    folder = out.with_name(f"{out.name}-statistics")
    folder.mkdir(exist_ok=True)
    files = [
        statistics_of(source, folder / f"{number}.safetensors")
        for number, source in enumerate(sources)
    ]
    return {"stats": files}


def options_of(method: str) -> dict:
    fields = registry.options(registry.members("combinations")[method])
    given = {name: value for name, value in NEEDS.items() if name in fields}
    settings = {name: given.pop(name) for name in ("decay", "beta") if name in given}
    return given | ({"settings": settings} if settings else {})
