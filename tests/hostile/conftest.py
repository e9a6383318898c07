"""What the hostile suites share: their folder on the path (for `forge`), and a watch on time and
memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def frugal() -> Callable:
    """A `with` block that may take a second and 100 MB more than were in use before it."""
    import resource  # here: quick tests of this folder run on Windows, too

    @contextmanager
    def watch(seconds: float = 1.0, megabytes: int = 100) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        # of this process alone: other tests run beside it
        before, began = (_status("VmHWM"), time.process_time())
        limits = resource.getrlimit(resource.RLIMIT_AS)
        # no harm to others
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") * 1024 + (2 << 30), limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.process_time() - began < seconds
        assert _status("VmHWM") - before < megabytes * 1024

    return watch


@pytest.fixture
def since_start(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Seconds since the process that renders templates or runs a tokenizer had started, which takes
    a loaded machine many."""
    from adapterkit.verbs.stats.data import templates

    began, start = list[float](), templates._started

    def started(*arguments) -> object:
        process = start(*arguments)
        began.append(time.monotonic())
        return process

    monkeypatch.setattr(templates, "_started", started)
    return lambda: time.monotonic() - began[0]


def _status(name: str) -> int:
    """This process's largest resident size so far (VmHWM), or its address space (VmSize), in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
