"""adapterkit: surgery on adapter and model checkpoints, done on the files.

The verbs and LoraConfig are imported on first use, so `import adapterkit` loads neither torch nor
transformers. Their errors are here too.
"""

from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError as AdapterkitError
from adapterkit.errors import Damaged as Damaged
from adapterkit.errors import Failed as Failed
from adapterkit.errors import Interrupted as Interrupted
from adapterkit.errors import MultipleErrors as MultipleErrors
from adapterkit.errors import Refused as Refused
from adapterkit.errors import Unrecoverable as Unrecoverable
from adapterkit.errors import Waiting as Waiting
from adapterkit.verbs import HOMES

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterkit.adapters.lora_config import LoraConfig as LoraConfig
    from adapterkit.jobs.finish import finish as finish
    from adapterkit.jobs.plan_file import write_plan as write_plan
    from adapterkit.jobs.run import run as run
    from adapterkit.options import Progress as Progress
    from adapterkit.plan import Plan as Plan
    from adapterkit.receipt import Receipt as Receipt
    from adapterkit.verbs.arrow import arrow as arrow
    from adapterkit.verbs.check import check as check
    from adapterkit.verbs.combine import combine as combine
    from adapterkit.verbs.convert import convert as convert
    from adapterkit.verbs.dequantize import dequantize as dequantize
    from adapterkit.verbs.diagnose import diagnose as diagnose
    from adapterkit.verbs.diff import diff as diff
    from adapterkit.verbs.edit import edit as edit
    from adapterkit.verbs.extract import extract as extract
    from adapterkit.verbs.fit import fit as fit
    from adapterkit.verbs.init import init as init
    from adapterkit.verbs.inspect import inspect as inspect
    from adapterkit.verbs.loftq import loftq as loftq
    from adapterkit.verbs.merge import merge as merge
    from adapterkit.verbs.quantize import quantize as quantize
    from adapterkit.verbs.rebase import rebase as rebase
    from adapterkit.verbs.report import report as report
    from adapterkit.verbs.rerun import rerun as rerun
    from adapterkit.verbs.resize import resize as resize
    from adapterkit.verbs.stats import stats as stats
    from adapterkit.verbs.subtract import subtract as subtract
    from adapterkit.verbs.verify import verify as verify

_RECORDS = {"LoraConfig": "adapters.lora_config", "Plan": "plan", "Receipt": "receipt"}
_HOMES = HOMES | _RECORDS | {"Progress": "options", "write_plan": "jobs.plan_file"}
_ERRORS = [name for name, value in globals().items() if isinstance(value, type)]
# computed, so that a verb is told once: type checkers take the names above
__all__ = sorted([*_ERRORS, "__version__", *_HOMES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"adapterkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")


def __dir__():
    return __all__
