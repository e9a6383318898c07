"""Refusals, for one release, of texts that mean other modules than they did: regular expressions of
--targets, --exclude and REGEX=VALUE were searched in names, and of several rules the last counted.

With the next release this file goes, and the calls of its functions."""

import re
from collections.abc import Sequence

from adapterkit.adapters.targets import ENDING, NamedBy
from adapterkit.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.patterns import matcher
from adapterkit.planning.targets.values_by_regex import Rule, V

# regular expressions that mean the same when they are searched
SEARCHED, WHOLE, END = ".*(?:{}).*", "^(?:{})$", r"^(?:.*\.)?(?:{})$"
AMONG = r"^(?=.*(?:{}))(?:.*\.)?(?:{})$"
EXPECTED = "one meaning: a text is for whole names or their ends, as in PEFT; it was searched"


def text_readings(
    option: str,
    text: str,
    entries: str | Sequence[str],
    names: Sequence[str],
    others: Sequence[str] = (),
) -> list[AdapterkitError]:
    """The refusal of a text that means others of the names, by its entries, than a search of it.

    `others`: names that it must not mean."""
    was_found = matcher(text, option)
    before = list(filter(was_found, names))
    now = list(filter(NamedBy(entries, option), names))
    if before == now or not before:  # a list with commas was found in no name, and refused
        return []
    if isinstance(entries, str):
        whole = WHOLE.format(text)
    else:
        whole = END.format("|".join(map(re.escape, entries)))
    search = SEARCHED.format(text)
    if any(map(was_found, others)):
        search = AMONG.format(text, "|".join({name.rpartition(".")[2]: 0 for name in before}))
    return [_changed(f"{option} {shown(text)!r}", now, before, whole, search)]


def rule_readings(
    option: str, rules: Sequence[Rule[V]], names: Sequence[str]
) -> list[AdapterkitError]:
    """The refusals of rules that give some of the names other values than they did."""
    found = [list(filter(matcher(pattern, option), names)) for pattern, _ in rules]
    ending = [list(filter(matcher(pattern, option, ENDING), names)) for pattern, _ in rules]
    values = [value for _, value in rules]
    last = {name: value for value, its in zip(values, found, strict=True) for name in its}
    first = {
        name: value
        for value, its in reversed(list(zip(values, ending, strict=True)))
        for name in its
    }
    if first == last:
        return []
    errors = Problems()
    for number, (pattern, value) in enumerate(rules):
        now, before = ending[number], found[number]
        if now != before:
            whole, search = (f"{form.format(pattern)}={value}" for form in (END, SEARCHED))
            errors.append(_changed(f"{option} {pattern}={value}", now, before, whole, search))
        for later, (other, its) in enumerate(rules[number + 1 :], number + 1):
            both = [name for name in now if name in ending[later]]
            if both and value != its:
                errors.append(_overlapping(option, rules[number], (other, its), both))
    return errors


def layers_readings(now: Sequence[str], before: Sequence[str]) -> list[AdapterkitError]:
    """The refusal of --layers that means other names than the first numbers in them did."""
    if now == before or not before:
        return []
    problem = f"--layers means {_listed(now)}, and meant {_listed(before)}"
    expected = "names with one number: it is the one after a list of layers, as in PEFT"
    hint = "name the layers in --targets"
    return [Refused(problem, expected=expected, where="options", hint=hint)]


def _changed(
    problem: str, now: Sequence[str], before: Sequence[str], whole: str, search: str
) -> Refused:
    return Refused(
        f"{problem} means {_listed(now)}, and meant {_listed(before)}",
        expected=EXPECTED,
        where="options",
        hint=f"write '{whole}' for the former, '{search}' for the latter",
    )


def _listed(names: Sequence[str]) -> str:
    return listed(names) or "no module"


def _overlapping(option: str, one: Rule, other: Rule, both: Sequence[str]) -> Refused:
    """The refusal of two rules that match the same modules with different values."""
    (first, value), (second, its) = one, other
    without = [
        f"^(?!(?:.*\\.)?(?:{out})$)(?:.*\\.)?(?:{pattern})$={number}"
        for out, pattern, number in ((first, second, its), (second, first, value))
    ]
    return Refused(
        f"{option} {first}={value} and {second}={its} both match {listed(both)}",
        expected="one rule for a module: the first counts, as in PEFT; it was the last",
        where="options",
        hint=f"write the second as '{without[0]}' for {value}, or the first as '{without[1]}' for "
        f"{its}",
    )
