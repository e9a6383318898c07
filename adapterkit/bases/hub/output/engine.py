"""Run a job whose output is on the Hub: while one file is computed, inputs of the next are
downloaded and finished ones are uploaded, within a limit on disk.

Disk for a file and its inputs is reserved before the download, in the order of the files. Computing
and uploading reserve nothing, so earlier files always release theirs. Inputs are removed after
their last use, an output once the Hub has it.
"""

import queue
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.bases.hub import upload
from adapterkit.bases.hub.output.hub_output import HubOutput
from adapterkit.bases.hub.output.transfers import Input, MadeFile, Transfers, plan_transfers
from adapterkit.bases.hub.scratch import ScratchFolder, Stopped
from adapterkit.bases.hub.upload import LocalFile, copy_storage
from adapterkit.core.engine.interruptible import (
    POLL_INTERVAL,
    result_of,
    signals_deferred,
    start_thread,
)
from adapterkit.core.errors import Failed, shown
from adapterkit.core.execute import Engine
from adapterkit.core.options import Progress
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import Stage, Workspace
from adapterkit.core.plan import OutputFile, Plan

SENDERS = (
    2  # threads that send: what is made is sent at once, while another file is still on its way
)
# (the output folder, the plan of the one file, its result): looks at a file before it goes
CheckFile = Callable[[Path, Plan, ShardResult], None]


