"""Output files of a model in a quantized format, or decoded to floats."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.checkpoint.header import Header
from adapterkit.checkpoint.layout import Stored, grouped, like_base
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import shown
from adapterkit.plan import Computed, Shard, Step, Task
from adapterkit.planning.cards import base_card
from adapterkit.planning.folder_files import Files, model_files
from adapterkit.tasks.common import CopiedTensor
from adapterkit.tasks.edited import EditedTensor, RequantizedWeight
from adapterkit.tasks.quantized import EncodedWeight
from adapterkit.weights.codec import QuantizedWeight

CHANGED_BY = "adapterkit_changed_by"  # in the metadata of a base that is not the original's copy, but goes with an adapter


@dataclass
class QuantizedModel:
    """A base in which some weights are quantized, by `tasks` where they say more than `EncodedWeight`."""

    base: Checkpoint
    packed: dict[str, QuantizedWeight]
    tasks: dict[str, Task]
    config: dict[str, Any]
    folder: str = ""
    changed_by: str = ""  # the verb whose adapter goes with it: the files say so

    def shards(self) -> tuple[Computed, ...]:
        groups: dict[str, list[Task]] = {name: [] for name in self.base.shards}
        for key, spec in self.base.tensors.items():
            task = self.tasks.get(key)
            if task is None and key in self.packed:
                task = EncodedWeight(key, spec, self.packed[key])
            groups[spec.file].append(task or CopiedTensor(key, spec, key))
        return shards_of(
            self.base, groups, self.folder, {CHANGED_BY: self.changed_by} if self.changed_by else {}
        )

    def files(self, summary: str) -> Files:
        return model_files(
            self.base, self.config, self.shards(), base_card(self.base, summary), folder=self.folder
        )


def shards_of(
    base: Checkpoint,
    groups: dict[str, list[Task]],
    folder: str = "",
    said: dict[str, str] | None = None,
) -> tuple[Computed, ...]:
    """Output files of these tasks, named as the base's; `said` joins their metadata."""
    prefix = f"{folder}/" if folder else ""
    return tuple(
        Computed(
            prefix + name,
            tuple(sorted(tasks, key=lambda task: task.name)),
            (base.shards[name].metadata or {"format": "pt"}) | (said or {}),
            safetensors_order=True,
        )
        for name, tasks in groups.items()
    )


LOST = {
    False: 0.5,
    True: 0.8,
}  # shares of the delta below which a merge is warned of: in quantized formats, in floats


def lost(metrics: dict[str, dict], compat: str | None = None) -> list[str]:
    """Warnings where rounding to nearest swallowed a part of what was merged: into quantized formats, and into floats.

    `survived` is the projection of what was stored on the delta. Normal deltas of 2, 1, 1/2, 1/8, 1/32 of bf16's median step
    survive by 1.00, 0.93, 0.70, 0.22, 0.06, with `rounding` (the error over the delta's norm) 0.27, 0.48, 0.70, 0.92, 0.98. An
    extracted adapter of median `rounding` 0.75, which goes with about 0.65, kept 0.64 of its gain in loss. Above 1 the error is
    noise that swallows nothing: of draws, or of a base of more digits.
    """
    kinds: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for key, metric in metrics.items():
        if "survived" in metric and metric.get("rounding", 0) <= 1:
            kinds["rounding" in metric][key] = metric["survived"]
    ways = {
        False: "merge with --dequantize, or into the 16-bit original with --base16",
        True: "write floats with --dtype fp32",
    }
    notes, first = [], f"leave out --compat {compat}, and " if compat else ""
    for floats, shares in kinds.items():
        bad = sorted((share, key) for key, share in shares.items() if share < LOST[floats])
        if bad:
            (share, key), median = bad[0], statistics.median(shares.values())
            what, how, share_kept = (
                ("tensors", "rounding to their dtype", "80 %")
                if floats
                else ("modules", "requantization", "half")
            )
            notes.append(
                f"WARNING: in {len(bad)} of {len(shares)} {what} less than {share_kept} of the change survived {how} (median: "
                f"{1 - median:.0%} lost; least survived: {share:.0%} of {shown(key)}): {first}give --rounding stochastic, "
                f"or {ways[floats]}"
            )
    return notes


def shard_of(name: str, steps: Sequence[Step], header: Header, keep: bool) -> Shard | Computed:
    """One output file of these steps, packed weights in their format (`keep`) or as floats; streamed where nothing is decoded."""
    if keep and not any(isinstance(step.source, QuantizedWeight) and step.edits for step in steps):
        plain = [part for step in steps for part in _parts(step)]
        by_key = {step.key: step for step in plain}
        order = {spec.key: spec.start for spec in header.tensors}
        plain.sort(key=lambda step: order.get(step.key, header.tensors[-1].stop))
        layout = like_base(
            name, [Stored(step.key, step.dtype, step.shape) for step in plain], header
        )
        return Shard(layout, tuple(by_key[stored.key] for stored in layout.tensors))
    tasks = sorted(
        (task for step in steps for task in _tasks_of(step, keep)),
        key=lambda task: task.name,
    )
    metadata = (
        header.metadata if keep else {"format": header.metadata.get("format", "pt")}
    )  # torchao says there what tensors are
    return Computed(name, tuple(tasks), metadata or {"format": "pt"}, safetensors_order=True)


def shards_of_size(steps: Sequence[Step], limit: int) -> tuple[Computed, ...]:
    """Files of at most `limit` bytes of these steps, packed weights as floats."""
    tasks = [task for step in steps for task in _tasks_of(step, keep=False)]
    files = grouped(
        tasks, [sum(stored.nbytes for stored in task.max_outputs) for task in tasks], limit
    )
    return tuple(
        Computed(name, tuple(group), safetensors_order=True) for name, group in files.items()
    )


def _parts(step: Step) -> list[Step]:
    if not isinstance(step.source, QuantizedWeight):
        return [step]
    return [Step(part.key, part.dtype, part.shape, part) for part in step.source.parts]


def _tasks_of(step: Step, keep: bool) -> list[Task]:
    packed = step.source
    if not isinstance(packed, QuantizedWeight):
        return (
            [CopiedTensor(step.key, packed, step.key)]
            if step.copied and step.key == packed.key
            else [EditedTensor(step.key, step)]
        )
    if not keep:
        return [EditedTensor(step.key, step)]
    if step.edits:
        return [RequantizedWeight(step.key, step)]
    return [CopiedTensor(part.key, part, part.key) for part in packed.parts]
