"""Run a plan: journal, resume, small files, and the one rename that publishes the folder."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from adapterkit.core.checkpoint.disk import free_bytes, size_below
from adapterkit.core.checkpoint.reader import changed
from adapterkit.core.errors import AdapterkitError, Failed, Interrupted, Refused, Unrecoverable
from adapterkit.core.options import Progress, expect
from adapterkit.core.output.journal import ShardResult, read_result
from adapterkit.core.output.resume import (
    check_same_job,
    check_same_way,
    difference,
    is_published,
    state_of,
)
from adapterkit.core.output.stage import HANDOFF, RECEIPT, WORK, Stage, Workspace, parse_receipt
from adapterkit.core.plan import CopyFile, FromMetrics, OutputFile, Plan
from adapterkit.core.receipt import (
    RECEIPT_CHECK,
    Receipt,
    create_receipt,
    fingerprint_of,
    input_hashes,
    is_sealed,
    joined_metrics,
    public_recipe,
    seal_receipt,
)
from adapterkit.core.records import Json

BLOCK = 16 << 20  # bytes of a copied file at a time
FolderCheck = Callable[[Path], object]  # inspects a finished folder before it gets its name
Push = Callable[[Path], Json]  # a finished folder -> the receipt's `pushed`


class Engine(Protocol):
    """Runs the steps of a plan. It calls `finished` with each shard's result, once the shard's
    bytes are durable under its name."""

    def __call__(
        self,
        plan: Plan,
        shards: list[OutputFile],
        stage: Workspace,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None: ...


def run(
    plan: Plan,
    stage: Stage,
    engine: Engine,
    *,
    hash: str = "sha256",
    resume: bool = False,
    overwrite: bool = False,
    check: FolderCheck | None = None,
    push: Push | None = None,
    progress: Progress = lambda done: None,
    began: float | None = None,
) -> Receipt:
    """Execute the plan in a stage, publish it and return its receipt. On any failure nothing
    appears under a final name.

    `check` inspects the finished folder before it gets its name; if it raises, nothing is
    published. `push` sends the published output and returns what the receipt records of it; after
    an interrupted push, the same job only sends. `began`: the start of the work by
    `time.monotonic`, now by default.

    Raises `Refused` before anything is written (output in the way, another plan's unfinished run,
    too little space) and `Failed` or `Interrupted` after; then `resume=True` continues from the
    finished files."""
    out = stage.out
    recipe = plan.recipe()
    fingerprint = fingerprint_of(recipe)
    resume = resume or (push is not None and is_published(stage, recipe))
    if not stage.is_new:  # refuses before anything is made
        state_of(stage, fingerprint, resume=resume, overwrite=overwrite)
    try:
        with stage:
            state = state_of(stage, fingerprint, resume=resume, overwrite=overwrite)
            if state == "finished":
                receipt = _finished(stage, fingerprint, recipe)
                if push is None:
                    stage.discard()
                if check is not None:
                    check(out)
                return _delivered(stage, receipt, push)
            if state == "publish":
                if _is_of_plan(stage, plan, recipe):
                    stage.clear(keep=output_names(plan))
                else:
                    state = "resume"  # the receipt is made again
            if state != "fresh":
                check_same_job(stage, recipe)
                check_same_way(stage, plan.placement.device)
            if state != "publish":
                _build(
                    plan,
                    stage,
                    engine,
                    recipe,
                    fingerprint,
                    fresh=state == "fresh",
                    hash=hash,
                    progress=progress,
                    began=time.monotonic() if began is None else began,
                )
            data = json.loads((stage.path / RECEIPT).read_bytes())
            if check is not None:
                _check(stage, check)
            stage.publish()
            return _delivered(stage, Receipt(out, data), push)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished shards are kept",
            where=str(out),
            hint="run the same command with --resume",
        ) from None


def _is_of_plan(stage: Stage, plan: Plan, recipe: dict) -> bool:
    """Return whether the stage's receipt is of this job and its files are there: others may have
    written there."""
    if size_below(stage.path, RECEIPT) is None:  # a link
        return False
    data = (stage.path / RECEIPT).read_bytes()
    try:
        receipt = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return (
        RECEIPT_CHECK.fits(receipt)
        and receipt["recipe"] == public_recipe(recipe)
        and {*receipt["files"], RECEIPT} == output_names(plan)
        and is_sealed(data)
        and stage.is_complete(receipt["files"])
    )


def output_names(plan: Plan, receipt: str = RECEIPT) -> set[str]:
    """Return the names of the output's files; `receipt` is the name of its receipt."""
    return {*(shard.file for shard in plan.shards), *plan.files, receipt}


def check_place(stage: Stage, plan: Plan, *, resume: bool, overwrite: bool) -> None:
    """Refuse a job whose output could not be written there, before it starts."""
    if not stage.is_new:  # the recipe of a large plan takes its time
        state_of(stage, fingerprint_of(plan.recipe()), resume=resume, overwrite=overwrite)


def _delivered(stage: Stage, receipt: Receipt, push: Push | None) -> Receipt:
    """Return the receipt of the output once it is published and, with `push`, sent; then the
    journal is removed."""
    if push is not None:
        receipt.data["pushed"] = push(stage.out)
    stage.discard()
    return receipt


