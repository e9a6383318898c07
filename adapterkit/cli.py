"""The command line: parse, call the verb, print. Messages go to stderr, stdout holds only the result."""

import atexit
import gc
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import click

from adapterkit import __version__
from adapterkit.errors import AdapterkitError, Interrupted
from adapterkit.options import CHOICES


def process() -> None:
    """The command line as a process of its own. The garbage collector walks torch's million objects again and again while
    torch is imported, and once more at exit: less of that is 0.4 s less of each command."""
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    try:
        main()
    finally:
        _on_signals(
            signal.SIG_IGN
        )  # the work is done: in what Python still does, an exception ends in an abort


BEFORE = Interrupted("stopped before anything was written", hint="run the same command again")
TROUBLE = {
    "diff": 2
}  # exit status of an error: 1 elsewhere, but from diff 1 is an answer, as from diff(1)


class Commands(click.Group):
    """Errors of ours become messages and exit status 1 (`TROUBLE`); usage errors are click's, status 2; the rest are bugs, with
    their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        _on_signals(_interrupt)
        try:
            return super().invoke(ctx)
        except AdapterkitError as error:
            _fail(error, _trouble(ctx))
        except KeyboardInterrupt:
            _fail(BEFORE, _trouble(ctx))
        except BrokenPipeError:
            os._exit(_trouble(ctx))
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if _interrupted:  # a library that was being imported has swallowed the interrupt, and cannot be imported again
                _fail(BEFORE, _trouble(ctx))
            if _trouble(ctx) == 1:  # as Python's own
                raise
            traceback.print_exc()
            ctx.exit(_trouble(ctx))


def _trouble(ctx: click.Context) -> int:
    return TROUBLE.get(ctx.invoked_subcommand or "", 1)


def _on_signals(handler: Callable | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


_interrupted: list[int] = []  # the signals that came


def _interrupt(number: int, *_: Any) -> None:
    _interrupted.append(number)
    _on_signals(_leave)
    if _importing():  # an exception would abort inside of torch; what a job has finished is kept
        _fail(
            Interrupted(
                "stopped while libraries were loaded", hint="run the same command with --resume"
            ),
            _status(),
        )
    raise KeyboardInterrupt


def _leave(*_: Any) -> None:
    """The second signal: at once, whatever the first one is still waiting for."""
    os.write(2, b"Error: stopped at once\n  hint: run the same command with --resume\n")
    os._exit(_status())


def _status() -> int:
    context = click.get_current_context(silent=True)
    return _trouble(context.find_root()) if context else 1


def _importing() -> bool:
    """Whether a module is being loaded."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _fail(error: AdapterkitError, status: int) -> None:
    text = f"Error: {error}"
    if isinstance(error, Interrupted) and "--resume" in error.hint:
        words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
        text += f"\n  adapterkit {shlex.join(words)} --resume"
    click.echo(text, err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread may still be waiting for the disk; there is nothing left that it could do
    os._exit(status)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, "--version")
def main() -> None:
    """Surgery on adapter and model checkpoints, done on the files: exact, streamed, accounted for.

    \b
    A source is a folder, a .safetensors file, or a Hub id org/name[@revision][:subfolder].
    An adapter may carry a weight: PATH=0.7 (default 1, negative allowed).
    Exit status: 0 done; 1 refused or failed, with a message; 2 wrong usage. diff: 0 same; 1 different; 2 all else.
    """


# -- options that several commands have -------------------------------------------------------------------------------------


def together(*options: Callable) -> Callable:
    """Several options as one decorator, in the order of the help."""

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


tokenizer = click.option(
    "--tokenizer",
    type=click.Choice(CHOICES["tokenizer"]),
    help="Whose tokenizer (default: the adapters', if they have one); base: none is copied from them.",
)


