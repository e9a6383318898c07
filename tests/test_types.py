"""What type checkers and people learn of calls: `typed_calls.py` has every name of the package, and
mypy and pyright read it in `.ci/run`; a wrong name is a `TypeError` of the verb."""

import ast
import collections.abc
import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest

import adapterkit
from adapterkit import runtime
from adapterkit.core.options import option_of
from adapterkit.core.registry import verb_named
from adapterkit.core.verb import Verb, WritingVerb
from adapterkit.doors import VERBS as HOMES
from tests.support.documents import ROOT

CALLS = Path(__file__).with_name("typed_calls.py")
CI = ROOT / ".ci" / "run"
VERBS: list[type[Verb]] = [verb_named(name) for name in HOMES]
SEVERAL = "targets"  # the kind of a check that takes a list too


def test_every_name_of_the_package_is_in_the_calls_that_are_checked():
    """Errors apart, which have one shape."""
    tree = ast.parse(CALLS.read_text("utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = [name for name in adapterkit.__all__ if not name.startswith("__")]
    errors = {n for n in names if isinstance(value := getattr(adapterkit, n), type) and
              issubclass(value, Exception)}  # fmt: skip
    methods = [name for name, value in vars(runtime.Adapters).items() if name[0] != "_"]
    assert not {*names, *runtime.__all__, *methods} - errors - used


def test_both_checkers_read_them():
    """Strictly, in a folder from which they see the installed wheel alone."""
    text = CI.read_text("utf-8")
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    _, _, of_the_user = text.partition(
        'cp tests/typed_calls.py "$work/user"\n    cd "$work/user"\n'
    )
    for words in ("pyright", "mypy --strict"):
        assert re.match(rf"(?s).*?^ *{words} .*?python", of_the_user, re.MULTILINE), words
    assert CALLS.read_text("utf-8").startswith("# pyright: strict\n")
    assert settings.count('"tests/typed_calls.py"') == 2 and '"mypy>=' in settings


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_an_option_that_takes_several_values_is_typed_so(verb: type[Verb]):
    for field in dataclasses.fields(verb):
        check = option_of(field).check
        if not (check.several or check.kind == SEVERAL):
            continue
        kinds = typing.get_args(field.type) or (field.type,)
        origins = {typing.get_origin(kind) or kind for kind in (*kinds, field.type)}
        assert origins & {collections.abc.Sequence, collections.abc.Iterable}, field.name


@pytest.mark.parametrize("call, message", [
    (lambda: adapterkit.merge("B", ["a"], out="m", dtyp="bf16"),
     "merge() has no option dtyp; did you mean 'dtype'?"),
    (lambda: adapterkit.merge("B", ["a"], ot="m"), "merge() has no option ot; did you mean 'out'?"),
    (lambda: adapterkit.inspect("a", xyzzy=1), "inspect() has no option xyzzy"),
    (lambda: adapterkit.merge("B", ["a"]), "merge() missing a required argument: 'out'"),
    (lambda: adapterkit.merge("B", ["a"], "m", out="m"), "merge() too many positional arguments"),
    (lambda: adapterkit.write_plan("p.json", "merge", "B", ["a"], out="m", dtyp="bf16"),
     "merge() has no option dtyp; did you mean 'dtype'?"),
])  # fmt: skip
def test_a_wrong_name_is_a_type_error_of_the_verb(call, message: str):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).replace("keyword-only ", "") == message


def test_a_plan_as_text_is_a_summary(llama, lora, tmp_path):
    plan = adapterkit.merge(llama, [lora], out=tmp_path / "out", max_shard_size="1GB", dry_run=True)
    (line, *notes), totals = str(plan).splitlines(), plan.totals()
    assert line.startswith(f"merge: 14 of {totals['tensors']} tensors changed; ")
    assert notes == [f"note: {note}" for note in plan.notes]
    receipt = adapterkit.merge(llama, [lora], out=tmp_path / "out")
    assert len(repr(receipt)) < 300 and str(tmp_path / "out") in repr(receipt)


def test_every_type_of_a_signature_is_on_the_page():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    for verb in (verb for verb in VERBS if issubclass(verb, WritingVerb)):
        assert inspect.signature(verb.run).return_annotation == "Receipt | Plan"
    for name in ("Plan", "Receipt", "Progress"):
        assert f"\n### {name}" in page and name in adapterkit.__all__
