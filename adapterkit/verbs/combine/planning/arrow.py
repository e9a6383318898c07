"""arrow: stack experts once, with the prototypes that route tokens to them (Arrow,
arXiv:2405.11157), as files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from adapterkit import __version__
from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import AdapterkitError, Problems, shown
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import open_all
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.merge.sites import join
from adapterkit.core.outputs.cards import hub_id_or_name
from adapterkit.core.outputs.folder_files import as_json
from adapterkit.core.plan import READ, Metrics, OutputFile, Plan, Task, TaskResult
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.planning.trained_values import trained_values
from adapterkit.verbs.combine.records.arrow import Arrow
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.joined_values import delta_problems, read_all

FORMAT = 1
WEIGHTS, CONFIG = "arrow.safetensors", "arrow.json"
ITERATIONS = 15  # of PEFT's power iteration
TINY = 1e-8  # added by PEFT to a norm before a division


def plan_arrow(options: Arrow) -> Plan:
    """The plan of an arrow; `Refused` with all problems."""
    expert_folders, generals = open_all(options.adapters, options.general)
    _check(options, len(expert_folders))
    read = read_all([*expert_folders, *generals])
    experts, general = read[: len(expert_folders)], read[len(expert_folders) :]
    errors = Problems(code="AK101")
    for adapter in read:
        errors += delta_problems(adapter) + _not_routable(adapter)
    joined = join(read, errors)
    tasks: list[StackedExperts] = []
    counts, dtype = (len(general), len(experts)), dtypes.parse(options.dtype)
    for name, site in joined.items():
        parts = tuple(pair for pair in site.members.items() if pair[0] < len(experts))
        others = tuple(one for number, one in site.members.items() if number >= len(experts))
        ranks = {factors.rank for factors in site.members.values()}
        if parts and options.compat == "peft" and len(ranks) > 1:
            problem = f"{shown(name)}: ranks {sorted(ranks)}"
            expected, hint = "one rank, as PEFT requires", "remove --compat peft"
            errors.add(problem, expected, hint, where="--compat peft")
        if parts:
            how = options.compat, options.seed or 0
            tasks.append(StackedExperts(name, parts, others, *counts, *how, dtype))
    errors.raise_all()
    adapter_output.check_factors(tasks, "arrow")
    partly = [task.name for task in tasks if len(task.parts) < len(experts)]
    missing = (
        f"{len(partly)} modules are not in all experts (first {shown(partly[0])})" if partly else ""
    )
    return plan_of(
        "arrow",
        options.recipe_options() | {"experts": len(experts)},
        read,
        shards=[OutputFile.computed(WEIGHTS, tasks)],
        files={CONFIG: as_json(_config(options, experts, general))},
        decisions={"adapters": adapter_output.modules_of(experts)},
        notes=filter(None, [missing]),
    )


def _config(options: Arrow, experts: Sequence[Adapter], general: Sequence[Adapter]) -> dict:
    """The content of arrow.json."""
    read = [*experts, *general]
    config = {
        "arrow": FORMAT,
        "adapterkit": __version__,
        "top_k": options.top_k or min(3, len(experts)),
        "temperature": options.temperature,
        "experts": [a.folder.name for a in experts],
        "general": [a.folder.name for a in general],
        "base_model_name_or_path": adapter_config.base_id(experts[0]),
        "sources": [{"name": hub_id_or_name(a.folder), "header": a.header_sha256} for a in read],
    }
    how = {"compat": options.compat, "seed": options.seed or 0}
    return config | (how if options.compat else {})


def _check(options: Arrow, count: int) -> None:
    errors = Problems(code="AK101")
    if not count:
        errors.add("no adapters were given", "one or more", "name the adapters", where="arrow")
    if options.top_k is not None and not 0 < options.top_k <= count:
        errors.add(
            f"--top-k is {options.top_k}, with {count} experts",
            f"1 to {count}",
            "give fewer" if options.top_k > 0 else "give at least 1",
            where="options",
        )
    errors.raise_all()


def _not_routable(adapter: Adapter) -> list[AdapterkitError]:
    """Refusals of values that a router over linear layers cannot represent."""
    others = [
        lora.module
        for lora in adapter.loras
        if lora.kind != "module" or len(lora.a.shape) > 2 or lora.bias is not None
    ]
    others += [adapter.name] * bool(adapter.config.get("target_parameters"))
    others += trained_values([adapter], {}, copies=False)
    errors = Problems(where="arrow", code="AK305")
    if others:
        errors.add(
            f"{adapter.name} adapts more than linear layers: {', '.join(map(shown, others[:6]))}",
            "no embeddings, convolutions, biases, expert stacks or fully trained values",
            "train the experts on linear layers only",
        )
    return errors


@dataclass(frozen=True)
class StackedExperts(Task):
    """One module's experts: a (E, r, in), b (E, out, r), scale (E), prototype (E, in)."""

    parts: tuple[tuple[int, Factors], ...] = field(metadata=READ)  # expert's number, factors
    general: tuple[Factors, ...] = field(metadata=READ)  # of the general adapters with this module
    generals: int  # how many general adapters there are
    experts: int
    compat: str | None
    seed: int
    dtype: str

    @property
    def rank(self) -> int:
        """The largest rank of an expert, including the factors of the general adapters."""
        added = 0 if self.compat else sum(factors.rank for factors in self.general)
        return max(factors.rank for _, factors in self.parts) + added

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        count, (out, width) = len(self.parts), self.parts[0][1].shape
        stored = [
            TensorPlan(f"{self.name}.a", self.dtype, (count, self.rank, width)),
            TensorPlan(f"{self.name}.b", self.dtype, (count, out, self.rank)),
            TensorPlan(f"{self.name}.scale", "F32", (count,)),
            TensorPlan(f"{self.name}.prototype", "F32", (count, width)),
        ]
        if self._is_partial:
            stored.append(TensorPlan(f"{self.name}.expert", "I32", (count,)))
        return tuple(stored)

    @property
    def _is_partial(self) -> bool:
        """True if some experts lack the module."""
        return len(self.parts) < self.experts

    @property
    def memory(self) -> int:
        return 4 * sum(s.nbytes for s in self.max_outputs) + 8 * sum(
            spec.nbytes for spec in self.reads
        )

    def compute(self, inputs: Reader) -> TaskResult:
        if self.compat == "peft":
            factors, scales = self._like_peft(inputs), [own.scale for _, own in self.parts]
            prototypes = [(power_iteration(a, b, self.seed), None) for a, b in factors]
        elif self.general:
            general = [
                Product(product.left / self.generals, product.right)
                for factors in self.general
                for product in factors.products(inputs)
            ]
            negative = [Product(-product.left, product.right) for product in general]
            factors = [
                algebra.balance(algebra.stack_products([*own.products(inputs), *negative]))
                for _, own in self.parts
            ]
            scales = [1.0] * len(factors)
            prototypes = [prototype(Product(b, a)) for a, b in factors]
        else:
            factors = [own.stored(inputs) for _, own in self.parts]
            scales = [own.scale for _, own in self.parts]
            prototypes = [prototype(Product(b.double(), a.double())) for a, b in factors]
        return self._result(factors, scales, prototypes)

    def _like_peft(self, inputs: Reader) -> list[tuple[Tensor, Tensor]]:
        pairs = [own.stored(inputs) for _, own in self.parts]
        if not self.general:
            return pairs
        others = [factors.stored(inputs) for factors in self.general]
        mean_a = torch.stack([a for a, _ in others]).mean(0)
        mean_b = torch.stack([b for _, b in others]).mean(0)
        return [(a - mean_a, b - mean_b) for a, b in pairs]

    def _result(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scales: list[float],
        prototypes: Sequence[tuple[Tensor, float | None]],  # with their gaps
    ) -> TaskResult:
        dtype, pad = dtypes.torch_dtype(self.dtype), torch.nn.functional.pad
        a = torch.stack([pad(a, (0, 0, 0, self.rank - len(a))) for a, _ in factors])
        b = torch.stack([pad(b, (0, self.rank - b.shape[1])) for _, b in factors])
        tensors = {
            f"{self.name}.a": a.to(dtype),
            f"{self.name}.b": b.to(dtype),
            f"{self.name}.scale": torch.tensor(scales, dtype=torch.float32),
            f"{self.name}.prototype": torch.stack([vector for vector, _ in prototypes]).float(),
        }
        if self._is_partial:
            numbers = [number for number, _ in self.parts]
            tensors[f"{self.name}.expert"] = torch.tensor(numbers, dtype=torch.int32)
        gaps = [short(gap, 4) for _, gap in prototypes if gap is not None]
        metrics: Metrics = {"gap": gaps} if gaps else {}
        return TaskResult(tensors, metrics | {"rank": self.rank})


def prototype(product: Product) -> tuple[Tensor, float]:
    """The top right singular vector of a product, signed, and the gap between its first two
    singular values: (σ₁ - σ₂) / σ₁.

    Zero, with gap 0, if the product is zero: an untrained expert attracts no token."""
    svd = algebra.svd(product)
    if not svd.s[0] > 0:
        return torch.zeros_like(svd.vh[0]), 0.0
    second = float(svd.s[1]) if len(svd.s) > 1 else 0.0
    return algebra.fix_sign(svd.vh[0]), 1 - second / float(svd.s[0])


def power_iteration(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """PEFT's prototype: v ← aᵀ(bᵀb(a v)) / ‖·‖, 15 times in float32 from a random start, of either
    sign."""
    a, b = a.float(), b.float()
    core = b.T @ b
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    v = v.to(a.device)
    v = v / (v.norm() + TINY)
    for _ in range(ITERATIONS):
        v = a.T @ (core @ (a @ v))
        v = v / (v.norm() + TINY)
    return v