def refit(otherwise: str = "") -> Callable:
    """The rank of results that are exact, or of the method's own rank, without; `otherwise` says which in the help."""
    return together(
        click.option("--rank", type=int, help=f"Refit each module to this rank{otherwise}."),
        click.option(
            "--energy",
            type=float,
            help="Refit each module to the smallest rank that keeps this share of its energy.",
        ),
    )


def targets(default: str) -> Callable:
    """Which modules get factors."""
    said = f"Modules that get factors: all-linear, ends of their names (q_proj,v_proj), or a regex (default: {default})."
    return click.option("--targets", metavar="NAMES|RE", help=said)


json_output = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
)
writing = together(
    click.option(
        "--out",
        required=True,
        type=click.Path(),
        metavar="DIR",
        help="Folder to make: all of it or nothing.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Print the plan (tensors, bytes, memory, disk) and stop."
    ),
    json_output,
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:i]",
        help="Where to compute.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        help="For weights that are computed at a time, e.g. 8GB (default: a quarter of the RAM).",
    ),
    click.option(
        "--engine",
        type=click.Choice(CHOICES["engine"]),
        default="local",
        show_default=True,
        help="Where steps run.",
    ),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same job."),
    click.option("--overwrite", is_flag=True, help="Replace an older output of adapterkit in DIR."),
    click.option("--quiet", is_flag=True, help="No progress, no summary."),
)
started = together(
    click.option("--rank", type=int, required=True, help="Of the factors."),
    click.option(
        "--alpha", type=float, help="lora_alpha (default: the rank, so that the scale is 1)."
    ),
    click.option("--rslora", is_flag=True, help="The scale is alpha / sqrt(rank)."),
)
blocks = together(
    click.option(
        "--block-size", type=int, help="Values with one scale (nf4, fp4: 64; w4a16: 128)."
    ),
    click.option("--double-quant", is_flag=True, help="Quantize the scales too (nf4, fp4)."),
)
hashing = click.option(
    "--hash",
    type=click.Choice(CHOICES["hash"]),
    default="sha256",
    show_default=True,
    help="Hash the output.",
)
DTYPES = click.Choice(CHOICES["dtype"])
factors = together(
    click.option("--dtype", type=DTYPES, default="fp32", show_default=True, help="Of the factors."),
    hashing,
)
cut = together(
    click.option("--rank", type=int, help="This rank in each module."),
    click.option(
        "--energy",
        type=float,
        help="The smallest rank of each module that keeps this share of its energy.",
    ),
    click.option(
        "--sv-ratio",
        type=float,
        help="Singular values of at least the largest one divided by this.",
    ),
    click.option(
        "--max-size",
        metavar="SIZE",
        help="A file of at most this size, e.g. 50MB: ranks go to the largest singular values.",
    ),
)
only_modules = together(
    click.option(
        "--include", metavar="RE", help="Only modules in which this regular expression is found."
    ),
    click.option(
        "--exclude", metavar="RE", help="Not the modules in which this regular expression is found."
    ),
)
TARGETS = "nf4, fp4, int8 (bitsandbytes), fp8 (blocks of 128 x 128), w4a16, w8a16 (compressed-tensors), mxfp4."
ADDED_UP = " (default: exact, the ranks add up)"


