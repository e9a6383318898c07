"""Refuse methods that a merge cannot apply, and options that a method does not read, with what
would do it."""

import itertools
from typing import cast

from adapterkit.core.commands import command, line
from adapterkit.core.errors import AdapterkitError, Refused, alternatives
from adapterkit.core.merge.verb import MergeOptions, merge_methods
from adapterkit.core.registry import LIFTED, declarations
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.combine.module_methods import method_of


def mergeable(options: MergeOptions, count: int) -> Method:
    """The method of a merge of `count` adapters; `Refused` for one that only `combine` has."""
    name = cast(str, options.method)
    by_inputs = declarations("combinations")[name].constants["acts_on"] == "covariances"
    if by_inputs:
        raise Refused(
            f"{name} needs the layers' inputs, which a merge does not read",
            expected=alternatives(name, merge_methods()),
            where=f"--method {name}",
            hint=_combine_first(options, count),
            code="AK101",
        )
    method = method_of(name, options)
    if method.scales:
        raise Refused(
            f"--method {name} by a norm over all modules",
            expected="a method module by module",
            where="options",
            hint=_combine_first(options, 0),
            code="AK401",
        )
    return method


def _combine_first(options: MergeOptions, statistics: int) -> str:
    """The commands that combine the adapters of a merge, with so many files of statistics, and
    merge the result."""
    settings = {"density": options.density, "majority": options.majority}
    given = [(f"--{key}", str(value)) for key, value in settings.items() if value is not None]
    given += [("--set", f"{key}={value}") for key, value in (options.settings or {}).items()]
    given += [("--weight-for", rule) for rule in options.weight_for]
    given += [("--stats", "FILE")] * statistics
    combine = command("adapterkit combine", "ADAPTERS=W", method=options.method)
    words = line([*itertools.chain(*given), "--out", "combined"])
    return (
        "combine them, then merge the result"
        + "; give one FILE of `adapterkit stats` for each adapter" * bool(statistics)
        + f"\n{combine} {words}"
        + "\nadapterkit merge BASE combined --out merged"
    )


def explain(error: AdapterkitError, name: str) -> None:
    """Say in an error about a method's options what a share is, and which methods read an option
    that this one does not."""
    known = declarations("combinations")
    flags = {f"--{option} is unknown": option for option in LIFTED}
    for one in getattr(error, "errors", (error,)):
        if one.problem == "--density is missing":
            one.problem, one.where = f"{name} needs --density", "options"
            one.expected = "the share of elements to keep, 0 to 1"
            one.hint = "give it, for example --density 0.2"
        elif option := flags.get(one.problem):
            readers = [method for method, its in known.items() if option in its.options]
            one.problem, one.where = f"{name} does not read --{option}", "options"
            one.expected = f"--{option} with {', '.join(readers[:-1])} or {readers[-1]}"
            one.hint = "remove it, or give one of these methods"
