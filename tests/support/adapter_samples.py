"""The golden files of the formats, found by their folders, and what they hold in float64."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.adapters.formats.modules.kinds import COPY
from adapterkit.adapters.formats.modules.parts import scaled_role
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.read import Reading, read
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.inputs.sources import open_base, open_unconverted
from adapterkit.core.output.stage import SUFFIX
from adapterkit.core.receipt import RECEIPT
from adapterkit.core.weights.plan_reader import PlanReader
from conformance import read as conformance_reader

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
ENDINGS = {
    "safetensors": (".safetensors",),
    "gguf": (".gguf",),
    "pickle": (".pt", ".pth", ".bin", ".ckpt", ".lora"),
}
# folders beside a sample: the model it is for, the adapter that its tool converted, files with
# spellings of keys that are read, never written, and files that are refused
BESIDE = ("base", "adapter", "respelled", "refused")


@dataclass(frozen=True)
class Sample:
    """A file or folder that a format's own tool wrote."""

    form: str
    path: Path
    options: dict[str, Any] = field(default_factory=dict)  # that reading it needs

    @property
    def is_in_peft_layout(self) -> bool:
        return formats()[self.form].layout == "adapter"

    @property
    def is_rewritten(self) -> bool:
        """Whether it is of a type or variant in PEFT's layout that is written as a LoRA."""
        path = self.path / "adapter_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        return config.get("peft_type", "LORA") != "LORA" or bool(config.get("use_bdlora"))

    @property
    def id(self) -> str:
        return self.path.relative_to(GOLDEN).as_posix()


@cache
def samples(name: str) -> tuple[Sample, ...]:
    """The samples of a format: each file of its container, or the folder with its settings."""
    return tuple({sample.path: sample for sample in _samples(formats()[name])}.values())


def all_samples() -> list[Sample]:
    return [sample for name in formats() for sample in samples(name)]


def _samples(form: Format) -> Iterator[Sample]:
    root = GOLDEN / form.name
    for path in sorted(p for p in root.rglob("*") if p.suffix in ENDINGS[form.file.container]):
        if any(part in BESIDE for part in path.relative_to(root).parts[:-1]):
            continue
        options: dict[str, Any] = {}
        if (path.parent / "base").is_dir():
            options["base"] = path.parent / "base"
        if form.file.container == "pickle":
            options["allow_pickle"] = True
        family = path.stem.partition("_")[0]
        if not form.names.architectures and family in architectures():
            options["architecture"] = family  # which the file does not tell
        is_folder = any((path.parent / settings).is_file() for settings in form.file.config)
        if form.scale.default == "ask" and not is_folder:
            options["alpha"] = 6.0
        yield Sample(form.name, path.parent if is_folder else path, options)


def contents_of(path: Path, *, stacked: bool = False, **options: Any) -> Contents:
    """What a source holds; `stacked`: in the names of the model of the base, experts as stacks."""
    given = {"allow_pickle": False} | options
    return conformance_reader.contents_of(path, given.pop("base", None), stacked=stacked, **given)


def read_back(out: Path, to: str, source: Contents, sample: Sample) -> Contents:
    """What was written; its few names may be those of several families of models."""
    family = {}
    names = source.architectures or (_written_architecture(out),)
    if len(names) == 1 and names[0] in formats()[to].names.architectures:
        family = {"architecture": names[0]}
    options = {name: value for name, value in sample.options.items() if name == "base"}
    underscores = formats()[to].names.style == "underscores"
    is_known = bool(options) and bool(open_base(options["base"]).tensors)
    if underscores and source.components == (LANGUAGE,) and not is_known:
        folder = open_unconverted(out)
        found = detect(folder)
        names = Reading(modules=[module.name for module in source.modules])  # as a base has them
        return read(found.format, folder, found.container, found.config, names)
    return contents_of(out, stacked=sample.is_in_peft_layout, **(options | family))


def _written_architecture(out: Path) -> str | None:
    """The architecture in whose names a file was written, by its receipt."""
    receipt = out / RECEIPT if out.is_dir() else out.with_name(out.name + SUFFIX)
    return json.loads(receipt.read_text())["architecture"]


@dataclass(frozen=True)
class Delta:
    """What an adapter does to a module: low-rank factors, and tensors that go with them."""

    a: Tensor | None  # (r, in · kernel) float64, with the scale
    b: Tensor | None  # (out, r) float64
    others: dict[str, Tensor]  # role -> float64

    @property
    def is_zero(self) -> bool:
        factors = [] if self.a is None or self.b is None else [norm(self.b, self.a)]
        return not any([*factors, *(float(value.norm()) for value in self.others.values())])

    def difference(self, other: "Delta") -> float:
        """The relative distance of two deltas in the Frobenius norm, from QR of the factors; of
        other tensors the largest."""
        errors = [0.0]
        if self.a is not None and self.b is not None:
            assert other.a is not None and other.b is not None
            assert self.b.shape[0] == other.b.shape[0] and self.a.shape[1] == other.a.shape[1]
            apart = norm(torch.cat([self.b, -other.b], 1), torch.cat([self.a, other.a]))
            errors.append(apart / max(norm(self.b, self.a), 1e-300))
        assert set(self.others) == set(other.others)
        for role, value in self.others.items():
            assert value.shape == other.others[role].shape, role
            apart = float((value - other.others[role]).norm())
            errors.append(apart / max(float(value.norm()), 1e-300))
        return max(errors)


def norm(b: Tensor, a: Tensor) -> float:
    """‖b@a‖ without b@a."""
    return float((torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T).norm())


def deltas(contents: Contents) -> dict[str, Delta]:
    """The deltas of all modules by name, kind and, where there are several, component; a copy of
    the base's own weights is none."""
    reader = PlanReader(contents.folders)
    several = len(contents.components) > 1
    result = {
        f"{m.component if several else ''}:{m.name}:{m.kind}:{m.depth}": delta(m, reader)
        for m in contents.modules
        if m.kind != COPY
    }
    for key, one in list(result.items()):  # a bias of factors is a difference of its own elsewhere
        bias = one.others.pop("bias", None)
        if bias is not None:
            result[key.replace(":lora:", ":full:")] = Delta(None, None, {"diff_b": bias})
    return result


def comparable(before: dict[str, Delta], after: dict[str, Delta]) -> bool:
    """Whether all that was there is there again, and what is new is zero."""
    return set(before) <= set(after) and all(
        after[name].is_zero for name in after.keys() - before.keys()
    )


def delta(module: AdapterModule, reader: PlanReader) -> Delta:
    """A module's delta in float64."""
    parts = {role: part.value(reader).double() for role, part in module.parts.items()}
    if module.kind == "lora":
        a, b = parts.pop("a"), parts.pop("b")
        if "mid" in parts:
            a = torch.einsum("mn...,ni->mi...", parts.pop("mid"), a.flatten(1))
        if "bias" in parts:
            parts["bias"] = parts["bias"] * module.scale
        return Delta(a.flatten(1) * module.scale, b.flatten(1), parts)
    if module.kind == "experts":
        return Delta(None, None, {"delta": module.scale * parts["b"] @ parts["a"]})
    if module.kind in ("loha", "lokr"):
        parts[scaled_role(module)] = module.scale * parts[scaled_role(module)]
    return Delta(None, None, parts)
