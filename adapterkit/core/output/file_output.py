"""An output that is one file. It is built in a hidden folder next to it, then gets its name, and
its receipt that name with a suffix. Small files may be next to it."""

import os
from collections.abc import Iterable
from pathlib import Path

from adapterkit.core.checkpoint.disk import size_below, storage_errors, sync_folder
from adapterkit.core.errors import Refused, shown
from adapterkit.core.output.folder_output import size_at
from adapterkit.core.output.stage import (
    RECEIPT,
    Stage,
    StagedOutput,
    control_of,
    parse_receipt,
    receipt_bytes,
    receipt_name_of,
)
from adapterkit.core.system import system


class FileOutput(StagedOutput):
    """One file, with its receipt and the small files `next_to` it; they move one by one."""

    moves = True

    def __init__(self, out: Path, next_to: Iterable[str] = ()):
        self.out, self.final = out, out.parent
        self.control = out.resolve().parent / control_of(out)
        self.receipt_path = out.with_name(receipt_name_of(out.name))
        self.next_to = {name: out.with_name(name) for name in next_to}

    def exists(self) -> bool:
        return any(map(os.path.lexists, (self.out, self.receipt_path, *self.next_to.values())))

    def receipt(self) -> bytes:
        return receipt_bytes(self.receipt_path)

    def size_of(self, name: str) -> int | None:
        return size_at(self.final / name)

    def check_kind(self) -> None:
        if self.out.is_symlink() or self.out.is_dir():
            raise self._refused("a link or a folder of that name", "choose another --out")

    def check(self, *, replaces: bool) -> None:
        written = parse_receipt(self.receipt()).get("files", {})
        paths = {self.out: self.out.name, self.receipt_path: self.out.name}
        paths |= {path: name for name, path in self.next_to.items()}
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
        if self.out.exists() and not replaces:
            raise self._refused(
                "a file of this name exists", "choose another --out, or give --overwrite"
            )

    def _owner(self, name: str) -> str:
        """Return the other output of the folder whose receipt names a file; "" if none."""
        ends = receipt_name_of("")
        receipts = sorted(path for path in self.final.glob(f"*{ends}") if path != self.receipt_path)
        owns = lambda one: name in parse_receipt(receipt_bytes(one)).get("files", {})
        return next((one.name.removesuffix(ends) for one in filter(owns, receipts)), "")

    def _refused(self, problem: str, hint: str) -> Refused:
        return Refused(problem, expected="a new file", where=str(self.out), hint=hint, code="AK601")

    def publish(self, stage: Stage) -> None:
        final = self.out.resolve()
        with storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            next_to = [(name, final.with_name(name)) for name in self.next_to]
            for staged, there in ((self.out.name, final), *next_to, (RECEIPT, self.receipt_path)):
                if size_below(stage.path, staged) is not None:
                    system.replace(stage.path / staged, there)
            sync_folder(final.parent)
