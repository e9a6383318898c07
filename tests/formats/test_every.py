"""The laws of formats, for every file in formats/ and every golden file of theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import AdapterkitError, Refused
from adapterkit.formats.library import formats
from adapterkit.formats.record import Contents
from adapterkit.formats.schema import Format
from adapterkit.verbs.formats import detect_format
from tests.support.adapter_samples import (
    GOLDEN,
    Sample,
    all_samples,
    contents_of,
    deltas,
    samples,
)

SAMPLES = all_samples()
WRITTEN = [name for name, form in formats().items() if form.writes]
# Relative error of one rounding in the format of the factors; a few of them at most
ROUNDING = {"F32": 2.0**-22, "F16": 2.0**-9, "BF16": 2.0**-6, "F64": 2.0**-50}


def convert(sample: Sample, to: str, out: Path, **more: Any) -> Path:
    """The sample in another format; a file where the format has no settings beside it."""
    form = formats()[to]
    if not form.file.config:
        out = out.with_name(f"{out.name}{Path(form.file.name).suffix}")
    adapterkit.convert(sample.path, to=to, out=out, **(sample.options | more))
    return out


def weights(path: Path, form: Format) -> Path:
    return path / form.file.name if path.is_dir() else path


def test_every_format_has_a_golden_file_and_every_golden_file_a_format():
    assert not [name for name in formats() if not samples(name)]
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= set(formats())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_a_golden_file_is_recognized_and_read_whole(sample: Sample):
    document = detect_format(sample.path)
    assert document["format"] == sample.form
    contents = contents_of(sample.path, **sample.options)
    assert contents.modules
    assert all(value.difference(value) == 0 for value in deltas(contents).values())


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.form in WRITTEN], ids=lambda sample: sample.id
)
def test_written_again_it_is_the_file(sample: Sample, tmp_path: Path):
    """Every tensor by name, dtype and bytes, and the settings."""
    form = formats()[sample.form]
    out = convert(sample, sample.form, tmp_path / "again")
    old, new = weights(sample.path, form), weights(out, form)
    if form.file.container != "safetensors":
        assert old.read_bytes() == new.read_bytes()
        return
    before, after = load_file(old), load_file(new)
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert tensor.equal(after[key]), key
    with safe_open(old, "pt") as one, safe_open(new, "pt") as two:
        kept = {
            key: value
            for key, value in (one.metadata() or {}).items()
            if any(pattern.search(key) for pattern in form.metadata.carry)
        }
        assert kept.items() <= (two.metadata() or {}).items()


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_every_pair_keeps_every_delta_or_is_refused(sample: Sample, to: str, tmp_path: Path):
    source = contents_of(sample.path, **sample.options)
    form = formats()[to]
    lacking = missing(source, form)
    if lacking:
        with pytest.raises(Refused):
            convert(sample, to, tmp_path / "out")
        assert not list(tmp_path.iterdir()), lacking
        return
    out = convert(sample, to, tmp_path / "out")
    assert_same(source, contents_of(out, **sample.options), ROUNDING["F32"])


def missing(contents: Contents, form: Format) -> list[str]:
    """What of the contents a format has no place for, by its file."""
    raise NotImplementedError


def assert_same(source: Contents, target: Contents, tolerance: float) -> None:
    before, after = deltas(source), deltas(target)
    assert set(before) == set(after)
    far = {name: value.difference(after[name]) for name, value in before.items()}
    assert max(far.values()) <= tolerance, {k: v for k, v in far.items() if v > tolerance}
