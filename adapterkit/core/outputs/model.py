"""Plan output files of a model: in a quantized format, decoded to floats, or streamed."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.core.checkpoint.header import Header
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan, grouped, like_base
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import WARNING, AdapterkitError, Unrecoverable, shown
from adapterkit.core.outputs.cards import model_card
from adapterkit.core.outputs.folder_files import model_files
from adapterkit.core.plan import Files, OutputFile, Step, Task
from adapterkit.core.receipt import kept_shares
from adapterkit.core.records import Json
from adapterkit.core.tasks.common import CopiedTensor
from adapterkit.core.tasks.rows import EditedTensor, RequantizedWeight
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.detect import metadata_of_floats
from adapterkit.core.weights.loading import find_gaps, gaps_of, looks_whole

if TYPE_CHECKING:
    from adapterkit.core.weights.skeleton import Skeleton


def check_gaps(
    base: Checkpoint, model: "Skeleton | None", notes: list[str], brought: Collection[str] = ()
) -> list[AdapterkitError]:
    """Problems of a base that lacks a parameter which its other layers have, or whose experts do
    not fit together. Other gaps are notes, because a model may lack a head or a pooler on purpose.

    `model`: if it was built anyway. Otherwise it is built only if the base looks incomplete,
    because that takes seconds. `brought`: parameters that come from elsewhere."""
    if model is None and looks_whole(base):
        return []
    try:
        gaps = (gaps_of(base) if model is None else find_gaps(model)).without(brought)
    except AdapterkitError:
        return []  # transformers does not know the model
    if gaps.holes or gaps.failed:
        return gaps.errors()
    notes += [f"{WARNING}{error.where}: {error.problem}; {error.hint}" for error in gaps.errors()]
    return []


# shares of the delta below which a merge warns
LEAST_SURVIVAL = {"quantized": 0.5, "float": 0.8}


@dataclass(frozen=True)
class QuantizedModel:
    """A base with some weights encoded; `tasks` replaces the computation of its keys."""

    base: Checkpoint
    quantized: Mapping[str, QuantizedWeight]  # by key
    tasks: Mapping[str, Task]
    config: Json
    folder: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)  # of its files, besides the base's
    file: str | None = None  # the name of a single-file output, if not the base's

    def shards(self) -> tuple[OutputFile, ...]:
        """Its files of weights, with the base's names."""
        groups: dict[str, list[Task]] = {name: [] for name in self.base.shards}
        for key, spec in self.base.tensors.items():
            groups[spec.file].append(self._task(key))
        prefix = f"{self.folder}/" if self.folder else ""
        return tuple(
            OutputFile.computed(
                prefix + (self.file or name),
                sorted(tasks, key=lambda task: task.name),
                (self.base.shards[name].metadata or {"format": "pt"}) | {**self.metadata},
                safetensors_order=True,
            )
            for name, tasks in groups.items()
        )

    def _task(self, key: str) -> Task:
        if key in self.tasks:
            return self.tasks[key]
        spec = self.base.tensors[key]
        if key in self.quantized:
            from adapterkit.core.tasks.quantize import EncodedWeight

            return EncodedWeight(key, spec, self.quantized[key])
        return CopiedTensor(key, spec, key)

    def files(self, summary: str) -> Files:
        """Its other files; `summary` is part of the card's title."""
        card = model_card(self.base.folder, summary, "quantized" if self.quantized else "")
        return model_files(self.base, self.config, self.shards(), card, folder=self.folder)


def rounding_warnings(
    metrics: dict[str, dict],
    compat: str | None = None,
    *,
    in_gguf: bool = False,
    fail_below: float = -math.inf,
) -> list[str]:
    """Warnings if rounding to nearest lost some of the delta, in quantized formats and in floats;
    `Unrecoverable` if the median tensor keeps less than `fail_below`.

    `survived` is the projection of the stored change on the delta. Normal deltas of 2, 1, 1/2, 1/8,
    1/32 of bf16's median step survive by 1.00, 0.93, 0.70, 0.22, 0.06, with `rounding` (the error
    over the delta's norm) 0.27, 0.48, 0.70, 0.92, 0.98. An extracted adapter of median `rounding`
    0.75, which corresponds to about 0.65, kept 0.64 of its gain in loss. Above 1 the error is noise
    without loss: from draws, or from a base with more digits."""
    survival: dict[str, dict[str, float]] = {kind: {} for kind in LEAST_SURVIVAL}
    for key, share in (kept := kept_shares(metrics)).items():
        if metrics[key].get("rounding", 0) <= 1:
            survival["float" if "rounding" in metrics[key] else "quantized"][key] = share
    remedies = {
        "quantized": (
            "store what changes in more bits with --changed-type q8_0"
            if in_gguf
            else "merge with --dequantize, or into the 16-bit original with --original"
        ),
        "float": "write floats with --dtype fp32",
    }
    texts = {
        "quantized": ("modules", "half", "requantization"),
        "float": ("tensors", "80 %", "rounding to their dtype"),
    }
    warnings, first = [], f"remove --compat {compat}, and " if compat else ""
    if kept and (median := statistics.median(kept.values())) < fail_below:
        kind = "float" if survival["float"] else "quantized"
        raise Unrecoverable(
            f"rounding keeps {median:.2%} of the change, the median of {len(kept)} tensors",
            expected=f"at least {fail_below:.2%}",
            where="--fail-below",
            hint=f"{first}give --rounding stochastic, or {remedies[kind]}",
            code="AK606",
        )
    for kind, shares in survival.items():
        low = sorted((s, key) for key, s in shares.items() if s < LEAST_SURVIVAL[kind])
        if not low:
            continue
        (least, key), median = low[0], statistics.median(shares.values())
        noun, share, cause = texts[kind]
        warnings.append(
            f"in {len(low)} of {len(shares)} {noun} less than {share} of the change "
            f"survived {cause} (median: {1 - median:.0%} lost; least survived: {least:.0%} of "
            f"{shown(key)}): {first}give --rounding stochastic, or {remedies[kind]}"
        )
    return warnings