# -- commands ---------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=W]...")
@writing
@click.option("--dtype", type=DTYPES, help="Cast floating tensors (default: keep the base's).")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Cut the weights anew, e.g. 5GB (default: the base's own files).",
)
@only_modules
@click.option(
    "--tied",
    type=click.Choice(CHOICES["tied"]),
    default="untie",
    show_default=True,
    help="When only one of two tied embeddings changes: make them two, change both (as PEFT does in memory), or refuse.",
)
@click.option(
    "--base-is-residual", is_flag=True, help="BASE is the changed base of a PiSSA-like adapter."
)
@click.option(
    "--base-copies",
    type=click.Choice(CHOICES["base_copies"]),
    help="What counts where an adapter's copy of the base's embedding is of another base: BASE's own weight, or the copy.",
)
@click.option(
    "--compat",
    type=click.Choice(CHOICES["compat"]),
    help="PEFT's roundings, and its order of several adapters.",
)
@click.option(
    "--expert-layout",
    type=click.Choice(CHOICES["expert_layout"]),
    help="Who wrote square expert factors.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(CHOICES["tokenizer"]),
    help="Whose tokenizer (default: the adapter's, if it has one).",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Write a quantized base's weights as 16-bit floats (default: keep the format).",
)
@click.option(
    "--base16",
    metavar="ORIGINAL",
    help="BASE is quantized, and was trained on: merge into its 16-bit original instead.",
)
@click.option(
    "--rounding",
    type=click.Choice(CHOICES["rounding"]),
    default="nearest",
    show_default=True,
    help="Of changed weights; stochastic: up or down at random, so that on average the whole delta stays.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of stochastic rounding: same seed, same bytes.",
)
@hashing
@click.option(
    "--verify",
    is_flag=True,
    help="Read the output again: every hash, and rows of each changed tensor recomputed.",
)
@click.option(
    "--push", metavar="REPO", help="Upload the output to this Hub repository, in one commit."
)
def merge(base: str, adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **options: Any) -> None:  # fmt: skip
    """Merge adapters into a base checkpoint: W' = round(W + Σ weight·scale·b@a).

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit merge ./base ./style=0.7 ./skill=0.3 --out merged --verify
      adapterkit merge ./merged ./my-adapter=-1 --out back        # take it out again
    """
    from adapterkit.ops.merge import merge as verb

    _carry(verb, base, adapters, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("base")
@writing
@click.option("--to", required=True, metavar="FORMAT", help=TARGETS)
@blocks
@click.option(
    "--skip",
    metavar="RE",
    help="Leave the modules alone in which this regular expression is found.",
)
@hashing
def quantize(base: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Quantize a checkpoint's linear layers, as transformers would: the output layer, embeddings and norms stay.

    \b
    Example:
      adapterkit quantize ./model --to nf4 --double-quant --out model-nf4
      adapterkit quantize ./model --to int8 --skip 'layers.0[.]' --out model-int8
    """
    from adapterkit.ops.quantize import quantize as verb

    _carry(verb, base, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("base")
@writing
@click.option(
    "--dtype",
    type=DTYPES,
    help="Of the decoded weights (default: what the format's library computes in).",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Cut the weights anew, e.g. 5GB (default: the base's own files).",
)
@hashing
def dequantize(base: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Decode a quantized checkpoint, or a GGUF model file, into floats.

    \b
    Example:
      adapterkit dequantize ./model-nf4 --dtype bf16 --out model-bf16
      adapterkit dequantize ./model.Q4_K_M.gguf --out model            # needs adapterkit[gguf]
    """
    from adapterkit.ops.dequantize import dequantize as verb

    _carry(verb, base, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("base")
@writing
@click.option(
    "--method", required=True, metavar="NAME", help="pissa: the principal part of each weight."
)
@started
@targets("all linear layers but the output")
@click.option(
    "--quantize", metavar="FORMAT", help="Quantize what is left of the base, e.g. nf4 (QPiSSA)."
)
@click.option("--skip", metavar="RE", help="Modules that are not quantized.")
@blocks
@factors
def init(base: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Initialise an adapter from its base's weights: DIR/adapter takes a part of them, DIR/base keeps the rest.

    \b
    Example:
      adapterkit init ./model --method pissa --rank 16 --out pissa
      adapterkit init ./model --method pissa --rank 16 --quantize nf4 --double-quant --out qpissa
    """
    from adapterkit.ops.init import init as verb

    _carry(verb, base, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("base")
@writing
@started
@click.option(
    "--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="nf4, or int8."
)
@click.option(
    "--bits-for",
    metavar="RE=N",
    multiple=True,
    help="Other bits for modules; all is compressed-tensors then.",
)
@click.option(
    "--iterations", type=int, default=4, show_default=True, help="Rounds; the best one is kept."
)
@targets("all that are quantized")
@click.option("--skip", metavar="RE", help="Modules that are not quantized.")
@blocks
@click.option(
    "--quantized",
    metavar="QBASE",
    help="Keep this quantized base of BASE; write the adapter for it alone.",
)
@click.option(
    "--stats",
    metavar="FILE",
    help="Covariances of the modules' inputs: errors count by what they do to outputs.",
)
@click.option(
    "--accept",
    metavar="CMD",
    help="Ask `CMD MODULE FACTORS` of each module if its factors stay (0 yes, 1 no).",
)
@factors
def loftq(base: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Quantize a base together with the adapter that makes up for it: W ≈ Q + scale·b@a (LoftQ).

    DIR/base is the packed base, DIR/adapter the adapter to go on training.

    \b
    Example:
      adapterkit loftq ./model --rank 16 --out loftq
      adapterkit loftq ./model --rank 16 --bits-for 'down_proj|layers.0[.]=8' --out loftq
      adapterkit loftq ./model --quantized ./model-nf4 --rank 16 --out adapter
    """
    from adapterkit.ops.loftq import loftq as verb

    _carry(verb, base, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=W]...")
@writing
@click.option(
    "--base",
    metavar="BASE",
    help="The model of the adapters: for DoRAs, and where target_parameters are not told apart.",
)
@click.option(
    "--method",
    required=True,
    metavar="NAME",
    help="How the deltas are put together; see the list below.",
)
@click.option(
    "--space",
    type=click.Choice(CHOICES["space"]),
    default="delta",
    show_default=True,
    help="What the method acts on: the deltas scale*b@a, or a and b apart (PEFT's arithmetic, with its cross terms).",
)
@refit()
@click.option(
    "--density",
    type=float,
    help="Share of the elements that is kept (ties, dare, magnitude_prune, ...).",
)
@click.option(
    "--majority", type=click.Choice(CHOICES["majority"]), help="How signs are elected (ties)."
)
@click.option(
    "--svd-clamp",
    type=float,
    metavar="Q",
    help="Hold the factors below this quantile of their elements, as PEFT does.",
)
@click.option(
    "--weight-for",
    multiple=True,
    metavar="[N:]REGEX=W",
    help="Another weight (of the N-th adapter) where REGEX is found.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Another option of the method."
)
@click.option("--seed", type=int, default=0, show_default=True, help="For methods that draw.")
@tokenizer
@factors
def combine(
    adapters: tuple[str, ...],
    out: str,
    as_json: bool,
    quiet: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Combine adapters into one: Δ' = method(w₁Δ₁, w₂Δ₂, ...), written as factors of scale 1.

    \b
    Methods on factors (exact unless --rank or --energy is given):
      linear mean ema slerp karcher knots tsv iso_c
    Methods on elements (refitted to the largest rank of the inputs unless --rank or --energy is given):
      ties dare_linear dare_ties magnitude_prune della breadcrumbs sce
    Of slerp the weights say where on the arc: 0.7 and 0.3, or --set t=0.3.
    PEFT's names, and what they stand for:
      svd                    linear, refitted to the largest rank
      cat                    linear, exact
      ties_svd               ties             dare_linear_svd      dare_linear
      dare_ties_svd          dare_ties        magnitude_prune_svd  magnitude_prune
      linear, ties, ... of PEFT, which act on a and b apart: --method linear --space factors, ...

    \b
    Example:
      adapterkit combine ./english ./french=0.5 --method linear --out both
      adapterkit combine ./a ./b ./c --method ties --density 0.2 --rank 32 --out merged
    """
    from adapterkit.ops.combine import combine as verb

    _carry(
        verb,
        adapters,
        out=out,
        as_json=as_json,
        quiet=quiet,
        settings=_settings(settings),
        **options,
    )


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--general",
    multiple=True,
    required=True,
    metavar="ADAPTER",
    help="What all tasks share; may be given again.",
)
@writing
@click.option(
    "--base",
    metavar="BASE",
    help="The adapters' model, where target_parameters are not told apart without.",
)
@click.option(
    "--space",
    type=click.Choice(CHOICES["space"]),
    default="delta",
    show_default=True,
    help="Subtract the deltas (exact), or the means of a and b apart, as PEFT does.",
)
@click.option(
    "--exclude",
    metavar="RE",
    help="Subtract nothing where this is found in a module's name: the task's stays.",
)
@refit(ADDED_UP)
@tokenizer
@factors
def subtract(
    adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Subtract the mean of general adapters from task adapters (GenKnowSub): Δ' = Δ - mean Δ_general.

    \b
    Example:
      adapterkit subtract ./medicine --general ./english --general ./french --out medicine-only
      adapterkit subtract ./law ./medicine --general ./english --rank 16 --out purified   # purified/law, purified/medicine
    """
    from adapterkit.ops.subtract import subtract as verb

    _carry(verb, adapters, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--general",
    multiple=True,
    metavar="ADAPTER",
    help="Subtracted from all experts first; may be given again.",
)
@writing
@click.option(
    "--top-k", type=int, help="Experts for each token (default: 3, or as many as there are)."
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Of the softmax over the chosen experts.",
)
@click.option(
    "--compat",
    type=click.Choice(CHOICES["compat"]),
    help="PEFT's power iteration for prototypes, and its subtraction.",
)
@click.option("--seed", type=int, help="For --compat peft (default 0).")
@factors
def arrow(adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Stack adapters as experts with the prototypes that route tokens to them (Arrow).

    \b
    Example:
      adapterkit arrow ./law ./medicine ./code --out experts
      adapterkit arrow ./law ./medicine ./code --general ./english --top-k 2 --out experts
    """
    from adapterkit.ops.arrow import arrow as verb

    _carry(verb, adapters, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("base")
@click.argument("tuned")
@writing
@cut
@only_modules
@click.option(
    "--rest",
    type=click.Choice(CHOICES["rest"]),
    default="save",
    show_default=True,
    help="What differs and gets no factors (embeddings, norms, biases): save it whole, leave it out, or refuse.",
)
@factors
def extract(base: str, tuned: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Extract the adapter between a base and its fine-tune: b@a ≈ W_tuned - W_base.

    It is read back, and its merge into the base planned, before it gets its name. Shapes that differ are
    refused, the vocabulary's apart. PEFT loads single parameters that are saved whole (a class token, a
    tied embedding) into the model itself, as it does biases.

    \b
    Example:
      adapterkit extract ./base ./fine-tune --rank 32 --out adapter
      adapterkit extract ./base ./fine-tune --max-size 50MB --out adapter
    """
    from adapterkit.ops.extract import extract as verb

    _carry(verb, base, tuned, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("adapter")
@writing
@click.option(
    "--base",
    metavar="BASE",
    help="The model it was trained on: OFT, VeRA and convolutions need it, DoRA becomes plain LoRA by it.",
)
@cut
@click.option(
    "--alpha",
    type=click.Choice(["rank", "keep"]),
    default="rank",
    show_default=True,
    help="lora_alpha of the result: each module's rank (scale 1), or the adapter's own.",
)
@factors
def resize(adapter: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Change an adapter's rank: the best approximation of each delta, from its factors alone.

    LoHa, LoKr, VeRA, AdaLoRA and OFT adapters, and with --base DoRA, become plain LoRA.

    \b
    Example:
      adapterkit resize ./rank-64 --rank 16 --out rank-16
      adapterkit resize ./rank-64 --energy 0.95 --dtype bf16 --out smaller
      adapterkit resize ./oft --base ./model --rank 32 --out lora
    """
    from adapterkit.ops.resize import resize as verb

    _carry(verb, adapter, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("adapter")
@click.option(
    "--initial", required=True, metavar="ADAPTER", help="The same adapter as saved before training."
)
@writing
@click.option(
    "--base",
    metavar="BASE",
    help="The adapters' model, where target_parameters are not told apart without.",
)
@refit(ADDED_UP)
@factors
def rebase(adapter: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Turn a PiSSA, OLoRA, CorDA or LoRA-GA adapter into plain LoRA on the original base: Δ' = s·b@a - s₀·b₀@a₀.

    \b
    Example:
      adapterkit rebase ./pissa-trained --initial ./pissa-init --out plain
    """
    from adapterkit.ops.rebase import rebase as verb

    _carry(verb, adapter, out=out, as_json=as_json, quiet=quiet, **options)


@main.command()
@click.argument("folder", metavar="DIR")
@click.option(
    "--base", help="The base of a merge: rows of each changed tensor are recomputed in float64."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="The adapters, in the order of the merge.",
)
@json_output
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def verify(
    folder: str, base: str | None, adapters: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
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
        _print_json(result)
    elif not quiet:
        _print_verified(result)


def _settings(words: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE options; a value is a JSON number, true or false, or else a text."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {word}: give KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _carry(verb: Callable, *sources: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Call a verb that writes, with progress, and print its plan or receipt."""
    from adapterkit.plan import Plan

    with _Bar(quiet or options["dry_run"]) as bar:
        result = verb(*sources, progress=bar, **options)
    if isinstance(result, Plan):
        _print_plan(result, as_json)
    elif as_json:
        _print_json(result.data)
    elif not quiet:
        _print_receipt(result)


@main.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=float,
    default=0.0,
    show_default=True,
    help="Relative error up to which a tensor is the same.",
)
@click.option(
    "--rank-for-energy",
    type=float,
    metavar="SHARE",
    help="Suggest the rank that keeps this share of a difference (default: 0.9, for adapters 0.99; 0: none).",
)
@json_output
@click.option("--quiet", is_flag=True, help="No progress, no table: only the exit status.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare two checkpoints, two adapters or two .safetensors files: what is only in one, and how far apart the rest is.

    \b
    Checkpoints are compared by key, however they are sharded. A copy rounded to another dtype is the same.
    Adapters are compared by their deltas scale·b@a, so other ranks and alphas may be the same adapter.
    Columns: relative ‖A−B‖/‖A‖, largest difference, cosine, share of elements that differ, and the rank that
    holds 90 % of the squared singular values of the difference (~: at most that, from a sketch).
    Settings of the configs that differ come last; those that change the arithmetic make a difference too.
    Exit status: 0 the same; 1 different by more than the tolerance; 2 wrong usage, refused or failed.

    \b
    Example:
      adapterkit diff ./base ./tuned
      adapterkit diff ./adapter ./resized --tolerance 1e-3
    """
    from adapterkit.ops.diff import diff as verb
    from adapterkit.ops.diff import table

    if quiet and not as_json:
        options["rank_for_energy"] = 0.0
    with _Bar(quiet) as bar:
        result = verb(a, b, progress=bar, **options)
    if as_json:
        _print_json(result)
    elif not quiet:
        _print_diff(result, table(result))
    ctx.exit(0 if result["same"] else 1)


@main.command("inspect")
@click.argument("path")
@click.option(
    "--base",
    metavar="BASE",
    help="The adapter's base: norms are also given relative to its weights' norms.",
)
@click.option(
    "--download",
    is_flag=True,
    help="Read weights on the Hub too; without it only headers and JSON are read there.",
)
@click.option(
    "--headers",
    is_flag=True,
    help="Read headers and JSON alone, of a local adapter too: no norms, no effective ranks.",
)
@click.option(
    "--plot",
    type=click.Path(),
    metavar="FILE.png",
    help="Draw the norms as a heatmap, layers by modules.",
)
@json_output
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool, **options: Any) -> None:
    """What a base, an adapter or a .safetensors file holds, and what is wrong with it.

    \b
    Of a base and of whatever lies on the Hub headers and JSON are read; of an adapter on this machine the
    factors too, for norms and effective ranks, unless --headers is given. Problems are printed. The exit
    status is 1 where a file is missing or cannot be read, else 0, whatever the problems; a path that holds
    nothing to inspect is refused.

    \b
    Example:
      adapterkit inspect ./my-adapter --base ./base --plot norms.png
      adapterkit inspect meta-llama/Llama-3.1-8B --json
    """
    from adapterkit.ops.inspect import inspect as verb
    from adapterkit.ops.inspect_report import table

    with _Bar(False) as bar:
        result = verb(path, progress=bar, **options)
    if as_json:
        _print_json(result)
    else:
        click.echo(table(result))
    ctx.exit(0 if result["readable"] else 1)


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


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def _print_plan(plan: Any, as_json: bool) -> None:
    from adapterkit.plan import Computed, Shard

    totals = plan.totals()
    if as_json:
        changed = [
            {"key": s.key, "dtype": s.dtype, "shape": list(s.shape), "file": shard.file, "adapters": list(s.adapters)}
            for shard in plan.shards if isinstance(shard, Shard) for s in shard.steps if not s.copied
        ]  # fmt: skip
        computed = [
            {"name": task.name, "file": shard.file, "at_most": {s.key: list(s.shape) for s in task.max_outputs}}
            for shard in plan.shards if isinstance(shard, Computed) for task in shard.tasks
        ]  # fmt: skip
        document = {
            "plan": 1,
            **plan.recipe(),
            "totals": totals,
            "changed": changed,
            "computed": computed,
            "notes": list(plan.notes),
            **plan.metrics,
        }
        _print_json(document)
        return
    for name, value in totals.items():
        click.echo(f"{name.replace('_', ' '):16} {value:>18,}")
    for note in plan.notes:
        click.echo(f"note: {note}")
    for name in plan.metrics.get("left_out", []):
        click.echo(f"left out: {name}")


def _print_receipt(receipt: Any) -> None:
    from adapterkit.ops.outcomes import outcomes

    data = receipt.data
    if receipt.finished_before:
        click.echo(f"{receipt.out}: finished before, nothing to do", err=True)
        if "verified" in data:
            _print_verified(data["verified"])
        return
    totals = data["totals"]
    click.echo(
        f"{receipt.out}: {totals['tensors_changed']} of {totals['tensors']} tensors changed, "
        f"{totals['bytes_written']:,} bytes in {data['timings']['seconds']:.1f} s",
        err=True,
    )
    for line in outcomes(data):
        click.echo(line, err=True)
    if "verified" in data:
        _print_verified(data["verified"])
    for note in data["notes"]:
        click.echo(f"note: {note}", err=True)
    for name in data.get("left_out", []):
        click.echo(f"left out: {name}", err=True)


def _print_verified(result: dict[str, Any]) -> None:
    hashed = (
        "as the receipt says"
        if result["hash"] != "none"
        else "sizes and keys as the receipt says, nothing was hashed"
    )
    click.echo(f"{result['files']} files, {result['bytes']:,} bytes: {hashed}", err=True)
    what = f"verified: {result['rows']:,} rows of {result['tensors']:,} tensors"
    how = (
        "recomputed in float64"
        if result["rows"]
        else "(with --base and --adapter rows of a merge are recomputed)"
    )
    click.echo(f"{what} {how}", err=True)


def _print_diff(document: dict[str, Any], lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
    totals = ", ".join(
        f"{count} {what}"
        for what, count in document["totals"].items()
        if count or what in ("compared", "changed")
    )
    relative = document["change"]["relative"]
    size = f"; ‖A−B‖/‖A‖ {relative:.3g} over what differs" if relative is not None else ""
    click.echo(f"{'same' if document['same'] else 'different'}: {totals}{size}", err=True)
    for note in document["notes"]:
        click.echo(f"note: {note}", err=True)
