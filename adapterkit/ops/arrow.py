"""arrow: experts stacked once, with the prototypes that route tokens to them (Arrow, arXiv:2405.11157), as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit import __version__, dtypes
from adapterkit.adapter import Adapter
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.factors import Factors
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Product
from adapterkit.ops import produced
from adapterkit.ops.combine import held, not_linear, read_all
from adapterkit.ops.packaging import as_json, hub_or_name
from adapterkit.ops.sites import join
from adapterkit.ops.sources import open_all
from adapterkit.options import Sources, StrPath, checked
from adapterkit.plan import (
    Computed,
    CopyFile,
    FromMetrics,
    Inputs,
    Plan,
    Progress,
    Receipt,
    TaskResult,
    identities,
)

FORMAT = 1
WEIGHTS, CONFIG = "arrow.safetensors", "arrow.json"
ITERATIONS = 15  # of PEFT's power iteration
TINY = 1e-8  # what PEFT adds to a norm that it divides by


@dataclass(frozen=True)
class Options:
    """What arrow can be told. Fields are the command's options."""

    top_k: int | None = None
    temperature: float = 1.0
    compat: str | None = None
    seed: int | None = None
    dtype: str = "fp32"


@checked()
def arrow(
    adapters: Sources,
    *,
    general: Sources = (),
    out: StrPath,
    top_k: int | None = None,
    temperature: float = 1.0,
    compat: str | None = None,
    seed: int | None = None,
    dtype: str = "fp32",
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Stack adapters as the experts of an Arrow router: per module a (E, r, in), b (E, out, r), scale (E), prototype (E, in).

    `out` holds `arrow.safetensors` (`<module>.a`, `.b`, `.scale`, `.prototype`, and `.expert`, the experts' numbers, where some
    lack the module) and `arrow.json` (format, top_k, temperature, experts, general, sources). A prototype is the top right
    singular vector of b@a, from the factors' small core in float64, written in float32: its element of largest magnitude is
    positive; zero for an untrained expert. Smaller ranks are filled with zeros. `general` adapters are subtracted first, exactly
    (the rank grows); the scale is then 1. `compat="peft"`: PEFT's power iteration (15 steps from `seed`) and its subtraction of
    factor means. Routing takes the `top_k` largest |x·p| (default: 3, or as many as there are experts) and a softmax at
    `temperature`. Raises `Refused` before anything is written.
    """
    options = Options(top_k, temperature, compat, seed, dtype)
    experts, generals = open_all(adapters=adapters, general=general)
    plan = plan_arrow(experts, generals, options)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(
        plan, out, engine=engine, device=device, memory=memory, dry_run=dry_run, **how
    )


def plan_arrow(
    expert_folders: Sequence[Folder], generals: Sequence[Folder], options: Options
) -> Plan:
    """Everything arrow will do, or `Refused` with all that cannot be done."""
    _check(options, len(expert_folders))
    read = read_all([*expert_folders, *generals])
    experts, general = read[: len(expert_folders)], read[len(expert_folders) :]
    errors = [
        error for adapter in read for error in (*not_linear(adapter), *_not_routable(adapter))
    ]
    joined = join(read, errors)
    tasks: list[Experts] = []
    for name, site in joined.items():
        parts = tuple(
            (number, factors)
            for number, (_, factors) in site.members.items()
            if number < len(experts)
        )
        less = tuple(
            factors for number, (_, factors) in site.members.items() if number >= len(experts)
        )
        if not parts:
            continue
        if options.compat == "peft":
            errors += _alike(name, parts, less, read)
        dtype = dtypes.parse(options.dtype)
        seed = options.seed or 0
        tasks.append(
            Experts(name, parts, less, len(general), len(experts), options.compat, seed, dtype)
        )
    refuse_all(errors)
    if not tasks:
        raise Refused(
            "no module with factors",
            expected="adapters of low-rank factors",
            where="arrow",
            hint="check the adapters",
        )
    config = {
        "arrow": FORMAT,
        "adapterkit": __version__,
        "top_k": options.top_k or min(3, len(experts)),
        "temperature": options.temperature,
        "experts": [a.folder.name for a in experts],
        "general": [a.folder.name for a in general],
        "base_model_name_or_path": produced.base_id(experts[0]),
        "sources": [{"name": hub_or_name(a.folder), "header": a.header_sha256} for a in read],
    }
    if options.compat:
        config |= {"compat": options.compat, "seed": options.seed or 0}
    notes = _coverage(tasks, experts)
    told = {k: v for k, v in vars(options).items() if v is not None} | {"experts": len(experts)}
    metrics = {"adapters": [{"name": a.name, "modules": len(a.loras)} for a in experts]}
    folders, headers = tuple(a.folder for a in read), produced.headers_of(read)
    shard = Computed(WEIGHTS, tuple(tasks))
    files: dict[str, bytes | CopyFile | FromMetrics] = {CONFIG: as_json(config)}
    return Plan(
        "arrow",
        told,
        folders,
        headers,
        identities(folders, headers),
        (shard,),
        files,
        metrics,
        tuple(notes),
        models=(),
    )


def _check(options: Options, count: int) -> None:
    errors: list[AdapterkitError] = []
    if not count:
        errors.append(
            Refused("no adapter", expected="one or more", where="arrow", hint="name the adapters")
        )
    if options.top_k is not None and not 0 < options.top_k <= count:
        errors.append(
            Refused(
                f"--top-k {options.top_k}",
                expected=f"1 to {count}, the experts",
                where="options",
                hint="give fewer",
            )
        )
    if options.seed is not None and options.compat is None:
        errors.append(
            Refused(
                "--seed",
                expected="--compat peft beside it: nothing else draws",
                where="options",
                hint="leave it out",
            )
        )
    refuse_all(errors)


def _not_routable(adapter: Adapter) -> list[AdapterkitError]:
    """What a router over linear layers cannot hold."""
    odd = [
        lora.module
        for lora in adapter.loras
        if lora.kind != "module" or len(lora.a.shape) > 2 or lora.bias is not None
    ]
    odd += [adapter.name] * bool(adapter.config.get("target_parameters")) + [
        *held([adapter], {}, copies=False)
    ]
    if not odd:
        return []
    found = (
        f"{adapter.name} has more than factors of linear layers: {', '.join(map(shown, odd[:6]))}"
    )
    hint = "train experts on linear layers alone"
    return [
        Refused(
            found,
            expected="embeddings, convolutions, biases, stacks and trained values not among them",
            where="arrow",
            hint=hint,
        )
    ]


def _alike(name: str, parts: tuple, less: tuple, read: Sequence[Adapter]) -> list[AdapterkitError]:
    found = {factors.rank for _, factors in parts} | {factors.rank for factors in less}
    if len(found) == 1:
        return []
    expected = "one rank, as PEFT demands"
    return [
        Refused(
            f"{shown(name)}: ranks {sorted(found)}",
            expected=expected,
            where="--compat peft",
            hint="leave --compat out",
        )
    ]


def _coverage(tasks: Sequence["Experts"], experts: Sequence[Adapter]) -> list[str]:
    partly = [task.name for task in tasks if len(task.parts) < len(experts)]
    return (
        [f"{len(partly)} modules are not in all experts (first {shown(partly[0])})"]
        if partly
        else []
    )


@dataclass(frozen=True)
class Experts:
    """One module's experts."""

    name: str
    parts: tuple[tuple[int, Factors], ...]  # expert's number, factors
    less: tuple[Factors, ...]  # of the general adapters that have the module
    generals: int  # how many there are in all
    experts: int
    compat: str | None
    seed: int
    dtype: str

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for f in (*(f for _, f in self.parts), *self.less) for spec in (f.a, f.b))

    @property
    def rank(self) -> int:
        """Of the widest expert, the general adapters' factors beside its own."""
        added = 0 if self.compat else sum(factors.rank for factors in self.less)
        return max(factors.rank for _, factors in self.parts) + added

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        count, (out, width) = len(self.parts), self.parts[0][1].shape
        stored = [
            Stored(f"{self.name}.a", self.dtype, (count, self.rank, width)),
            Stored(f"{self.name}.b", self.dtype, (count, out, self.rank)),
            Stored(f"{self.name}.scale", "F32", (count,)),
            Stored(f"{self.name}.prototype", "F32", (count, width)),
        ]
        return (
            (*stored, Stored(f"{self.name}.expert", "I32", (count,)))
            if self._partly
            else tuple(stored)
        )

    @property
    def _partly(self) -> bool:
        return len(self.parts) < self.experts

    @property
    def memory(self) -> int:
        return 4 * sum(s.nbytes for s in self.max_outputs) + 8 * sum(
            spec.nbytes for spec in self.reads
        )

    def compute(self, inputs: Inputs) -> TaskResult:
        if self.compat == "peft":
            factors, scales = self._like_peft(inputs), [f.scale for _, f in self.parts]
            found = [(power_iteration(a, b, self.seed), None) for a, b in factors]
        elif self.less:
            general = [
                Product(p.left / self.generals, p.right)
                for f in self.less
                for p in f.products(inputs)
            ]
            products = [
                lowrank.stacked(
                    [*f.products(inputs), *(Product(-g.left, g.right) for g in general)]
                )
                for _, f in self.parts
            ]
            factors, scales = (
                [lowrank.balanced(product) for product in products],
                [1.0] * len(products),
            )
            found = [prototype(Product(b, a)) for a, b in factors]
        else:
            factors, scales = (
                [f.stored(inputs) for _, f in self.parts],
                [f.scale for _, f in self.parts],
            )
            found = [prototype(Product(b.double(), a.double())) for a, b in factors]
        return self._made(factors, scales, found)

    def _like_peft(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        pairs = [factors.stored(inputs) for _, factors in self.parts]
        if not self.less:
            return pairs
        others = [factors.stored(inputs) for factors in self.less]
        mean_a = torch.stack([a for a, _ in others]).mean(0)
        mean_b = torch.stack([b for _, b in others]).mean(0)
        return [(a - mean_a, b - mean_b) for a, b in pairs]

    def _made(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scales: list[float],
        found: Sequence[tuple[Tensor, Any]],
    ) -> TaskResult:
        dtype, pad = dtypes.torch_dtype(self.dtype), torch.nn.functional.pad
        a = torch.stack([pad(a, (0, 0, 0, self.rank - len(a))) for a, _ in factors])
        b = torch.stack([pad(b, (0, self.rank - b.shape[1])) for _, b in factors])
        tensors = {
            f"{self.name}.a": a.to(dtype),
            f"{self.name}.b": b.to(dtype),
            f"{self.name}.scale": torch.tensor(scales, dtype=torch.float32),
            f"{self.name}.prototype": torch.stack([vector for vector, _ in found]).float(),
        }
        if self._partly:
            tensors[f"{self.name}.expert"] = torch.tensor(
                [number for number, _ in self.parts], dtype=torch.int32
            )
        gaps = [gap for _, gap in found]
        metrics: dict[str, Any] = (
            {} if None in gaps else {"gap": [float(f"{gap:.4g}") for gap in gaps]}
        )
        return TaskResult(tensors, metrics | {"rank": self.rank})


def prototype(product: Product) -> tuple[Tensor, float]:
    """The top right singular vector of a product, signed, and how much the first singular value stands out: (σ₁ - σ₂) / σ₁.

    Zero, with gap 0, where the product is zero: an untrained expert attracts no token.
    """
    svd = lowrank.svd(product)
    if not svd.s[0] > 0:
        return torch.zeros_like(svd.vh[0]), 0.0
    second = float(svd.s[1]) if len(svd.s) > 1 else 0.0
    return lowrank.signed(svd.vh[0]), 1 - second / float(svd.s[0])


def power_iteration(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """PEFT's prototype: v ← aᵀ(bᵀb(a v)), normalised, 15 times in float32 from a random start; the sign is left as it comes."""
    a, b = a.float(), b.float()
    core = b.T @ b
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    v = v / (v.norm() + TINY)
    for _ in range(ITERATIONS):
        v = a.T @ (core @ (a @ v))
        v = v / (v.norm() + TINY)
    return v
