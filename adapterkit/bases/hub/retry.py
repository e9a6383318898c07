"""Repeat requests while the server is busy, unreachable or answers something else.

huggingface_hub's own `http_backoff` and `http_stream_backoff` do not serve here (tried with
2.4): they wrap one request, not the API methods that send most of ours, and they look at the status
only: a body that breaks off ends in "RuntimeError: generator didn't stop after throw()", a range
other than the one requested is a success, and a server's `Retry-After` has no upper limit.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from adapterkit.bases.hub.errors import (
    UnusableAnswer,
    explain,
    is_transport_error,
    location,
    summary,
)
from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.errors import AdapterkitError

TRIES = 5  # of one request, the first one included
WAIT = 0.5  # seconds before the second try, doubled before each later one
MAX_WAIT = 120.0  # seconds, whatever the server asks for
BUSY = (408, 429, 500, 502, 503, 504)

log = logging.getLogger(__name__)
T = TypeVar("T")


def retry(request: Callable[[], T], hub_id: HubId, file: str = "") -> T:
    """The result of `request`, called up to `TRIES` times; raises `AdapterkitError` only."""
    for attempt in range(1, TRIES + 1):
        try:
            return request()
        except AdapterkitError:
            raise
        except Exception as error:  # from any library below
            wait = seconds_to_wait(error, attempt)
            if wait is None or attempt == TRIES:
                raise explain(error, hub_id, file) from None
            log.warning(
                "%s: %s; try %d of %d in %.1f s",
                location(hub_id, file),
                summary(error),
                attempt + 1,
                TRIES,
                wait,
            )
            time.sleep(wait)
    raise AssertionError("TRIES is at least 1")


def seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next try; None where it would fail in the same way."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of an upload in a thread of the library
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    # the second: another thread met an error and closed the session that all threads share
    transient = ("Consistency check failed", "the client has been closed")
    lost = (
        isinstance(error, UnusableAnswer)
        or is_transport_error(error)
        or any(text in str(error) for text in transient)
    )
    if not lost and status not in BUSY:
        return None
    headers = getattr(response, "headers", {})
    limit = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) if status == 429 else None
    requested = limit.group(1) if limit else headers.get("retry-after", "")
    seconds = float(requested) if requested.isdecimal() else 0.0
    return min(MAX_WAIT, max(seconds, WAIT * 2 ** (attempt - 1)))