@dataclass(frozen=True)
class HubEngine:
    """An `Engine` around the local one: copies files that the Hub already has, then computes the
    others. `limit`: bytes of disk; `keep_outputs`: files stay until all are done."""

    local: Engine
    limit: int | None
    keep_outputs: bool
    check_file: CheckFile | None

    def __call__(
        self,
        plan: Plan,
        shards: list[OutputFile],
        stage: Workspace,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        assert isinstance(stage, Stage)
        output = stage.output
        assert isinstance(output, HubOutput)
        shutil.rmtree(output.inputs, ignore_errors=True)
        todo = {shard.file for shard in shards}
        transfers = plan_transfers(plan, keep_outputs=self.keep_outputs)
        wanted = [file for file in transfers.copied if file.file in todo]
        copied = copy_storage(output.destination.hub_id, wanted) if wanted else []
        for file in copied:
            output.note_copied(stage, file)
            finished(ShardResult(file.file, file.size, file.sha256 if hash else None, None, {}))
            progress(file.size)
        uncopied = {file.file for file in wanted} - {file.file for file in copied}
        if uncopied:
            transfers = plan_transfers(
                plan, keep_outputs=self.keep_outputs, uncopied=sorted(uncopied)
            )
            transfers.check(self.limit)
        done = [shard.file for shard in plan.shards if shard.file not in todo]
        transfers = transfers.without([*done, *(file.file for file in copied)])
        _HubRun(self, plan, transfers, stage, output, hash, finished, progress).run()


class DiskBudget:
    """Bytes of disk that are left."""

    def __init__(self, size: int):
        self.size, self._changed = size, threading.Condition()

    def take(self, size: int, stop: threading.Event) -> None:
        """Wait for that much; `Stopped` if the job ends first."""
        with self._changed:
            while self.size < size:
                if stop.is_set():
                    raise Stopped
                self._changed.wait(POLL_INTERVAL)
            self.size -= size

    def give(self, size: int) -> None:
        with self._changed:
            self.size += size
            self._changed.notify_all()


class _HubRun:
    """One job: this thread computes files, another downloads, others upload."""

    def __init__(self, engine, plan, transfers, stage, output, hashed, finished, progress):
        self.engine: HubEngine = engine
        self.plan: Plan = plan
        self.transfers: Transfers = transfers
        self.stage: Stage = stage
        self.output: HubOutput = output
        self.hashed, self.finished, self.progress = hashed, finished, progress
        self.stop = threading.Event()
        self.budget = DiskBudget(transfers.disk(engine.limit) - transfers.rest)
        self.ready = {file.shard.file: Future[None]() for file in transfers.made}
        self.outgoing = queue.SimpleQueue[LocalFile | None]()
        self.last = transfers.last_uses()
        self.results: dict[str, ShardResult] = {}

    def run(self) -> None:
        self._send_what_is_left()
        with signals_deferred():
            downloads = self._start(self._download_all)
            uploads = [self._start(self._upload_all) for _ in range(SENDERS)]
        try:
            for number, file in enumerate(self.transfers.made):
                result_of(self.ready[file.shard.file])
                self._make(number, file)
            self.outgoing.put(None)
            for sender in uploads:
                result_of(sender)
        except KeyboardInterrupt:
            self.stop.set()  # who interrupts does not wait for the network
            raise
        except BaseException:
            self._end(downloads, *uploads)
            for sender in uploads:  # why the others have ended, where one of them broke
                sender.result()
            raise

    def _start(self, target: Callable[[], None]) -> "Future[None]":
        """Run in a thread whose error ends the others."""

        def run() -> None:
            try:
                target()
            except BaseException:
                self.stop.set()
                raise

        return start_thread(run)

    def _end(self, *threads: "Future[None]") -> None:
        """Stop the threads; uploads in progress are still recorded."""
        self.stop.set()
        self.outgoing.put(None)
        for thread in threads:
            thread.exception()

    def _send_what_is_left(self) -> None:
        """Upload files that an earlier run made but did not send."""
        if self.engine.keep_outputs:
            return
        todo, gone = set(self.ready), self.output.sent_files(self.stage)
        for shard in self.plan.shards:
            path = self.stage.path / shard.file
            if shard.file not in todo and shard.file not in gone:
                size = path.stat().st_size
                self.budget.give(-size)
                self.outgoing.put(LocalFile(shard.file, path, size))

    # -- down --------------------------------------------------------------------------------------

    def _download_all(self) -> None:
        here = set[Input]()
        for file in self.transfers.made:
            future = self.ready[file.shard.file]
            try:
                missing = [each for each in file.inputs if each not in here]
                inputs = sum(self.transfers.sizes[each] for each in missing)
                self.budget.take(inputs + file.disk, self.stop)
                for folder, name in missing:
                    self._folder(folder).download(name, self.stop.is_set)
                here |= set(missing)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
                return

    def _folder(self, number: int) -> ScratchFolder:
        folder = self.plan.folders[number]
        assert isinstance(folder, ScratchFolder)  # the others need no download
        return folder

    # -- here --------------------------------------------------------------------------------------

    def _make(self, number: int, file: MadeFile) -> None:
        shard, name = file.shard, file.shard.file
        self.engine.local(
            self.plan,
            [shard],
            self.stage,
            hash=self.hashed,
            finished=self._finished,
            progress=self.progress,
        )
        result = self.results.pop(name)
        if self.engine.check_file is not None:
            self.engine.check_file(self.stage.path, replace(self.plan, shards=(shard,)), result)
        for each in file.inputs:
            if self.last[each] == number:
                self._folder(each[0]).drop(each[1])
                self.budget.give(self.transfers.sizes[each])
        self.budget.give(file.disk - result.size)
        if not self.engine.keep_outputs:
            self.outgoing.put(LocalFile(name, self.stage.path / name, result.size, result.sha256))

    def _finished(self, result: ShardResult) -> None:
        self.results[result.file] = result
        self.finished(result)

    # -- up ----------------------------------------------------------------------------------------

    def _upload_all(self) -> None:
        while (group := self._next_group()) and not self.stop.is_set():
            sent = self.output.upload(self.stage, group)
            for file in group:
                if file.name not in sent:
                    raise Failed(
                        f"{shown(file.name)} would become part of the repository's git",
                        expected="weights in the Hub's storage for large files",
                        where=str(self.output.destination.hub_id),
                        hint="restore the repository's .gitattributes, then give --resume",
                        code="AK701",
                    )
                file.path.unlink()
                self.budget.give(file.size)

    def _next_group(self) -> list[LocalFile]:
        """Waiting files, as many as one upload takes; none at the end."""
        group: list[LocalFile] = []
        while len(group) < upload.GROUP_FILES and (
            sum(file.size for file in group) < upload.GROUP_BYTES
        ):
            try:
                file = self.outgoing.get(block=not group)
            except queue.Empty:
                return group
            if file is None:
                self.outgoing.put(None)  # for the next call
                return group
            group.append(file)
        return group
