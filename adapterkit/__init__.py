"""adapterkit: surgery on adapter and model checkpoints, done on the files.

The verbs and LoraConfig are imported on first use, so `import adapterkit` loads neither torch nor
transformers. Their errors are here too.
"""

from typing import TYPE_CHECKING

from adapterkit.errors import (
    AdapterkitError,
    Damaged,
    Failed,
    Interrupted,
    MultipleErrors,
    Refused,
    Unrecoverable,
    Waiting,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterkit.adapters.lora_config import LoraConfig
    from adapterkit.jobs.finish import finish
    from adapterkit.jobs.plan_file import write_plan
    from adapterkit.jobs.run import run
    from adapterkit.verbs.arrow import arrow
    from adapterkit.verbs.combine import combine
    from adapterkit.verbs.convert import convert
    from adapterkit.verbs.dequantize import dequantize
    from adapterkit.verbs.diff import diff
    from adapterkit.verbs.extract import extract
    from adapterkit.verbs.init import init
    from adapterkit.verbs.inspect import inspect
    from adapterkit.verbs.loftq import loftq
    from adapterkit.verbs.merge import merge
    from adapterkit.verbs.quantize import quantize
    from adapterkit.verbs.rebase import rebase
    from adapterkit.verbs.resize import resize
    from adapterkit.verbs.stats import stats
    from adapterkit.verbs.subtract import subtract
    from adapterkit.verbs.verify import verify

__all__ = [
    "AdapterkitError",
    "Damaged",
    "Failed",
    "Interrupted",
    "LoraConfig",
    "MultipleErrors",
    "Refused",
    "Unrecoverable",
    "Waiting",
    "__version__",
    "arrow",
    "combine",
    "convert",
    "dequantize",
    "diff",
    "extract",
    "finish",
    "init",
    "inspect",
    "loftq",
    "merge",
    "quantize",
    "rebase",
    "resize",
    "run",
    "stats",
    "subtract",
    "verify",
    "write_plan",
]


_HOMES = {
    "LoraConfig": "adapters.lora_config",
    "finish": "jobs.finish",
    "run": "jobs.run",
    "write_plan": "jobs.plan_file",
}


def __getattr__(name: str):
    if name in __all__:
        from importlib import import_module

        home = _HOMES.get(name, f"verbs.{name}")
        return getattr(import_module(f"adapterkit.{home}"), name)
    raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
