"""The command line: parse, call the verb, print. Messages go to stderr, stdout holds only the result."""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from adapterkit import __version__
from adapterkit.errors import AdapterkitError, Interrupted


class Commands(click.Group):
    """Errors of ours become messages and exit status 1; usage errors are click's, status 2; anything else is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        _on_signals(_interrupt)
        try:
            return super().invoke(ctx)
        except AdapterkitError as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(Interrupted("stopped before anything was written"))
        except BrokenPipeError:
            os._exit(1)


def _on_signals(handler: Callable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    _on_signals(_leave)
    raise KeyboardInterrupt


def _leave(*_: Any) -> None:
    """The second signal: at once, whatever the first one is still waiting for."""
    os.write(2, b"Error: stopped at once\n  what to do: run the same command with --resume\n")
    os._exit(1)


def _fail(error: AdapterkitError) -> None:
    text = f"Error: {error}"
    if isinstance(error, Interrupted) and error.do:
        words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
        text += f"\n  adapterkit {shlex.join(words)} --resume"
    click.echo(text, err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread may still be waiting for the disk; there is nothing left that it could do
    os._exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version")
def main() -> None:
    """Surgery on adapter and model checkpoints, done on the files: exact, streamed, accounted for.

    \b
    A source is a folder, a .safetensors file, or a Hub id org/name[@revision][:subfolder].
    An adapter may carry a weight: PATH=0.7 (default 1, negative allowed).
    Exit status: 0 done; 1 refused or failed, with a message; 2 wrong usage.
    """


def writing(command: Callable) -> Callable:
    """The options that every writing command has."""
    options = [
        click.option("--out", required=True, type=click.Path(), metavar="DIR", help="Folder to make: all of it or nothing."),
        click.option("--dry-run", is_flag=True, help="Print the plan (tensors, bytes, memory, disk) and stop."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]", help="Where to compute."),
        click.option("--engine", type=click.Choice(["local"]), default="local", show_default=True, help="Where steps run."),
        click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same job."),
        click.option("--overwrite", is_flag=True, help="Replace an older output of adapterkit in DIR."),
        click.option("--quiet", is_flag=True, help="No progress, no summary."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=W]...")
@writing
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Cast floating tensors (default: keep the base's).")
@click.option("--max-shard-size", metavar="SIZE", help="Cut the weights anew, e.g. 5GB (default: the base's own files).")
@click.option("--include", metavar="RE", help="Only modules in which this regular expression is found.")
@click.option("--exclude", metavar="RE", help="Not the modules in which this regular expression is found.")
@click.option(
    "--tied",
    type=click.Choice(["untie", "fold", "refuse"]),
    default="untie",
    show_default=True,
    help="When only one of two tied embeddings changes: make them two, change both (as PEFT does in memory), or refuse.",
)
@click.option("--base-is-residual", is_flag=True, help="BASE is the changed base of a PiSSA-like adapter.")
@click.option("--compat", type=click.Choice(["peft"]), help="PEFT's roundings, and its order of several adapters.")
@click.option("--expert-layout", type=click.Choice(["peft-0.18", "peft-0.19"]), help="Who wrote square expert factors.")
@click.option(
    "--tokenizer",
    type=click.Choice(["base", "adapter"]),
    help="Whose tokenizer (default: the adapter's, if it has one).",
)
@click.option("--hash", type=click.Choice(["sha256", "none"]), default="sha256", show_default=True, help="Hash the output.")
@click.option("--verify", is_flag=True, help="Read the output again: every hash, and sampled rows recomputed in float64.")
@click.option("--push", metavar="REPO", help="Upload the output to this Hub repository, in one commit.")
def merge(base: str, adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **options: Any) -> None:  # fmt: skip
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a).

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit merge ./base ./style=0.7 ./skill=0.3 --out merged --verify
      adapterkit merge ./merged ./my-adapter=-1 --out back        # take it out again
    """
    from adapterkit.ops.merge import merge as verb
    from adapterkit.plan import Plan

    with _Bar(quiet or options["dry_run"]) as bar:
        result = verb(base, adapters, out=out, progress=bar, **options)
    if isinstance(result, Plan):
        _print_plan(result, as_json)
    elif as_json:
        click.echo(json.dumps(result.data, indent=1, ensure_ascii=False))
    elif not quiet:
        _print_receipt(result)


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--base", help="The base it was made from: rows of the output are recomputed in float64.")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER", help="The adapters, in the order of the merge.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def verify(folder: str, base: str | None, adapters: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Check an output against its receipt: every hash, every key, and with its inputs at hand the arithmetic.

    \b
    Example:
      adapterkit verify merged
      adapterkit verify merged --base ./base --adapter ./my-adapter
    """
    from adapterkit.ops.verify import verify as verb

    with _Bar(quiet) as bar:
        result = verb(folder, base=base, adapters=adapters, progress=bar)
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
    elif not quiet:
        click.echo(f"{result['files']} files, {result['bytes']:,} bytes: as the receipt says", err=True)
        if result["rows"]:
            click.echo(f"{result['rows']} rows of {result['tensors']} tensors recomputed in float64: equal", err=True)


class _Bar:
    """Progress in bytes with an ETA on a terminal; nothing elsewhere. Called from several threads."""

    def __init__(self, hidden: bool):
        self.hidden, self.bar, self.lock = hidden or not sys.stderr.isatty(), None, threading.Lock()

    def __enter__(self) -> "_Bar":
        if not self.hidden:
            from tqdm import tqdm

            self.bar = tqdm(unit="B", unit_scale=True, unit_divisor=1000, leave=False)
        return self

    def expect(self, total: int) -> None:
        if self.bar is not None:
            self.bar.total = total
            self.bar.refresh()

    def __call__(self, done: int) -> None:
        if self.bar is not None:
            with self.lock:
                self.bar.update(done)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _print_plan(plan: Any, as_json: bool) -> None:
    totals = plan.totals()
    if as_json:
        changed = [
            {"key": s.key, "dtype": s.dtype, "shape": list(s.shape), "file": shard.file, "adapters": list(s.adapters)}
            for shard in plan.shards for s in shard.steps if not s.copied
        ]  # fmt: skip
        document = {
            "plan": 1,
            **plan.recipe(),
            "totals": totals,
            "changed": changed,
            "notes": list(plan.notes),
            **plan.facts,
        }
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    for name, value in totals.items():
        click.echo(f"{name.replace('_', ' '):16} {value:>18,}")
    for note in plan.notes:
        click.echo(f"note: {note}")
    for name in plan.facts.get("left_out", []):
        click.echo(f"left out: {name}")


def _print_receipt(receipt: Any) -> None:
    data = receipt.data
    if receipt.finished_before:
        click.echo(f"{receipt.out}: finished before, nothing to do", err=True)
        return
    totals = data["totals"]
    click.echo(
        f"{receipt.out}: {totals['tensors_changed']} of {totals['tensors']} tensors changed, "
        f"{totals['bytes_written']:,} bytes in {data['timings']['seconds']:.1f} s",
        err=True,
    )
    for note in data["notes"]:
        click.echo(f"note: {note}", err=True)
    for name in data.get("left_out", []):
        click.echo(f"left out: {name}", err=True)
    lost = [k for k, f in data["parameters"].items() if f.get("changed", 1) < 0.01 and f.get("delta", 0) > 0]
    if lost:
        click.echo(
            f"warning: in {len(lost)} tensors (first {lost[0]}) under 1 % of the sampled values changed: "
            "the delta is below the dtype's resolution there; --dtype fp32 keeps it",
            err=True,
        )
