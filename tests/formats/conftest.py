import pytest

from adapterkit.checkpoint import disk


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read at once."""
    monkeypatch.setattr(disk, "DURABLE", False)
