"""adapterkit: surgery on adapter and model checkpoints, done on the files.

The verbs are imported on first use, so `import adapterkit` loads neither torch nor transformers. Their errors are here too.
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
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterkit.ops.arrow import arrow
    from adapterkit.ops.combine import combine
    from adapterkit.ops.dequantize import dequantize
    from adapterkit.ops.diff import diff
    from adapterkit.ops.extract import extract
    from adapterkit.ops.init import init
    from adapterkit.ops.inspect import inspect
    from adapterkit.ops.loftq import loftq
    from adapterkit.ops.merge import merge
    from adapterkit.ops.quantize import quantize
    from adapterkit.ops.rebase import rebase
    from adapterkit.ops.resize import resize
    from adapterkit.ops.subtract import subtract
    from adapterkit.ops.verify import verify

__all__ = [
    "AdapterkitError",
    "Damaged",
    "Failed",
    "Interrupted",
    "MultipleErrors",
    "Refused",
    "Unrecoverable",
    "__version__",
    "arrow",
    "combine",
    "dequantize",
    "diff",
    "extract",
    "init",
    "inspect",
    "loftq",
    "merge",
    "quantize",
    "rebase",
    "resize",
    "subtract",
    "verify",
]


def __getattr__(name: str):
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"adapterkit.ops.{name}"), name)
    raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
