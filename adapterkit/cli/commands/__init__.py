"""The commands, by section of the help."""

from adapterkit.cli.commands.adapters import arrow, combine, rebase, resize, subtract
from adapterkit.cli.commands.checkpoints import extract, init, merge
from adapterkit.cli.commands.convert import convert
from adapterkit.cli.commands.jobs import finish, run
from adapterkit.cli.commands.look import diff, inspect, verify
from adapterkit.cli.commands.quantized import dequantize, loftq, quantize
from adapterkit.cli.commands.statistics import stats
from adapterkit.cli.completion import completion

SECTIONS = {
    "Models": (merge, extract, init, stats),
    "Adapters": (convert, combine, subtract, arrow, resize, rebase),
    "Quantization": (quantize, dequantize, loftq),
    "Plan files and pipelines": (run, finish),
    "Inspection": (inspect, diff, verify),
    "Shell": (completion,),
}
