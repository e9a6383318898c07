"""An output that is a folder of this machine."""

import os
import shutil
import stat
from collections.abc import Container, Iterable
from pathlib import Path

from adapterkit.core.checkpoint.disk import (
    check_folder,
    size_below,
    storage_errors,
    sync_folder,
    sync_folders,
)
from adapterkit.core.checkpoint.folder import is_plain_path
from adapterkit.core.errors import Refused, listed
from adapterkit.core.output.stage import (
    RECEIPT,
    Stage,
    StagedOutput,
    control_of,
    parse_receipt,
    receipt_bytes,
)
from adapterkit.core.system import system


class FolderOutput(StagedOutput):
    """A folder that gets its name by one rename, or by an exchange with an older output.

    If it exists and no rename can replace it (a mount point, or a parent that is not writable), it
    is built inside, and the files move one by one: weights, index, config, receipt last."""

    def __init__(self, out: Path):
        self.out = self.final = out
        parent = out.resolve().parent
        self.moves = out.is_dir() and (
            system.is_mount(out.resolve()) or not os.access(parent, os.W_OK)
        )
        self.control = out / ".adapterkit" if self.moves else parent / control_of(out)

    def exists(self) -> bool:
        return os.path.lexists(self.out)

    def receipt(self) -> bytes:
        return receipt_bytes(self.out / RECEIPT)

    def size_of(self, name: str) -> int | None:
        return size_at(self.out / name)

    def check_kind(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise Refused(
                "a file of this name exists",
                expected="a new folder",
                where=str(self.out),
                hint="choose another --out",
                code="AK601",
            )

    def check(self, *, replaces: bool) -> None:
        entries = self._entries()
        if not entries:
            return
        files = parse_receipt(self.receipt()).get("files")
        if not replaces:
            problem = f"the output folder holds {listed(sorted(p.name for p in entries))}"
            expected = "an empty or new folder"
            hint = "choose another --out, or give --overwrite to replace an older output"
        elif files is None:
            problem = "--overwrite would remove a folder that adapterkit did not write"
            expected = "an older output (--overwrite replaces the whole folder)"
            hint = "remove the folder yourself, or choose another --out"
        elif unlisted := [name for name in sorted(self._files()) if not self._is_of(name, files)]:
            problem = "--overwrite would remove files that adapterkit did not write: "
            problem += ", ".join(unlisted[:6])
            expected = "only files that its receipt lists (--overwrite replaces the whole folder)"
            hint = "move them away, or choose another --out"
        else:
            return
        raise Refused(problem, expected=expected, where=str(self.out), hint=hint, code="AK601")

    def _is_of(self, name: str, files: Container[str]) -> bool:
        return (name in files or name == RECEIPT) and not (self.out / name).is_symlink()

    def _entries(self) -> list[Path]:
        """Return the content of the folder, without the control folder."""
        if not self.out.is_dir():
            return []
        own = (".adapterkit", "lost+found") if self.moves else (".adapterkit",)
        return [path for path in self.out.iterdir() if path.name not in own]

    def _files(self) -> list[str]:
        """Return every file of the folder, as a path in it."""
        files = []
        for top in self._entries():
            below = [top] if top.is_symlink() or not top.is_dir() else top.rglob("*")
            files += [
                p.relative_to(self.out).as_posix()
                for p in below
                if p.is_symlink() or not p.is_dir()
            ]
        return files

    def old_files(self) -> list[str]:
        return self._files() if self.moves else []

    def publish(self, stage: Stage) -> None:
        with storage_errors(self.out):
            if self.moves:
                self._move_into(stage)
            else:
                self._swap(stage)
                sync_folder(self.out.resolve().parent)

    def _swap(self, stage: Stage) -> None:
        final = self.out.resolve()
        if not self._entries():
            system.replace_empty(stage.path, final)
            return
        self.check(replaces=stage.replaces)
        try:
            system.exchange(stage.path, final)
        except OSError:
            # no exchange on this file system: for a moment there is no output, never a mixed one
            shutil.rmtree(self.control / "old", ignore_errors=True)
            system.replace_empty(final, self.control / "old")
            system.replace_empty(stage.path, final)

    def _move_into(self, stage: Stage) -> None:
        """Move the files into the folder. Files that make it loadable are removed first and moved
        last, because an old index over new shards loads and is silently wrong."""
        staged, there = stage.path / RECEIPT, self.out / RECEIPT
        receipt = parse_receipt(receipt_bytes(staged if staged.exists() else there))
        new = [*receipt["files"], RECEIPT]
        old = set(filter(is_plain_path, stage.journal()[-1]["old"])).difference(new)
        for name in (*new, *old):
            check_folder(self.out, (self.out / name).parent)
        for name in sorted({*new, *old}, key=_publish_order, reverse=True):
            if _publish_order(name) and (name in old or (stage.path / name).exists()):
                (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)
        self._move(stage, (name for name in new if not _publish_order(name)))
        for name in old:
            (self.out / name).unlink(missing_ok=True)
        sync_folders(self.out)
        for name in sorted(filter(_publish_order, new), key=_publish_order):
            self._move(stage, [name])
            sync_folder(self.out)

    def _move(self, stage: Stage, names: Iterable[str]) -> None:
        for name in names:
            if size_below(stage.path, name) is not None:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                system.replace(stage.path / name, self.out / name)


def _publish_order(name: str) -> int:
    """Weights and the rest 0, index 1, config 2, receipt 3."""
    configs = {"config.json": 2, "model_index.json": 2}
    return (configs | {RECEIPT: 3}).get(name, int(name.endswith(".index.json")))


def size_at(path: Path) -> int | None:
    """Return the bytes of a file, or of a link's target; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no system allows
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
