"""Print plans, receipts, results and progress. Letters missing from the encoding of a console or
file, such as code page 1252, are replaced instead of raising an error."""

import codecs
import io
import json
import sys
import threading
import unicodedata
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli import signals
from adapterkit.core.options import bytes_text
from adapterkit.core.records import Json
from adapterkit.core.verb import Verb, function_of

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan
    from adapterkit.core.receipt import Receipt


STAND_INS = {
    "‖": "||", "Δ": "delta", "δ": "delta", "Σ": "sum", "σ": "sigma", "Ω": "Omega", "θ": "theta",
    "γ": "gamma", "τ": "tau", "η": "eta", "ε": "eps", "λ": "lambda", "α": "alpha", "β": "beta",
    "ρ": "rho",
    "≈": "~", "≤": "<=", "≥": ">=", "−": "-", "⁻": "-", "₋": "-", "±": "+-", "·": "*", "×": "x",
    "⊗": "x", "⊙": "*", "∗": "*", "∘": "o", "•": "*", "→": "->", "←": "<-", "½": "1/2", "¼": "1/4",
    "√": "sqrt", "∞": "inf", "∈": "in", "°": "deg", "⟨": "<", "⟩": ">", "—": "-",
    "\N{EN DASH}": "-", "█": "#", "▓": "%", "▒": "=", "░": "-",
}  # fmt: skip


def run_verb(
    verb: type[Verb],
    *sources: object,
    as_json: bool,
    quiet: bool,
    plan: str | None = None,
    dry_run: bool = False,
    **options: object,
) -> None:
    """Run a verb with progress, and print its plan or receipt; with `plan`, write that file
    instead."""
    from adapterkit.core.receipt import Receipt

    if plan is not None:
        write_plan(plan, verb, *sources, as_json=as_json, quiet=quiet, dry_run=dry_run, **options)
        return
    if "dry_run" in verb.__dataclass_fields__:
        options["dry_run"] = dry_run
    with ProgressBar(quiet or dry_run) as bar:
        result: Any = function_of(verb)(*sources, progress=bar, **options)
        signals.ignore_after_work()  # the output is published: printing goes on
    if not isinstance(result, Receipt):
        print_plan(result, as_json)
    elif as_json:
        print_json(result.data)
    elif not quiet:
        print_receipt(result)


def write_plan(
    file: str,
    verb: type[Verb],
    *sources: object,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    **options: object,
) -> None:
    """Write a verb's call into a plan file, and print the plan."""
    if dry_run:
        raise click.UsageError("--plan and --dry-run exclude each other: give one")
    if options.pop("resume"):
        raise click.UsageError(
            "remove --resume: --plan only writes the plan; `adapterkit run` resumes by itself"
        )
    from adapterkit.core.calls import own_hints
    from adapterkit.core.commands import command
    from adapterkit.many.workflows.plan_file import write_plan as write

    with own_hints(verb):
        plan = write(file, verb.name, *sources, **options)
    if as_json or not quiet:
        print_plan(plan, as_json)
    if not quiet:
        click.echo(
            f"next, in each process: {command('adapterkit run', file)}\n"
            f"then: {command('adapterkit finish', file)}",
            err=True,
        )


class ProgressBar:
    """Bytes or other units done with an ETA, on a terminal only; called from several threads."""

    def __init__(self, quiet: bool, unit: str = "B"):
        from tqdm import tqdm

        # its own is shared with forked processes, and a killed one of them never releases it
        tqdm.set_lock(threading.RLock())
        # disable=None: silent off a terminal
        more = {"unit": unit, "unit_scale": unit == "B", "leave": False}
        self.bar = tqdm(**more, disable=quiet or None)
        self.lock = threading.Lock()

    def __enter__(self) -> "ProgressBar":
        return self

    def expect(self, total: int) -> None:
        self.bar.reset(total)  # of the next one, if there are several jobs

    def __call__(self, done: int) -> None:
        with self.lock:
            self.bar.update(done)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def print_json(document: Json) -> None:
    # in other encodings letters would get stand-ins, which are no escapes
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_unicode = encoding.lower().startswith("utf")
    parts = json.JSONEncoder(indent=1, ensure_ascii=not is_unicode).iterencode(document)
    # not as one text: that of a large plan takes more memory than the plan
    while text := "".join(islice(parts, 100_000)):
        click.echo(text, nl=False)
    click.echo()


def print_plan(plan: "Plan", as_json: bool) -> None:
    if as_json:
        print_json(_document(plan))
        return
    from adapterkit.verbs.look.tables import grouped

    for warning in plan.warnings:
        click.echo(f"warning: {warning}")
    for name, value in plan.totals().items():
        sized = not {"bytes", "disk", "memory"}.isdisjoint(name.split("_"))
        text = bytes_text(value) if sized else f"{value:,}"
        click.echo(f"{name.replace('_', ' '):16} {text:>18}")
    for note in plan.notes:
        click.echo(f"note: {note}")
    for text in grouped(plan.decisions.get("left_out", [])):
        click.echo(f"skipped: {text}")


