"""The command line: parse, call the verb, print. Messages go to stderr, results to stdout."""

import atexit
import gc
import os

import click

from adapterkit import __version__
from adapterkit.cli import output, signals
from adapterkit.cli.commands import SECTIONS, command_named, summary_of
from adapterkit.cli.group import Group
from adapterkit.core import libraries


def process() -> None:
    """Run the command line as a process of its own, with fewer garbage collections.

    The collector would walk torch's million objects repeatedly during the import and once more at
    exit: 0.4 s of each command.
    """
    signals.exit_at_once()
    output.never_fail()
    libraries.hush_process()
    gc.set_threshold(100_000, 50, 50)
    if os.environ.get("ADAPTERKIT_FSYNC") == "0":  # for measuring only: what durability costs
        from adapterkit.core.checkpoint import disk

        disk.DURABLE = False
    atexit.register(gc.freeze)
    signals.own_process = True
    try:
        # on Windows click would take regular expressions for patterns of files
        main(windows_expand_args=False)
    finally:
        signals.ignore_after_work()


@click.group(
    cls=Group,
    sections=SECTIONS,
    make=command_named,
    summary=summary_of,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "--version")
def main() -> None:
    """Edit LoRA adapters and model checkpoints on disk.

    A merge streams the model from disk to disk, so memory does not grow with its size. Every output
    appears when it is complete, with checksums.

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit inspect ./my-adapter
      adapterkit merge --help

    \b
    A BASE or an ADAPTER is a folder, a .safetensors or .gguf file, or a Hub id
    org/name[@revision][:folder or file]. ADAPTER=0.7 gives an adapter a weight
    (default 1; it may be negative).

    \b
    Exit status: 0 done; 1 refused or failed, with a message; 2 wrong usage.
    run also exits with 3 if it timed out while it waited for other workers.
    diff exits with 0 if the sources are the same, 1 if they differ, 2 otherwise.
    """
