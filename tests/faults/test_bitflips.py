"""Random bits of an output flipped, one at a time: `verify` finds every one, and names the file and
the tensor."""

import contextlib
import random
from pathlib import Path

import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.system import system
from adapterkit.core.verify.verb import verify
from tests.support.usual import usual

RECEIPT = "adapterkit.json"


@pytest.fixture
def output(bench):
    bench.merge().succeeded()
    return bench.out


def tensors_of(path: Path) -> list[str | None]:
    """For every byte of a weights file the key of the tensor that it belongs to; None for the
    header and for other files."""
    keys: list[str | None] = [None] * path.stat().st_size
    if path.suffix == ".safetensors":
        for spec in read_header(LocalFolder(path.parent), path.name).tensors:
            keys[spec.start : spec.stop] = [spec.key] * spec.nbytes
    return keys


class Flip:
    """One bit of a file, turned over in a `with` block."""

    def __init__(self, path: Path, content: bytes, generator: random.Random):
        self.path, self.position, self.bit = (
            path,
            generator.randrange(len(content)),
            generator.randrange(8),
        )
        self.before = content[self.position]

    def write(self, byte: int) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.position)
            file.write(bytes([byte]))

    def __enter__(self) -> "Flip":
        self.write(self.before ^ 1 << self.bit)
        return self

    def __exit__(self, *_) -> None:
        self.write(self.before)

    def __str__(self) -> str:
        return f"bit {self.bit} of byte {self.position} of {self.path.name}"


@pytest.mark.parametrize("count", usual([500, 10_000], {500}))
def test_every_flip_is_found(output, monkeypatch, count: int):
    """One bit in every file but the receipt at once, each the only one in its file and each to be
    named; then one in the receipt, without which nothing else can be judged."""
    # the flips are in the system's cache, and the disk would be slow
    monkeypatch.setattr(system, "drop_cache", lambda descriptor: None)
    assert verify(output)["files"] == len(list(output.iterdir())) - 1
    generator, flips = random.Random(0), 0
    contents = {path: path.read_bytes() for path in sorted(output.iterdir())}
    tensors = {path: tensors_of(path) for path in contents}
    receipt = output / RECEIPT
    while flips < count:
        with contextlib.ExitStack() as stack:
            made = [
                stack.enter_context(Flip(p, c, generator))
                for p, c in contents.items()
                if p != receipt
            ]
            with pytest.raises(AdapterkitError) as caught:
                verify(output)
        for flip in made:
            lines = [
                line
                for line in str(caught.value).splitlines()
                if line.startswith(f"- {flip.path.name}:")
            ]
            assert len(lines) == 1, flip
            key = tensors[flip.path][flip.position]
            assert key is None or key in lines[0], (str(flip), lines)
        with (
            Flip(receipt, contents[receipt], generator) as flip,
            pytest.raises(AdapterkitError, match=RECEIPT),
        ):
            verify(output)
            raise AssertionError(str(flip))
        flips += len(contents)
    verify(output)


def test_other_damage_is_found(output):
    """Cut short, longer, gone, exchanged, and weights that nobody wrote."""
    for path in sorted(output.iterdir()):
        data = path.read_bytes()
        for other in (data[:-1], data + b"\0", b"", None, bytes(len(data))):
            path.unlink() if other is None else path.write_bytes(other)
            with pytest.raises(
                AdapterkitError, match=RECEIPT if path.name == RECEIPT else path.name
            ):
                verify(output)
            path.write_bytes(data)
    (output / "model-00004-of-00003.safetensors").write_bytes(data)
    with pytest.raises(AdapterkitError, match="does not list"):
        verify(output)


def test_an_error_on_reading(bench, output):
    """An unreadable file is a message, not a traceback."""
    target = output / "model-00002-of-00003.safetensors"
    data = target.read_bytes()
    target.unlink()
    target.mkdir()
    bench.run(["verify", str(output)]).failed_cleanly(target.name)
    target.rmdir()
    target.write_bytes(data)
    bench.run(["verify", str(output)]).succeeded()
