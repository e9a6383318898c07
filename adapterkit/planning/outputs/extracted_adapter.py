"""The adapter of an extraction: a config whose targets may be parameters, and keys that depend on
which modules have factors."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from adapterkit.adapters.adapter_config import rank_settings
from adapterkit.adapters.keys import factor_keys, value_key
from adapterkit.errors import Unrecoverable
from adapterkit.plan import Change, Finalize, Task, TaskResult, unchanged
from adapterkit.planning.outputs.adapter import Output
from adapterkit.planning.outputs.folder_files import as_json
from adapterkit.tasks.difference import DifferenceFactors, WholeParameter
from adapterkit.tasks.truncate import Truncation, finalize_by_size

# PEFT's word for an adapter without factors: an empty list is an error there
NO_MODULES = "dummy-target-modules"


@dataclass(frozen=True)
class ExtractedAdapter(Output):
    """An adapter some of whose targets are parameters: stacks of experts, routers."""

    all_modules: frozenset[str] = frozenset()  # of the model

    def config(self, metrics: dict[str, dict], grown: int = 0) -> bytes:
        """adapter_config.json for the ranks in the metrics; `Unrecoverable` where the adapter is
        empty."""
        ranks = {
            target: metrics[name]["rank"]
            for name, target in self.modules.items()
            if "rank" in metrics[name]
        }
        if not ranks and not any("taken" in metric for metric in metrics.values()):
            raise Unrecoverable(
                "no weight differs",
                expected="a fine-tune",
                where="BASE and TUNED",
                hint="check the two paths",
            )
        parameters = sorted(ranks.keys() & self.parameters)
        modules = self.target_modules(ranks.keys() - self.parameters) if ranks else NO_MODULES
        config = (self.base_settings or {}) | self.settings | {"target_modules": modules}
        config |= {"target_parameters": parameters} if parameters else {}
        # PEFT matches a pattern with the parameter's name, merge with the module's where it is its
        # weight
        by_pattern = {
            re.sub(r"\.weight$", r"(\\.weight)?", target): rank for target, rank in ranks.items()
        }
        return as_json(config | rank_settings(by_pattern))

    def target_modules(self, modules: Collection[str]) -> list[str] | str:
        """target_modules that match these modules alone: a name in a list matches every module
        whose path ends with it."""
        others = self.all_modules.difference(modules)
        if any(suffix in modules for other in others for suffix in _suffixes(other)):
            return "|".join(re.escape(module) for module in sorted(modules))
        return sorted(modules)


def _suffixes(path: str) -> Iterator[str]:
    """The parts of a path after each of its dots."""
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def prefixes(path: str) -> list[str]:
    """The modules of a dotted path, from the outermost to the path itself."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def finalize_extraction(
    truncation: Truncation, tasks: Sequence[Task], made_for: str
) -> Finalize | None:
    """Give each module its share of the size, and keys that depend on which modules have factors.

    PEFT wraps a module with factors, and calls what it wraps `base_layer`; it wraps a module's
    parameters in their order, so that the last one's wrapper is the outermost.
    """
    by_size = finalize_by_size(truncation, tasks, made_for) if truncation.max_size else None
    targets = Counter(task.module for task in tasks if isinstance(task, DifferenceFactors))
    if all(_has_fixed_keys(task, targets) for task in tasks):
        return by_size
    return partial(_finalize_keys, by_size, tasks)


def _finalize_keys(
    by_size: Finalize | None, tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    changes = by_size(metrics) if by_size else [unchanged] * len(tasks)
    wrappers = Counter(
        task.module
        for task, metric in zip(tasks, metrics, strict=True)
        if isinstance(task, DifferenceFactors) and "rank" in metric
    )
    depths: Counter[str] = Counter()  # wrappers around the module's next factors
    last_first = []
    for task, metric, change in reversed(list(zip(tasks, metrics, changes, strict=True))):
        if isinstance(task, DifferenceFactors) and "rank" in metric:
            keys = factor_keys(task.module, wrappers, depths[task.module])
            renamed = dict(zip((task.place.a_key, task.place.b_key), keys, strict=True))
            change = partial(_rename, change, renamed)
            depths[task.module] += 1
        elif isinstance(task, WholeParameter):
            lone = task.only_beside_factors and not wrappers[task.parameter.rpartition(".")[0]]
            key = value_key(task.parameter, wrappers)
            change = _drop if lone else partial(_rename, change, {task.key: key})
        last_first.append(change)
    return last_first[::-1]


def _has_fixed_keys(task: Task, targets: Mapping[str, int]) -> bool:
    """Whether a task's keys do not depend on which of the modules `targets` have factors."""
    if isinstance(task, DifferenceFactors):
        around = prefixes(task.module)[:-1]
        return targets[task.module] == 1 and not any(path in targets for path in around)
    if isinstance(task, WholeParameter):
        return not any(path in targets for path in prefixes(task.parameter))
    return True


def _drop(result: TaskResult) -> TaskResult:
    return TaskResult({}, {})


def _rename(change: Change, keys: dict[str, str], result: TaskResult) -> TaskResult:
    result = change(result)
    tensors = {keys[key]: tensor for key, tensor in result.tensors.items()}
    return TaskResult(tensors, result.metrics)
