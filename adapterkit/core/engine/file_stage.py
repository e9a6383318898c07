"""An output that is one file: its plan runs in a hidden folder beside it, then the file gets its
name, and its receipt that name with a suffix."""

import os
from pathlib import Path

from adapterkit.core.checkpoint.disk import size_below, storage_errors, sync_folder
from adapterkit.core.errors import Refused, shown
from adapterkit.core.output.earlier_output import receipt_at
from adapterkit.core.output.stage import RECEIPT, Stage, control_of, receipt_beside
from adapterkit.core.plan import Plan
from adapterkit.core.system import system


def stage_of(plan: Plan, out: Path) -> Stage:
    """Where the output of a plan is built."""
    return FileStage(out, tuple(plan.files)) if plan.is_file else Stage(out)


class FileStage(Stage):
    """The `Stage` of one file; the receipt lies next to it, and so do small files, `next_to`.
    They are moved there one by one."""

    def __init__(self, out: Path, next_to: tuple[str, ...] = ()):
        super().__init__(out)
        self.next_to = next_to
        self.inside, self.final = True, out.parent
        self.control = out.resolve().parent / control_of(out)
        self.receipt = out.with_name(receipt_beside(out.name))

    @property
    def is_new(self) -> bool:
        next_to = (self.out.with_name(name) for name in self.next_to)
        return super().is_new and not any(map(os.path.lexists, next_to))

    def _check_kind(self) -> None:
        if self.out.is_symlink() or self.out.is_dir():
            raise self._refused("a link or a folder of that name", "choose another --out")

    def _check_output(self) -> None:
        """`Refused` unless there is nothing or, with --overwrite, an older output."""
        written = self.published().get("files", {})
        paths = {self.out: self.out.name, self.receipt: self.out.name}
        paths |= {self.out.with_name(name): name for name in self.next_to}
        there = next((p for p, name in paths.items() if p.exists() and name not in written), None)
        if there is not None:
            owner = self._owner(there.name)
            whose = f"it is of {shown(owner)}" if owner else "adapterkit did not write it"
            raise Refused(
                f"output exists, and {whose}: {shown(there.name)}",
                expected="a new file, or an older output, which --overwrite replaces",
                where=str(self.out),
                hint="move it away, or choose another --out",
                code="AK601",
            )
        if self.out.exists() and not self.replaces:
            raise self._refused(
                "a file of this name exists", "choose another --out, or give --overwrite"
            )

    def _owner(self, name: str) -> str:
        """The other output of the folder whose receipt names a file; "" for none."""
        ends = receipt_beside("")
        receipts = sorted(path for path in self.final.glob(f"*{ends}") if path != self.receipt)
        owns = lambda one: name in receipt_at(one).get("files", {})
        return next((one.name.removesuffix(ends) for one in filter(owns, receipts)), "")

    def _refused(self, problem: str, hint: str) -> Refused:
        return Refused(problem, expected="a new file", where=str(self.out), hint=hint, code="AK601")

    def _output_files(self) -> list[str]:
        return []

    def publish(self) -> None:
        """Called again after a crash it continues."""
        final = self.out.resolve()
        with storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            next_to = [(name, final.with_name(name)) for name in self.next_to]
            for staged, there in ((self.out.name, final), *next_to, (RECEIPT, self.receipt)):
                if size_below(self.path, staged) is not None:
                    system.replace(self.path / staged, there)
            sync_folder(final.parent)
        self._close_journal()
        self._clean()
