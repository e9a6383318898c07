"""Options of every verb: what is plainly meant is done, all else is refused by name, before
anything is written."""

import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.options import flag_of, integer, option_of, parse_size, weighted
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import COUNT
from adapterkit.core.registry import verb_named
from adapterkit.core.verb import fields_of
from tests.support.calls import VERBS, arguments

pytestmark = pytest.mark.quick

LATER = {"push"}  # of a finished output: needs a network


@pytest.mark.parametrize("verb", VERBS)
def test_a_refusal_names_the_option(verb, calls, tmp_path):
    """And comes before anything is read, whatever else is wrong."""
    function, fields = getattr(adapterkit, verb), verb_named(verb).__dataclass_fields__
    written = lambda name: (*option_of(fields[name]).flags, flag_of(name))[0] + " "
    for name in inspect.signature(function).parameters:
        given = arguments(calls, verb, tmp_path / "out") | {name: object()}
        with pytest.raises(adapterkit.Refused) as caught:
            function(**given)
        assert written(name) in str(caught.value)
    names = [
        name
        for name in inspect.signature(function).parameters
        if name not in ("adapters", "general")
    ]
    with pytest.raises(adapterkit.AdapterkitError) as caught:
        function(**(arguments(calls, verb, tmp_path / "out") | dict.fromkeys(names, object())))
    assert all(written(name) in str(caught.value) for name in names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_one_of_the_command(verb):
    """With its words, but for those of Python alone; a source that is required is an argument."""
    from adapterkit.cli import main

    params = {param.name: param for param in main.commands[verb].params}
    for field in fields_of(verb_named(verb)):
        option = option_of(field)
        assert (field.name in params) == (bool(option.help) or not field.kw_only), field.name
        if isinstance(option.check.words, tuple) and option.check.words:
            assert tuple(params[field.name].type.choices) == option.check.words
        elif callable(option.check.words):
            assert [*params[field.name].type.names()] == [*option.check.words()]


@pytest.mark.parametrize("how", [
    lambda a, b: {a: 0.5, b: -2}, lambda a, b: {str(a): np.float32(0.5), str(b): "-2"}, lambda a,
    b: [(a, 0.5), (str(b), -2)], lambda a, b: ((a, 0.5), [b, -2]), lambda a,
    b: iter([f"{a}=0.5", (b, torch.tensor(-2))]),
], ids=["mapping", "texts", "pairs", "tuples", "mixed"])  # fmt: skip
def test_weights_however_they_are_given(how, calls, tmp_path):
    (base, one), (_, two) = calls["merge"][0], calls["combine"][0][0]
    adapterkit.merge(base, [f"{one}=0.5", f"{two}=-2"], out=tmp_path / "text")
    receipt = adapterkit.merge(base, how(one, two), out=tmp_path / "out")
    assert receipt.data["recipe"]["options"]["weights"] == [0.5, -2.0]
    assert all(torch.equal(value, load_file(tmp_path / "text/model.safetensors")[key])
               for key, value in load_file(tmp_path / "out/model.safetensors").items())  # fmt: skip
    metrics = adapterkit.combine(how(one, two), method="linear", out=tmp_path / "combined").data
    assert [a["weight"] for a in metrics["adapters"]] == [0.5, -2.0]


def test_weights_of_one_adapter(calls, tmp_path):
    base, one = calls["merge"][0]
    for number, adapters in enumerate(
        [{one: 0.5}, (one, 0.5), [(one, 0.5)], f"{one}=0.5", Path(f"{one}=0.5")]
    ):
        receipt = adapterkit.merge(base, adapters, out=tmp_path / str(number))
        assert receipt.data["recipe"]["options"]["weights"] == [0.5]
    assert weighted(("a", "b")) == [("a", None), ("b", None)]
    assert weighted(("a", Path("b"))) == [("a", None), (Path("b"), None)]
    assert weighted(("a", 0.5)) == [("a", 0.5)]


@pytest.mark.parametrize(
    "verb, name",
    [
        ("subtract", "adapters"),
        ("subtract", "general"),
        ("arrow", "adapters"),
        ("arrow", "general"),
    ],
)
def test_verbs_without_weights_refuse_them(verb, name, calls, tmp_path):
    """But for 1, which is what they do."""
    given = arguments(calls, verb, tmp_path / "out") | (
        {"general": [calls["merge"][0][1]]} if name == "general" else {}
    )
    sources = list(given[name]) if isinstance(given[name], list) else [given[name]]
    with pytest.raises(adapterkit.Refused, match=f"--{name} .*\n.*no weights"):
        getattr(adapterkit, verb)(**(given | {name: dict.fromkeys(sources, 0.5)}))
    getattr(adapterkit, verb)(**(given | {name: dict.fromkeys(sources, 1)}))


def test_the_hash_option_decides_the_hashes(calls, tmp_path):
    base, one = calls["merge"][0]
    with pytest.raises(adapterkit.Refused, match="--hash 'SHA256'"):
        adapterkit.merge(base, one, out=tmp_path / "out", hash="SHA256")
    assert adapterkit.merge(base, one, out=tmp_path / "out", hash="none").data["hash"] == "none"


@pytest.mark.parametrize("verb, options, same", [
    ("init", {"rank": 2.0, "alpha": "4"}, {"rank": 2, "alpha": 4.0}),
    ("init", {"rank": np.int64(2), "dtype": "float16"}, {"rank": 2, "dtype": "fp16"}),
    ("init", {"targets": ["q_proj", "k_proj"]}, {"targets": "q_proj,k_proj"}),
    ("loftq", {"bits": "8", "block_size": None}, {"bits": 8, "block_size": None}),
    ("quantize", {"to": "nf4", "block_size": "128", "double_quant": 1},
     {"to": "nf4", "block_size": 128, "double_quant": True}),
    ("merge", {"dtype": torch.float32, "max_shard_size": 20_000},
     {"dtype": "fp32", "max_shard_size": "20KB"}),
    ("resize", {"rank": None, "energy": np.float32(0.5), "dtype": "bfloat16"},
     {"rank": None, "energy": 0.5, "dtype": "bf16"}),
    ("resize", {"rank": None, "max_size": 2e6}, {"rank": None, "max_size": "2MB"}),
    ("combine", {"density": "0.5", "seed": np.uint8(3)}, {"density": 0.5, "seed": 3}),
    ("extract", {"include": re.compile("q_proj")}, {"include": "q_proj"}),
], ids=str)  # fmt: skip
def test_spelled_values_equal_python_ones(verb, options, same, calls, tmp_path):
    function = getattr(adapterkit, verb)
    for name, given in (("one", options), ("two", same)):
        function(**(arguments(calls, verb, tmp_path / name) | given))
    files = sorted(
        p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.safetensors")
    )
    assert files and all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_errors_are_the_package_s():
    from adapterkit.core import errors

    for name in (
        "AdapterkitError",
        "Refused",
        "Damaged",
        "Failed",
        "Unrecoverable",
        "Interrupted",
        "MultipleErrors",
    ):
        assert getattr(adapterkit, name) is getattr(errors, name) and name in dir(adapterkit)


def test_sizes_are_bytes():
    assert parse_size(5_000_000_000) == parse_size("5GB") == parse_size(np.int64(5 * 10**9))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("out, words", [
    ("file", "a file of this name"), ("file/sub", "file is a file"),
    ("file/sub/deeper", "file is a file"), ("link", "is a link"), (".", "contains the input"),
    pytest.param(
        "/dev/null/x", "null is a file",
        marks=pytest.mark.skipif(os.name == "nt", reason="Windows has no such file"),
    ),
])  # fmt: skip
def test_outputs_that_cannot_be(out, words, dry, calls, tmp_path, monkeypatch):
    base, one = calls["merge"][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine", "utf-8")
    try:
        (tmp_path / "link").symlink_to("nowhere")
        (tmp_path / "lora").symlink_to(one, target_is_directory=True)
    except OSError:
        pytest.skip("links are not for every user of Windows")
    with pytest.raises(adapterkit.Refused, match=words):
        adapterkit.merge(
            base, tmp_path / "lora", out=out if out != "." else one.parent, dry_run=dry
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "lora"]


def test_dry_run_checks_too(calls, tmp_path):
    base, one = calls["merge"][0]
    assert isinstance(adapterkit.merge(base, one, out=tmp_path / "out", dry_run=True), Plan)
    for wrong in ({"engine": "slurm"}, {"device": "tpu"}, {"hash": "md5"}):
        with pytest.raises(adapterkit.Refused):
            adapterkit.merge(base, one, out=tmp_path / "out", dry_run=True, **wrong)


def test_integers_are_checked_at_their_bounds():
    """The last that is taken, and the first that is not."""
    for check, last, beyond in [
        (integer(), 2**31 - 1, 2**31), (integer(), 1, 0), (integer(0), 0, -1),
        (integer(1, 8), 8, 9),
    ]:  # fmt: skip
        assert check.read(last) == last and not check.fits(beyond)


def test_counts_of_receipts_are_whole_numbers():
    assert COUNT.fits(0) and COUNT.fits(2**63 - 1)
    assert not any(COUNT.fits(value) for value in (-1, 2**63, 1.0, True, "1", None))
