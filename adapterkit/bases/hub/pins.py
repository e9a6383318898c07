"""The commits that the revisions of a job's inputs stand for: its first run notes them, and a run
that resumes it reads the same ones, wherever the branches are by then."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from adapterkit.core.checkpoint.hub_ids import HubId

Pins = dict[str, str]  # `org/name[@revision]` -> commit

_pins: ContextVar[Pins | None] = ContextVar("pins", default=None)


@contextmanager
def pinned(commits: Pins) -> Iterator[Pins]:
    """Revisions in `commits` are read at these commits; others that are read join them."""
    token = _pins.set(commits)
    try:
        yield commits
    finally:
        _pins.reset(token)


def are_pinned() -> bool:
    """Whether a job has begun to note what it reads."""
    return _pins.get() is not None


def current_pins() -> Pins:
    """All revisions that the job has read so far, with their commits."""
    return dict(_pins.get() or {})


def pinned_id(hub_id: HubId) -> HubId:
    """The Hub id at its commit where that is known."""
    commit = (_pins.get() or {}).get(_name(hub_id))
    return HubId(hub_id.repo, commit, hub_id.subfolder) if commit else hub_id


def note(hub_id: HubId, commit: str) -> None:
    """The commit that was found for a Hub id."""
    pins = _pins.get()
    if pins is not None:
        pins.setdefault(_name(hub_id), commit)


def _name(hub_id: HubId) -> str:
    return str(HubId(hub_id.repo, hub_id.revision))
