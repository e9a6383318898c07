"""Keep libraries from printing and fetching what you did not ask for when they are imported.

Your own messages, and all others of these libraries, are printed as before.
"""

import logging
import os
import sys
import warnings

_FETCHES = "bitsandbytes.backends.cpu.ops"
_MESSAGES = {  # logger -> the beginning of what it prints at an import
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    _FETCHES: "Failed to load CPU gemm_4bit_forward",
}
# bitsandbytes asks the Hub for these programs, and computes without them if it finds none
_KERNELS = ("kernels-community/quantization-bitsandbytes", "kernels-community/bitsandbytes-mps")
_NOISY = (  # loggers of torch that print through handlers of torch's own
    "torch.utils._pytree",
    "torch.utils.flop_counter",
    "torch.distributed.elastic.multiprocessing.redirects",
)


def hush() -> None:
    """Drop what torch, torchao and bitsandbytes print at their import, and let bitsandbytes fetch
    no code. USE_HUB_KERNELS=1, the variable of transformers, allows the code."""
    allowed = os.environ.get("USE_HUB_KERNELS", "").upper() in ("1", "ON", "YES", "TRUE")
    for name in _MESSAGES:
        if not (allowed and name == _FETCHES):
            logging.getLogger(name).addFilter(_is_wanted)
    if not allowed:
        paths = os.environ.get("LOCAL_KERNELS", "")
        # the library `kernels` reads a path instead of the Hub; this one is never a folder
        nowhere = [f"{name}={os.devnull}" for name in _KERNELS if name not in paths]
        os.environ["LOCAL_KERNELS"] = ":".join(filter(None, [paths, *nowhere]))


def hush_process() -> None:
    """Do so for a process that runs a command: all warnings of libraries stay off stderr, so that
    the first line there is ours, and transformers fetches no kernels either.

    What you ask for with PYTHONWARNINGS, TORCH_LOGS, TRANSFORMERS_VERBOSITY or USE_HUB_KERNELS
    stays.
    """
    hush()
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:  # prints for libraries without a handler, such as torchao
        logging.lastResort.setLevel(logging.ERROR)
    if "TORCH_LOGS" not in os.environ:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_MESSAGES[record.name])
