"""Merges that are refused."""

import pytest

from adapterkit.core.errors import Failed, Refused
from tests.support import oracle


def refused(base, *adapters, out, match, kind=Refused, **options):
    """The refusal's text; its four parts are there, and nothing was written."""
    with pytest.raises(kind, match=match) as caught:
        oracle.merge(base, *adapters, out=out, **options)
    assert not out.exists() and not [
        f for f in out.parent.iterdir() if out.name in f.name and f != out
    ]
    text = str(caught.value)
    assert "expected: " in text or isinstance(caught.value, Failed), text
    return text
