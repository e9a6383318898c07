"""The base that is left where an init takes a part of each weight: the initial adapter, merged with
weight -1."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters.record import Adapter, Lora
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused
from adapterkit.plan import OutputFile
from adapterkit.planning.merge.job import MergeJob
from adapterkit.planning.merge.plan import changed_steps
from adapterkit.planning.outputs.cards import model_card
from adapterkit.planning.outputs.folder_files import Files, model_files
from adapterkit.planning.outputs.model import CHANGED_BY, QuantizedModel, plan_shard
from adapterkit.planning.quantization import QuantizationPlan
from adapterkit.planning.targets.initial_targets import InitialTarget
from adapterkit.tasks.handoff import handed_on
from adapterkit.tasks.initial import ResidualWeight
from adapterkit.verbs.merge import MergeOptions

BASE = "base"  # its folder in the output
SUMMARY = "without the part that {} took into the adapter beside it"


@dataclass
class ResidualAdapter:
    """The folder of an adapter that the same plan writes: it has no files yet."""

    name: str
    label: str = "the initial adapter"
    origin: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, int]:
        return {}

    def read(self, name: str, start: int, stop: int) -> bytes:
        raise FileNotFoundError(name)

    def path(self, name: str) -> Path:
        raise FileNotFoundError(name)

    def prefetch(self, names: list[str]) -> None:
        pass


def planned_adapter(config: bytes, targets: Sequence[InitialTarget], dtype: str) -> Adapter:
    """The adapter of these targets while its factors are being made."""
    loras = []
    for target in targets:
        shapes = target.place.shapes(target.rank)
        kind = "embedding" if target.kind == "embedding" else "module"
        a, b = handed_on(target.name, dtypes.parse(dtype), shapes)
        loras.append(Lora(target.module, kind, a, b, depth=target.depth))
    return Adapter(ResidualAdapter("adapter"), 1, json.loads(config), tuple(loras), {}, (), {})


def plan_residual(
    base: Checkpoint, adapter: Adapter, method: str, notes: list[str]
) -> tuple[tuple[OutputFile, ...], Files]:
    """The files of W - scale·b@a in the base's own dtypes and formats: shards, and the others.

    `Refused` where the factors cannot be taken out of a stored weight."""
    job = MergeJob(base, [adapter], [-1.0], MergeOptions())
    steps = changed_steps(job)
    notes += job.notes
    shards = []
    for name, group in steps.items():
        group = [replace(step, measures_error=bool(step.edits)) for step in group]
        header = base.shards[name]
        metadata = (header.metadata or {"format": "pt"}) | {CHANGED_BY: "init"}
        header = replace(header, metadata=metadata)
        shards.append(plan_shard(f"{BASE}/{name}", group, header, keep_format=True))
    card = model_card(base, SUMMARY.format(method))
    return tuple(shards), model_files(base, job.config, shards, card, folder=BASE)


def plan_quantized_residual(
    base: Checkpoint,
    quantization: QuantizationPlan,
    targets: Sequence[InitialTarget],
    method: str,
) -> tuple[tuple[OutputFile, ...], Files]:
    """The same, quantized; weights without factors are quantized plainly."""
    others = [target for target in targets if target.name not in quantization.linear]
    if others:
        raise Refused(
            f"--quantize with factors on {', '.join(target.name for target in others[:4])}",
            expected="linear layers with a weight of their own, that --skip does not leave out",
            where="--targets",
            hint="remove them from --targets, or remove --quantize",
        )
    tasks: Mapping[str, Any] = {
        (key := quantization.linear[target.name]): ResidualWeight(
            key,
            base.tensors[key],
            quantization.quantized.get(key),
            target.name,
            target.scale,
            quantization.weights[key].transposed,
        )
        for target in targets
    }
    model = QuantizedModel(base, quantization.quantized, tasks, quantization.config(), BASE, "init")
    return model.shards(), model.files(SUMMARY.format(method))
