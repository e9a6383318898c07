"""The types of what verbs return, for the type checker (pyproject's `tool.pyright` includes this
file): a `Receipt`, or with `dry_run=True` a `Plan`. Nothing here is run."""

from typing import assert_type

import adapterkit
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt


def returned(flag: bool) -> None:
    assert_type(adapterkit.merge("base", ["lora"], out="out"), Receipt)
    assert_type(adapterkit.merge("base", ["lora"], out="out", dry_run=True), Plan)
    assert_type(adapterkit.quantize("base", out="out", to="nf4", dry_run=False), Receipt)
    assert_type(adapterkit.loftq("base", out="out", rank=4, dry_run=True), Plan)
    assert_type(adapterkit.stats("base", data="a.txt", out="out"), Receipt)
    assert_type(adapterkit.stats("base", data="a.txt", out="o", dry_run=True), Plan)
    assert_type(
        adapterkit.combine(["a", "b"], out="out", method="linear", dry_run=flag), Receipt | Plan
    )
    adapterkit.merge("base", ["lora"], out="out", dtyp="bf16")  # pyright: ignore[reportCallIssue]