def plan_shard(
    name: str, steps: Sequence[Step], header: Header, *, keep_format: bool
) -> OutputFile:
    """One output file of these steps, with quantized weights in their format or as floats; streamed
    if nothing is decoded. `header`: of the base's file."""
    if keep_format and not any(
        (isinstance(step.source, QuantizedWeight) and step.edits) or step.needs_full_tensor
        for step in steps
    ):
        plain = [part for step in steps for part in _stored_steps(step)]
        by_key = {step.key: step for step in plain}
        order = {spec.key: spec.start for spec in header.tensors}
        plain.sort(key=lambda step: order.get(step.key, header.tensors[-1].stop))
        layout = like_base(name, [step.planned for step in plain], header)
        return OutputFile(layout, tuple(by_key[tensor.key] for tensor in layout.tensors))
    tasks = sorted(
        (task for step in steps for task in _tasks(step, keep_format=keep_format)),
        key=lambda task: task.name,
    )
    metadata = header.metadata if keep_format else metadata_of_floats(header.metadata)
    file = OutputFile.computed(name, tasks, metadata or None, safetensors_order=True)
    before = {spec.key: (spec.dtype, spec.shape) for spec in header.tensors}
    after = {stored.key: (stored.dtype, stored.shape) for stored in file.layout.tensors}
    if not keep_format or file.variable_size or before != after:
        return file
    return OutputFile.computed(name, tasks, metadata or None, lay_out=partial(_laid_out_as, header))


def _laid_out_as(
    header: Header, file: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, Any]
) -> ShardLayout:
    """The base's tensors at their positions in its file, with its header."""
    by_key = {stored.key: stored for stored in tensors}
    return like_base(file, [by_key[spec.key] for spec in header.tensors], header)


def plan_laid_out(
    layout: ShardLayout, steps: Sequence[Step], metadata: dict[str, str]
) -> OutputFile:
    """One output file of these float steps, in this order; streamed if no tensor is computed as a
    whole."""
    if not any(step.needs_full_tensor for step in steps):
        return OutputFile(layout, tuple(steps))
    tasks = [task for step in steps for task in _tasks(step, keep_format=False)]
    return OutputFile.computed(layout.file, tasks, metadata)


def plan_shards_of_size(
    steps: Sequence[Step], limit: int, stem: str = "model"
) -> tuple[OutputFile, ...]:
    """Files of at most `limit` bytes for these steps, named by `stem`, quantized weights as
    floats."""
    tasks = [task for step in steps for task in _tasks(step, keep_format=False)]
    sizes = [sum(stored.nbytes for stored in task.max_outputs) for task in tasks]
    return tuple(
        OutputFile.computed(name, group, safetensors_order=True)
        for name, group in grouped(tasks, sizes, limit, stem).items()
    )


def _stored_steps(step: Step) -> list[Step]:
    """The steps of the stored tensors of a step without edits."""
    if not isinstance(step.source, QuantizedWeight):
        return [step]
    return [Step(part.key, part.dtype, part.shape, part) for part in step.source.parts]


def _tasks(step: Step, *, keep_format: bool) -> list[Task]:
    source = step.source
    if step.compensation is not None:
        from adapterkit.core.tasks.quantize import CompensatedStep

        packed = source if keep_format and isinstance(source, QuantizedWeight) else None
        return [CompensatedStep(step.key, step, packed)]
    is_packed = isinstance(source, QuantizedWeight)
    if not is_packed and step.copied and step.key == source.key:
        return [CopiedTensor(step.key, source, step.key)]
    if not is_packed or not keep_format:
        return [EditedTensor(step.key, step)]
    if step.edits:
        return [RequantizedWeight(step.key, step)]
    return [CopiedTensor(part.key, part, part.key) for part in source.parts]
