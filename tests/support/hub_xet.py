"""Xet's own store in a local folder, as hf_xet keeps it behind `local://`: what a Hub in Xet mode
needs of it. Clients read and write the folder by themselves; a commit names the sha256 only."""

import hashlib
import struct
from pathlib import Path

from tests.support.hub_store import Blob

LINE = 48  # bytes of a record in a file of metadata
END = b"\xff" * 32
VERIFIED, HAS_SHA256 = 1 << 31, 1 << 30


class Xet:
    """The store in a folder; `url` is what clients are told."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, f"local://{folder}"
        folder.mkdir(parents=True, exist_ok=True)

    def upload(self, blob: Blob) -> None:
        """Put in what the test commits itself."""
        import hf_xet

        with hf_xet.XetSession().new_upload_commit(endpoint=self.url) as commit:
            if isinstance(blob.held, bytes):
                commit.start_upload_bytes(blob.held, sha256=blob.sha256)
            else:
                commit.start_upload_file(str(blob.held), sha256=blob.sha256)

    def hashes(self) -> dict[str, tuple[str, int]]:
        """Xet's hash and the size of each file in the store, by sha256."""
        found: dict[str, tuple[str, int]] = {}
        for path in self.folder.glob("xet/xorbs/shards/*.mdb"):
            found |= _files(path.read_bytes())
        return found

    def download(self, xet_hash: str, size: int, into: Path) -> None:
        import hf_xet

        with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(into))

    def stored(self) -> int:
        """Bytes of all chunks, each once."""
        chunks = self.folder.glob("xet/xorbs/xorbs/default.*")
        return sum(path.stat().st_size for path in chunks if path.suffix != ".tagset")


def _files(shard: bytes) -> dict[str, tuple[str, int]]:
    """The first section of a file of metadata: of each file a record with its hash, a record for
    each run of chunks, as many again if verified, and a record with the sha256."""
    found, at = {}, LINE
    while (name := shard[at : at + 32]) != END:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        runs = [struct.unpack_from("<32sIIII", shard, at + LINE * (i + 1))[2] for i in range(count)]
        at += LINE * (1 + count * (2 if flags & VERIFIED else 1))
        if flags & HAS_SHA256:
            found[_hex(shard[at : at + 32])] = (_hex(name), sum(runs))
            at += LINE
    return found


def _hex(stored: bytes) -> str:
    """A hash is stored as four little-endian numbers and written as four big-endian ones."""
    return b"".join(stored[i : i + 8][::-1] for i in range(0, 32, 8)).hex()


def stand_in(sha256: str) -> str:
    """A hash of Xet's shape for a Hub without Xet: the real one lists one for every large file."""
    return hashlib.sha256(b"xet " + sha256.encode()).hexdigest()
