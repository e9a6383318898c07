"""adapterkit: edit LoRA adapters and model checkpoints as files.

The verbs and LoraConfig are imported on first use, so `import adapterkit` loads neither torch nor
transformers. The exceptions are imported at once.
"""

from typing import TYPE_CHECKING

from adapterkit.core.errors import AdapterkitError as AdapterkitError
from adapterkit.core.errors import Damaged as Damaged
from adapterkit.core.errors import Failed as Failed
from adapterkit.core.errors import Interrupted as Interrupted
from adapterkit.core.errors import MultipleErrors as MultipleErrors
from adapterkit.core.errors import Refused as Refused
from adapterkit.core.errors import Unrecoverable as Unrecoverable
from adapterkit.core.errors import Waiting as Waiting
from adapterkit.doors import VERBS

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterkit.adapters.formats.convert import convert as convert
    from adapterkit.adapters.formats.edit import edit as edit
    from adapterkit.bases.quantized.records.dequantize import dequantize as dequantize
    from adapterkit.bases.quantized.records.loftq import loftq as loftq
    from adapterkit.bases.quantized.records.quantize import quantize as quantize
    from adapterkit.core.merge.verb import merge as merge
    from adapterkit.core.options import Progress as Progress
    from adapterkit.core.plan import Plan as Plan
    from adapterkit.core.receipt import Receipt as Receipt
    from adapterkit.core.verify.verb import verify as verify
    from adapterkit.many.workflows.finish import finish as finish
    from adapterkit.many.workflows.plan_file import write_plan as write_plan
    from adapterkit.many.workflows.rerun import rerun as rerun
    from adapterkit.many.workflows.run import run as run
    from adapterkit.verbs.combine.records.arrow import arrow as arrow
    from adapterkit.verbs.combine.records.combine import combine as combine
    from adapterkit.verbs.combine.records.extract import extract as extract
    from adapterkit.verbs.combine.records.resize import resize as resize
    from adapterkit.verbs.combine.records.subtract import subtract as subtract
    from adapterkit.verbs.fit.verb import fit as fit
    from adapterkit.verbs.init.records import init as init
    from adapterkit.verbs.init.records import rebase as rebase
    from adapterkit.verbs.look.records.check import check as check
    from adapterkit.verbs.look.records.diagnose import diagnose as diagnose
    from adapterkit.verbs.look.records.diff import diff as diff
    from adapterkit.verbs.look.records.inspect import inspect as inspect
    from adapterkit.verbs.look.records.report import report as report
    from adapterkit.verbs.score.compare_verb import compare as compare
    from adapterkit.verbs.score.verb import score as score
    from adapterkit.verbs.shared.lora_config import LoraConfig as LoraConfig
    from adapterkit.verbs.stats.verb import stats as stats

_HOMES = VERBS | {
    "LoraConfig": "verbs.shared.lora_config",
    "Plan": "core.plan",
    "Progress": "core.options",
    "Receipt": "core.receipt",
    "write_plan": "many.workflows.plan_file",
}
_ERRORS = [name for name, value in globals().items() if isinstance(value, type)]
# computed, so that a verb is named once: type checkers read the names above
__all__ = sorted([*_ERRORS, "__version__", *_HOMES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"adapterkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")


def __dir__():
    return __all__