def _document(plan: "Plan") -> Json:
    changed = [
        {
            "key": step.key,
            "dtype": step.dtype,
            "shape": list(step.shape),
            "file": shard.file,
            "adapters": list(step.adapters),
        }
        for shard in plan.shards
        for step in shard.steps
        if not step.copied
    ]
    computed = [
        {
            "name": task.name,
            "file": shard.file,
            "at_most": {spec.key: list(spec.shape) for spec in task.max_outputs},
        }
        for shard in plan.shards
        for task in shard.tasks
    ]
    return {
        "plan": 1,
        **plan.recipe(),
        "totals": plan.totals(),
        "changed": changed,
        "computed": computed,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        **plan.decided(),
    }


def print_receipt(receipt: "Receipt") -> None:
    from adapterkit.verbs.look.tables import grouped, outcomes

    data = receipt.data
    for warning in data.get("warnings", []):
        click.echo(f"warning: {warning}", err=True)
    if receipt.finished_before:
        left = "only sent" if "pushed" in data else "nothing to do"
        click.echo(f"{receipt.out}: finished before, {left}", err=True)
        _print_pushed(data)
        if "verified" in data:
            print_verified(data["verified"])
        return
    totals, seconds = data["totals"], data["timings"]["seconds"]
    sizes = f"wrote {bytes_text(totals['bytes_written'])} in {seconds:.1f} s"
    if totals.get("bytes_read"):
        sizes = f"read {bytes_text(totals['bytes_read'])}, {sizes}"
    click.echo(f"{receipt.out}: {_made(data)}; {sizes}", err=True)
    for line in outcomes(data):
        click.echo(line, err=True)
    _print_pushed(data)
    if "verified" in data:
        print_verified(data["verified"])
    for note in data["notes"]:
        click.echo(f"note: {note}", err=True)
    for text in grouped(data.get("left_out", [])):
        click.echo(f"skipped: {text}", err=True)
    if command := _next(receipt):
        click.echo(f"next: {command}", err=True)


def _next(receipt: "Receipt") -> str:
    """The next command for a local output: view it, load it, verify it, or upload it."""
    from adapterkit.adapters.formats.engines import engines
    from adapterkit.adapters.formats.language import models_of
    from adapterkit.core.commands import command

    data, verb, out = receipt.data, receipt.data["recipe"]["verb"], str(receipt.out)
    if "pushed" in data or verb == "stats":
        return ""
    if verb in ("merge", "quantize", "dequantize"):
        is_verified = "verified" in data
        upload = command("hf upload", "ORG/NAME", out)
        return upload if is_verified else command("adapterkit verify", out)
    page = command("adapterkit report", out, out="report.html")
    if verb == "convert" and (name := data["to"]) != "peft":
        readers = [one for one in engines().values() if one.format == name]
        models = models_of(data["from"], data["architecture"])
        readers.sort(key=lambda one: (one.models != models, one.name != name))
        return readers[0].loading(name, out, "BASE") if readers else page
    return page


def _made(data: Json) -> str:
    """The job's result: statistics, the modules of an adapter, or changed tensors of a model."""
    totals = data["totals"]
    if data["recipe"]["verb"] == "stats":
        return (
            f"{totals['tensors']} statistics of {totals['modules']} modules from "
            f"{totals['tokens_counted']:,} tokens of {totals['samples']} samples"
        )
    if data["recipe"]["verb"] in ("merge", "quantize", "dequantize"):
        return f"{totals['tensors_changed']} of {totals['tensors']} tensors changed"
    changed = [one for one in data["parameters"].values() if not one.get("unchanged")]
    return f"{data.get('modules', len(changed))} modules written"


def _print_pushed(data: Json) -> None:
    if "pushed" in data:
        click.echo(f"on the Hub: {data['pushed']['url']}", err=True)
        for note in data["pushed"]["notes"]:
            click.echo(f"note: {note}", err=True)


def print_verified(result: Json) -> None:
    what, where = "checksums", "the receipt"
    if result["hash"] == "none":
        what, where = "sizes and keys", "the receipt, which holds no hashes"
    size = f"{result['files']} files, {bytes_text(result['bytes'])},"
    click.echo(f"verified: {what} of {size} match {where}", err=True)
    if result["rows"]:
        click.echo(
            f"verified: {result['rows']:,} rows of {result['tensors']:,} tensors, recomputed in "
            "float64, match",
            err=True,
        )
    else:
        click.echo("to check the arithmetic of a merge too, give --base and --adapter", err=True)
    if "score" in result:
        from adapterkit.verbs.look.tables import score_table

        click.echo("\n".join(score_table(result["score"])))


def print_diff(document: Json, lines: list[str]) -> None:
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


def never_fail() -> None:
    """Replace letters in printed text that the stream's encoding lacks."""
    codecs.register_error("adapterkit", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # somebody may have put something else there
            stream.reconfigure(errors="adapterkit")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_plain, letters)), error.end


def _plain(letter: str) -> str:
    if letter in STAND_INS or unicodedata.combining(letter):
        return STAND_INS.get(letter, "")
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
