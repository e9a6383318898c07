"""Explain huggingface_hub's errors in plain words, without tokens, signed addresses or
tracebacks."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.errors import AdapterkitError, Damaged, Failed, Refused, shown


class UnusableAnswer(Exception):
    """An answer other than the one requested; its bytes are never used."""


class Unreachable(Failed):
    """No answer at all."""

    code = "AK703"


# Meanings of the library's errors: class, problem, expected, hint
Meaning = tuple[type[AdapterkitError], str, str, str]
NOT_A_HUB: Meaning = (
    Failed,
    "an answer that is not a Hub's",
    "the JSON and the headers of a Hub server",
    "check HF_ENDPOINT, and proxies or login pages on the way",
)
MEANINGS: dict[str | int, Meaning] = {  # by the name of its class, or by the status of the answer
    "GatedRepoError": (
        Refused,
        "access to this repository is restricted",
        "an account that its owners let in",
        "ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        Refused,
        "no such repository, or a private one; nor a file or folder of that name here",
        "a model repository that this account may read, or a path that exists",
        "check the name; for a private repository log in with `hf auth login` or set HF_TOKEN",
    ),
    "DisabledRepoError": (
        Refused,
        "the Hub has disabled this repository",
        "one in use",
        "see {page}",
    ),
    "RevisionNotFoundError": (
        Refused,
        "no such revision",
        "a branch, a tag or a commit of {repo}",
        "see {page}/tree/main for those there are",
    ),
    "RemoteEntryNotFoundError": (
        Damaged,
        "no such file in this revision",
        "a file of the repository",
        "see {page}/tree/{revision}",
    ),
    "HFValidationError": (
        Refused,
        "not a name that the Hub accepts",
        "`org/name`",
        "check the name",
    ),
    "FileMetadataError": NOT_A_HUB,
    "JSONDecodeError": NOT_A_HUB,
    "KeyError": NOT_A_HUB,
    401: (
        Refused,
        "the Hub does not accept these credentials",
        "a valid token, or none for a public repository",
        "log in again with `hf auth login`, or fix or unset HF_TOKEN",
    ),
    403: (
        Refused,
        "the Hub does not allow this to the account",
        "a token that may read the repository, or write to it when pushing",
        "create a token with those rights at https://huggingface.co/settings/tokens",
    ),
    404: (
        Refused,
        "nothing at this address of the Hub",
        "a file or repository",
        "check the name and HF_ENDPOINT",
    ),
    412: (
        Failed,
        "the repository has changed since this upload began",
        "one writer at a time (or the answer to an earlier try of this commit was lost)",
        "look at {page}/commits/main, then push again: what is there already is not uploaded twice",
    ),
    429: (
        Failed,
        "too many requests",
        "fewer for one account or address",
        "wait some minutes, log in, and run again",
    ),
}


def explain(error: BaseException, hub_id: HubId, file: str = "") -> AdapterkitError:
    """The error of a library call as one of ours."""
    while type(error).__name__ in ("LocalEntryNotFoundError", "RuntimeError") and error.__cause__:
        error = error.__cause__
    kind, problem, expected, hint = _meaning(error)
    names = {"repo": hub_id.repo, "revision": hub_id.revision or "main", "page": page(hub_id)}
    return kind(
        redact(problem),
        expected=redact(expected.format_map(names)),
        where=location(hub_id, file),
        hint=redact(hint.format_map(names)),
        code=kind.code or "AK702",
    )


@contextmanager
def explained_errors(hub_id: HubId) -> Iterator[None]:
    """Raise the library's errors as ours; for calls that huggingface_hub itself repeats."""
    try:
        yield
    except AdapterkitError:
        raise
    except Exception as error:  # the library raises errors of many others; `explain` names each
        raise explain(error, hub_id) from None


def _meaning(error: BaseException) -> Meaning:
    status = _status(error)
    for key in [c.__name__ for c in type(error).__mro__] + [status]:
        if key in MEANINGS:
            return MEANINGS[key]
    again = "run again: what is there already is not transferred twice"
    cached = "with a cached copy set HF_HUB_OFFLINE=1"
    if isinstance(error, UnusableAnswer):
        hint = "check HF_ENDPOINT, and proxies on the way"
        return Failed, f"{error} in answer to a range, each time", "exactly that range", hint
    if is_transport_error(error):
        hint = f"check the connection and the proxies; {cached}"
        return Unreachable, summary(error), "a network, or a cached copy", hint
    if status >= 500:
        hint = f"see https://status.huggingface.co, then {again}; {cached}"
        return Failed, summary(error), "a working Hub", hint
    if "Invalid metadata in README.md" in str(error):
        expected = "YAML that the Hub accepts at the head of the model card"
        return Refused, summary(error), expected, "fix README.md"
    if status == 400 and "LFS pointer" in summary(error):
        # the Hub deletes files without a commit after a while
        hint = "give --overwrite: the Hub has forgotten files that were sent some time ago"
        return Failed, summary(error), "files that were sent before", hint
    if status:
        return Failed, summary(error), "a successful answer", again
    if isinstance(error, OSError) and error.errno:
        hint = "free space, or set HF_HOME to a folder that can be written"
        return Failed, f"the local Hub cache: {error.strerror}", "a writable cache", hint
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return Failed, "a download of the wrong length", "the length that the Hub promised", again
    hint = f"{again}; HF_HUB_DISABLE_XET=1 transfers over plain HTTP"
    return Failed, summary(error), "a transfer without errors", hint


def _status(error: BaseException) -> int:
    """The status of the answer that the error is about; 0 without one."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_transport_error(error: BaseException) -> bool:
    """A request without an answer: refused, reset, cut off, timed out or never resolved."""
    # of httpx, or httpx2 from huggingface_hub 2 on
    return any(c.__name__ == "RequestError" for c in type(error).__mro__)


def summary(error: BaseException) -> str:
    """One line: the server's message, or what happened instead of an answer."""
    if isinstance(error, UnusableAnswer):
        return str(error)
    status = _status(error)
    text = getattr(error, "server_message", None) or "" if status else str(error)
    text = shown(" ".join(redact(text).split()))
    if status:
        return f"the Hub answered {status}" + (f": {text}" if text else "")
    if is_transport_error(error):
        return f"the Hub cannot be reached ({type(error).__name__}{': ' * bool(text)}{text})"
    return f"{type(error).__name__}: {text}"


def redact(text: str) -> str:
    """The text without tokens, passwords and the signatures of addresses."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_\w{8,}", "***", text)
    text = re.sub(r"(https?://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]++)(?:\?[^\s'\"]*+)?", r"\1", text)


def redact_record(record: logging.LogRecord) -> bool:
    """A filter of a logging handler: redacts the message and lets it pass."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep signed addresses out of huggingface_hub's log, and its bars off.

    The bars stay where HF_HUB_DISABLE_PROGRESS_BARS asks for them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils.logging import get_logger

    for handler in get_logger("huggingface_hub").handlers:  # which that import adds
        handler.addFilter(redact_record)  # the same function again is no second filter
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def page(hub_id: HubId) -> str:
    """The repository's address for people."""
    from huggingface_hub import constants

    return redact(f"{constants.ENDPOINT}/{hub_id.repo}")


def location(hub_id: HubId, file: str = "") -> str:
    """An error's `where`: the id, and the file in it."""
    return f"{hub_id}: {shown(file)}" if file else str(hub_id)
