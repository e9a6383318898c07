"""Mutated files of every format: each is converted to what it says, or refused, and nothing of a
refused one is left.

The usual run takes a few of each format; `pytest -m slow tests/fuzz/test_formats.py` 1,000.
"""

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterkit
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents
from adapterkit.core.errors import AdapterkitError
from tests.support.adapter_samples import (
    Delta,
    Sample,
    comparable,
    contents_of,
    deltas,
    read_back,
    samples,
)

from . import mutations
from .mutations import Files

WRITTEN = sorted(name for name, form in formats().items() if form.writes)
USUAL, MANY = 6, 1000  # mutants of each format
# relative error of a scale that is folded into factors, by their dtype
ROUNDING = {"F64": 1e-9, "F32": 1e-6, "F16": 2.0**-8, "BF16": 2.0**-5}


def files_of(sample: Sample) -> Files:
    """A sample in memory."""
    form = formats()[sample.form]
    if sample.path.is_file():
        return Files(sample.path.name, sample.path.read_bytes())
    name, (config, *others) = form.file.name, form.file.config
    settings = (sample.path / config).read_bytes()
    more = {other: (sample.path / other).read_bytes() for other in others}
    return Files(name, (sample.path / name).read_bytes(), config, settings, more)


def save(files: Files, folder: Path) -> Path:
    """The files in a folder; what a caller names."""
    folder.mkdir()
    (folder / files.name).write_bytes(files.weights)
    for name, data in files.others.items():
        (folder / name).write_bytes(data)
    if files.config:
        (folder / files.config).write_bytes(files.settings)
    if files.config or files.others:
        return folder
    return folder / files.name


def mutants(name: str, first: int, count: int) -> Iterator[tuple[int, Sample, Files]]:
    """(seed, sample, mutant) of a format, its samples in turn."""
    known = [(sample, files_of(sample)) for sample in samples(name)]
    for seed in range(first, first + count):
        sample, files = known[seed % len(known)]
        yield seed, sample, mutations.mutant(files, f"{name} {seed}")


def check(seed: int, sample: Sample, files: Files, folder: Path) -> bool:
    """Convert a mutant, and compare; whether it was converted."""
    draw = random.Random(f"{sample.id} {seed}")
    to = draw.choice([sample.form, "peft", *WRITTEN])
    to = to if formats()[to].writes else draw.choice(WRITTEN)
    source = save(files, folder / "source")
    ending = "" if formats()[to].file.config else Path(formats()[to].file.name).suffix
    out = folder / ("out" if draw.random() < 0.5 else f"out{ending}")
    try:
        adapterkit.convert(source, to=to, out=out, hash="none", **sample.options)
    except AdapterkitError as error:
        assert str(error)
        assert [path.name for path in folder.iterdir()] == ["source"], "something is left"
        return False
    left = {path.name for path in folder.iterdir()} - {"source", out.name}
    assert left <= {f"{out.name}.adapterkit.json"}, left
    stacked = sample.is_in_peft_layout
    contents = contents_of(source, stacked=stacked, **sample.options)
    before = deltas(contents)
    check_keys_are_used(files, contents_of(source, **sample.options))
    check_unchanged_modules(sample, files, contents, before)
    if sample.is_in_peft_layout:
        before = deltas(contents_of(source, stacked=True, **sample.options))
    check_output(before, deltas(read_back(out, to, contents, sample)), files)
    return True


def keys_of(module: AdapterModule) -> set[str]:
    """The keys of the file that a module is read from."""
    keys = {spec.key for part in module.parts.values() for spec in part.reads}
    if module.stored_alpha:
        keys |= {spec.key for spec in module.stored_alpha.expression.reads}
    return keys


def check_keys_are_used(files: Files, contents: Contents) -> None:
    """Every key of the file is read by a module."""
    read = {key for module in contents.modules for key in keys_of(module)}
    unused = set(mutations.parse(files).tensors) - read
    assert not unused, unused


def check_unchanged_modules(
    sample: Sample, files: Files, contents: Contents, now: dict[str, Delta]
) -> None:
    """Modules all of whose tensors are the original's mean what they meant there."""
    original, changed = mutations.parse(files_of(sample)), mutations.parse(files)
    settings = (files_of(sample).settings, original.metadata)
    if settings != (files.settings, changed.metadata):
        return  # a plain statement, perhaps of another scale
    same = {key for key, t in original.tensors.items() if changed.tensors.get(key) == t}
    stacked = sample.is_in_peft_layout
    unchanged = contents_of(sample.path, stacked=stacked, **sample.options)
    reference = deltas(unchanged)
    own = {(m.name, m.kind, m.depth): keys_of(m) for m in unchanged.modules}
    for module in contents.modules:
        keys = keys_of(module)
        whole = keys == own.get((module.name, module.kind, module.depth))  # of a stack, all experts
        names = [name for name in now if f":{module.name}:{module.kind}:" in name]
        for name in names:
            if whole and keys <= same and name in reference and len(keys) > 2:
                assert now[name].difference(reference[name]) < 1e-12, name


def check_output(before: dict[str, Delta], after: dict[str, Delta], files: Files) -> None:
    """The output says what the source says."""
    assert comparable(before, after)
    dtypes = {tensor.dtype for tensor in mutations.parse(files).tensors.values()}
    tolerance = max((ROUNDING.get(dtype, 2.0**-5) for dtype in dtypes), default=0.0)
    for name, value in before.items():
        difference = value.difference(after[name])
        assert math.isfinite(difference) and difference <= tolerance, (name, difference)


def run(name: str, first: int, count: int, folder: Path) -> tuple[int, int]:
    """Mutants converted and refused."""
    converted = 0
    for seed, sample, files in mutants(name, first, count):
        place = folder / str(seed)
        place.mkdir()
        try:
            converted += check(seed, sample, files, place)
        except Exception as error:  # whatever it is, the seed belongs to it
            raise AssertionError(f"{name}: seed {seed}, {sample.id}") from error
        shutil.rmtree(place)
    return converted, count - converted


@pytest.mark.parametrize("name", formats())
def test_a_few_mutated_files_convert_or_are_refused(name: str, tmp_path: Path):
    run(name, 0, USUAL, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", formats())
def test_many_mutated_files_convert_or_are_refused(name: str, tmp_path: Path):
    converted, refused = run(name, 1000, MANY, tmp_path)
    assert converted > 20 and refused > 300, (converted, refused)


def test_the_check_sees_what_is_wrong(tmp_path: Path):
    """A delta of another scale, a key that nothing reads."""
    sample = samples("kohya")[0]
    contents = contents_of(sample.path)
    right = deltas(contents)
    name = next(name for name, value in right.items() if value.a is not None)
    one = right[name]
    assert one.a is not None
    wrong = right | {name: Delta(one.a * 1.1, one.b, one.others)}
    with pytest.raises(AssertionError):
        check_output(right, wrong, files_of(sample))
    parts = mutations.parse(files_of(sample))
    extra = parts.tensors | {"left.over": next(iter(parts.tensors.values()))}
    files = mutations.written(files_of(sample), mutations.Parts(extra, parts.metadata))
    with pytest.raises(AssertionError):
        check_keys_are_used(files, contents)
