"""A right call of every verb, to change in one place."""

import inspect

import adapterkit

JOBS = {"finish", "run", "write_plan"}  # on plan files
VERBS = [
    name
    for name in adapterkit.__all__
    if inspect.isfunction(getattr(adapterkit, name)) and name not in JOBS
]


def arguments(calls, verb, out):
    """The right call as names and values."""
    positional, named = calls[verb]
    signature = inspect.signature(getattr(adapterkit, verb))
    given = dict(signature.bind_partial(*positional, **named).arguments)
    return given | ({"out": out} if "out" in signature.parameters else {})