def _build(
    plan: Plan,
    stage: Stage,
    engine: Engine,
    recipe: dict,
    fingerprint: str,
    *,
    fresh: bool,
    hash: str,
    progress: Progress,
    began: float,
) -> None:
    """Fill the stage: the shards that are not finished, the small files, the receipt."""
    if fresh:
        stage.reset()
    done = _done_before(stage, plan, hashed=hash == "sha256")
    stage.clear(keep=[*done, *(name + HANDOFF for name in done)])
    todo = [shard for shard in plan.shards if shard.file not in done]
    check_space(plan, todo, stage)
    stage.begin()
    if fresh:
        head = {"fingerprint": fingerprint, "recipe": recipe, "overwrite": stage.replaces}
        on = plan.placement.device
        # not on the CPU, whose bits are the same on each
        device = {} if on == "cpu" else {"device": on}
        stage.note(head | device | stage.output.head())
    expect(progress, sum(shard.layout.size for shard in plan.shards))
    for shard in plan.shards:
        if shard.file in done:
            progress(shard.layout.size)

    def finished(result: ShardResult) -> None:
        done[result.file] = result
        stage.note({"shard": vars(result)})

    pool = ThreadPoolExecutor(1, "hash")
    try:
        # in parallel: hashing releases Python's lock
        inputs = pool.submit(input_hashes, plan) if hash != "none" else None
        engine(plan, todo, stage, hash=hash == "sha256", finished=finished, progress=progress)
        results = [done[shard.file] for shard in plan.shards]
        for shard in plan.shards:
            (stage.path / (shard.file + HANDOFF)).unlink(missing_ok=True)
        sums = _write_files(plan, stage, results, hash == "sha256")
        hashes = inputs.result() if inputs else {}
        seconds = time.monotonic() - began
        receipt = create_receipt(plan, recipe, fingerprint, done, sums, hashes, hash, seconds)
    except Unrecoverable:
        stage.reset()
        raise
    except Refused:
        if fresh and any(shard.collection for shard in todo):  # a model that runs in another way
            stage.reset()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if not stage.is_complete(receipt["files"]):
        problem, hint = "files that were made have disappeared", "run again with --resume"
        expected = "the files that this run wrote, until it has finished"
        raise Failed(problem, expected=expected, where=str(stage.path), hint=hint, code="AK603")
    stage.write_file(RECEIPT, [seal_receipt(receipt)])
    stage.ready()


def _check(stage: Stage, check: FolderCheck) -> None:
    try:
        check(stage.path)
    except AdapterkitError:
        stage.reset()  # the folder cannot be trusted
        raise


def _finished(stage: Stage, fingerprint: str, recipe: dict) -> Receipt:
    data, out = parse_receipt(stage.output.receipt()), stage.out
    if not RECEIPT_CHECK.fits(data):
        raise Refused(
            "adapterkit did not write the receipt",
            expected="that of the finished output",
            where=str(out),
            hint="remove the output, or choose another --out",
            code="AK601",
        )
    if data.get("fingerprint") != fingerprint:
        raise Refused(
            "the finished output is of another job "
            f"({difference(data.get('recipe', {}), public_recipe(recipe))} differs)",
            expected="the job that --resume continues",
            where=str(out),
            hint="choose another --out, or give --overwrite",
            code="AK601",
        )
    return Receipt(out, data, finished_before=True)


def _done_before(stage: Stage, plan: Plan, *, hashed: bool) -> dict[str, ShardResult]:
    """Return the shards that the journal lists as finished and that are there."""
    shards = {shard.file: shard for shard in plan.shards}
    done = {}
    for entry in stage.journal()[1:]:
        result = read_result(entry)
        if result is None or result.file not in shards:
            continue
        is_its = shards[result.file].accepts(result, hashed=hashed)
        if is_its and stage.holds(result.file, result.size, result.sha256):
            done[result.file] = result
    if len(done) < len(plan.shards):  # missing shards may need the handoffs of the others
        done = {
            name: r
            for name, r in done.items()
            if not r.handoffs or size_below(stage.path, name + HANDOFF) is not None
        }
    return done


def check_space(plan: Plan, todo: Sequence[OutputFile], stage: Stage) -> None:
    """Refuse if the disk has too little space for these files and the small ones."""
    small = plan.totals()["bytes_written"] - sum(shard.layout.size for shard in plan.shards)
    needed = stage.output.disk(
        sum(shard.layout.size for shard in todo) + plan.temporary_disk(todo) + small + (1 << 20)
    )
    work = stage.path.parent / WORK  # some of it is there already
    needed -= sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    check_free(needed, stage.path)


def check_free(needed: int, path: Path) -> None:
    """Refuse if the disk has fewer free bytes than `needed`."""
    free = free_bytes(path)
    if needed > free:
        raise Refused(
            f"the disk has {free:,} bytes free",
            expected=f"{needed:,} bytes",
            where="--out",
            hint="free some space, or choose an --out on another disk",
            code="AK604",
        )


def _write_files(
    plan: Plan, stage: Stage, results: Sequence[ShardResult], hashed: bool
) -> dict[str, dict]:
    sums = {}
    for name, content in plan.written_files().items():
        if isinstance(content, FromMetrics):
            own = [result for result in results if result.file.startswith(content.folder)]
            content = content.content(joined_metrics(own), sum(result.grown for result in own))
        size, sha = stage.write_file(
            name, [content] if isinstance(content, bytes) else _blocks(plan, content)
        )
        if isinstance(content, CopyFile):
            listed = plan.folders[content.folder].hashes.get(content.name)
            if listed not in (None, sha):
                raise Failed(
                    "the sha256 of the bytes is not the one that the Hub lists",
                    expected=f"{listed}",
                    where=content.name,
                    hint="run again with --resume; check proxies on the way",
                    code="AK704",
                )
        sums[name] = {"size": size, "sha256": sha if hashed else None}
    return sums


def _blocks(plan: Plan, copy: CopyFile) -> Iterator[bytes]:
    """Yield the bytes of a file of an input folder; `Failed` if its size has changed since
    planning."""
    folder = plan.folders[copy.folder]
    size = folder.files()[copy.name]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        block = folder.read(copy.name, start, stop)
        if len(block) != stop - start:
            raise changed(copy.name)
        yield block
