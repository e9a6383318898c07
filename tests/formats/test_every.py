"""The laws of formats, for every file in formats/ and every golden file of theirs."""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.adapters.formats.modules.kinds import FACTORS
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.adapters.formats.modules.record import LANGUAGE, Contents
from adapterkit.adapters.formats.peft.dialects import SINGLE
from adapterkit.adapters.formats.schema import DetectSchema, Format
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.inputs.adapter_door import is_plain
from adapterkit.verbs.look.formats import detect_format
from tests.support.adapter_samples import (
    GOLDEN,
    Delta,
    Sample,
    all_samples,
    comparable,
    contents_of,
    deltas,
    read_back,
    samples,
)

SAMPLES = all_samples()
WRITTEN = [name for name, form in formats().items() if form.writes]
# relative error of a scale that is rounded into factors, by their dtype
ROUNDING = {"F64": 2.0**-50, "F32": 2.0**-22, "F16": 2.0**-9, "BF16": 2.0**-6}
DECODED = ("gguf/llama/q8_0.gguf",)  # in blocks, which are written as the floats that they are
# Why a format may refuse what another one holds. Every refusal of a pair must be one of these.
JUDGED = (
    r"in \d+ modules: .*\n.*kinds that .* stores",  # a kind or a role without keys
    r"modules of other kinds",
    r"magnitudes, but none for",
    r"\w+ is not the same in ",  # parts of a fused module
    r"whose rows come \d+ at a time",
    r"LoKr of \d+ modules that need different factors",
    r"\bcomponents? |modules of no component",
    r"modules have no name there",
    r"is for image models, and these are modules of a language model",
    r"these names match none of the models",
    r": modules of (\w+, )+\w+\n",  # names of several architectures, which the format writes apart
    r"LoKr (of|with) ",  # PEFT decomposes all modules in one way
    r"experts are in another layout",
    r"an activated LoRA",
    r"is written for one architecture, which the adapter does not determine",
    # what a dialect of PEFT's layout does not read, or only the model can tell
    r"modules are fully trained",
    r"is one stack in the base's file too",
    r"the orientation of its experts is unknown",
    r"modules are missing next to others",
    r"stacks of experts",
    r"the base is of model_type",
)


def convert(sample: Sample, to: str, out: Path, **more: Any) -> Path:
    """The sample in another format; a file where the format has no settings beside it."""
    form = formats()[to]
    if not form.file.config:
        out = out.with_name(f"{out.name}{Path(form.file.name).suffix}")
    adapterkit.convert(sample.path, to=to, out=out, hash="none", **(sample.options | more))
    return out


def weights(path: Path, form: Format) -> Path:
    return path / form.file.name if path.is_dir() else path


def ids(sample: Sample) -> str:
    return sample.id


def test_architectures_of_formats_are_there():
    named = {name for form in formats().values() for name in form.names.architectures}
    assert named <= set(architectures())


def test_every_format_has_a_golden_file_and_every_golden_file_a_format():
    assert not [name for name in formats() if not samples(name)]
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir() and any(path.glob("*"))}
    served = {"served"}  # adapters of test_servers.py, for formats that have samples of their own
    assert folders - {"__pycache__"} - served <= set(formats())


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_a_golden_file_is_recognized_and_read_completely(sample: Sample):
    """Every key is read by a module."""
    pickled = sample.options.get("allow_pickle", False)
    told, form = detect_format(sample.path, allow_pickle=pickled)["format"], formats()[sample.form]
    if form.detect == DetectSchema():  # nothing tells it from the layout that it is a dialect of
        assert formats()[told].layout == form.layout
    else:
        assert told == sample.form
    contents = contents_of(sample.path, **sample.options)
    values = deltas(contents)
    assert values and all(value.difference(value) < 1e-12 for value in values.values())


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.form in WRITTEN and not s.is_rewritten], ids=ids
)
def test_written_again_it_is_the_file(sample: Sample, tmp_path: Path):
    """Every tensor by name, dtype and bytes, and the metadata that the format carries along; where
    names are spelled in the format's first way now, or scales are in factors, the same deltas."""
    form = formats()[sample.form]
    out = convert(sample, sample.form, tmp_path / "again")
    old, new = weights(sample.path, form), weights(out, form)
    if form.file.container != "safetensors":
        assert sample.id in DECODED or old.read_bytes() == new.read_bytes()
        again = convert(Sample(sample.form, out, sample.options), sample.form, tmp_path / "third")
        assert weights(again, form).read_bytes() == new.read_bytes()
        return
    before, after = load_file(old), load_file(new)
    stacked = sample.is_in_peft_layout
    source = contents_of(sample.path, stacked=stacked, **sample.options)
    written = read_back(out, sample.form, source, sample)
    alike = {key for key in before if key in after and same_tensor(before[key], after[key])}
    if not alike == set(before) == set(after):
        assert len(before) - len(after) in (0, len(source.modules))  # alphas, in factors now
        assert_same(source, deltas(source), written, sample.id)
    with safe_open(old, "pt") as one, safe_open(new, "pt") as two:
        carried = {
            key: value
            for key, value in (one.metadata() or {}).items()
            if any(pattern.search(key) for pattern in form.metadata.carry)
        }
        assert carried.items() <= (two.metadata() or {}).items()
    again = convert(Sample(sample.form, out, sample.options), sample.form, tmp_path / "third")
    assert weights(again, form).read_bytes() == new.read_bytes()


def same_tensor(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.equal(b)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_pair_keeps_every_delta(sample: Sample, tmp_path: Path):
    """Or is refused for a reason that is right, and then nothing is written."""
    check_pairs(sample, usual_targets(sample), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_pair_of_all(sample: Sample, tmp_path: Path):
    check_pairs(sample, WRITTEN, tmp_path)


def usual_targets(sample: Sample) -> list[str]:
    """PEFT's and its own, and for the first sample of a format every fourth one of the others: who
    reads and who writes share what an adapter holds, and no more."""
    others = WRITTEN[[*formats()].index(sample.form) % 4 :: 4]
    own = [sample.form] if sample.form in WRITTEN else []
    return [*dict.fromkeys(["peft", *own, *(others if sample == samples(sample.form)[0] else [])])]


def check_pairs(sample: Sample, targets: list[str], tmp_path: Path) -> None:
    whole = contents_of(sample.path, **sample.options)

    @cache
    def source_of(component: str | None) -> tuple[Contents, dict[str, Delta]]:
        more = {} if component is None else {"component": component}
        stacked = sample.is_in_peft_layout
        contents = contents_of(sample.path, stacked=stacked, **(sample.options | more))
        return contents, deltas(contents)

    kept = 0
    for to in targets:
        for more in parts(whole, formats()[to]):
            source, before = source_of(more.get("component"))
            place = tmp_path / to / more.get("component", "whole")
            place.mkdir(parents=True)
            try:
                out = convert(sample, to, place / "out", **more)
            except AdapterkitError as error:
                assert not holds(formats()[to], source), f"{to} {more}: {error}"
                assert any(re.search(pattern, str(error)) for pattern in JUDGED), str(error)
                assert not list(place.iterdir())
                continue
            written = read_back(out, to, source, sample)
            assert_same(source, before, written, f"{sample.id} -> {to} {more}")
            kept += 1
    assert kept


def parts(contents: Contents, form: Format) -> Iterator[dict[str, Any]]:
    """What of the contents a file takes at once: one component, where the format is for a single
    model or names the modules of several alike."""
    single = form.layout == "adapter" or not (form.names.components or form.names.inside)
    if len(contents.components) > 1 and (single or _named_alike(form, contents)):
        yield from ({"component": name} for name in contents.components)
    else:
        yield {}


def _named_alike(form: Format, contents: Contents) -> bool:
    """Whether components have the same keys, as the two transformers of Wan 2.2 in two files."""
    known = (form.components(name) for name in contents.architectures)
    homes = [[own[c][0] for c in contents.components if c in own] for own in known]
    return any(len(set(prefixes)) < len(prefixes) for prefixes in homes)


def holds(form: Format, contents: Contents) -> bool:
    """Whether the file of a format says that it has a place for everything; plain factors alone,
    of other kinds it may hold some."""
    roles = set(form.kinds.get(FACTORS, {})) or {"a", "b"}
    if any(m.kind != FACTORS or m.embedding or set(m.parts) - roles for m in contents.modules):
        return False
    if form.layout == "adapter":
        one_by_one = any(SINGLE.search(m.name) for m in contents.modules)
        return form.name == "peft" and len(contents.components) == 1 and not one_by_one
    if contents.facts.get("invocation"):
        return "{invocation}" in form.metadata.write.values()
    if form.names.architecture_key and contents.format != form.name:
        return False  # --base tells it
    if not form.names.architectures:
        known = form.names.components
        return set(contents.components) <= set(known) if known else len(contents.components) == 1
    return any(
        all(
            m.component in form.components(name) and _named(form, name, m.component, m.name)
            for m in contents.modules
        )
        for name in contents.architectures
        if name in form.names.architectures
    )


def _named(form: Format, architecture: str, component: str, module: str) -> bool:
    """Whether a module has a name in the naming that the format writes."""
    if component == LANGUAGE:
        return False
    naming = form.namings(architecture)[0]
    return names_of(architecture, component, naming, form.names.style).named(module) is not None


def assert_same(source: Contents, before: dict[str, Delta], target: Contents, what: str) -> None:
    after = deltas(target)
    assert comparable(before, after), what
    dtypes = {part.dtype for m in source.modules for part in m.parts.values()}
    tolerance = max(ROUNDING[dtype] for dtype in dtypes)
    far = {name: value.difference(after[name]) for name, value in before.items()}
    assert max(far.values()) <= tolerance, (what, max(far.values()))


KEYED = [
    name
    for name, form in formats().items()
    if form.layout == "keys" and form.file.container == "safetensors"
]  # other containers are mutated in tests/fuzz


@pytest.mark.parametrize("name", KEYED)
def test_a_refusal_lists_every_key_without_a_role(name: str, tmp_path: Path):
    form = formats()[name]
    sample = next(iter(samples(name)))
    path = weights(sample.path, form)
    tensors = load_file(path)
    foreign = {f"optimizer.state.{n}": next(iter(tensors.values())).clone() for n in range(3)}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    (tmp_path / "in").mkdir()
    save_file(tensors | foreign, tmp_path / "in" / path.name, metadata)
    source = tmp_path / "in" / path.name
    if sample.path.is_dir():
        for settings in form.file.config:
            (tmp_path / "in" / settings).write_bytes((sample.path / settings).read_bytes())
        source = tmp_path / "in"
    with pytest.raises(Refused) as caught:
        adapterkit.convert(source, to="peft", out=tmp_path / "out", **sample.options)
    assert all(key in str(caught.value) for key in foreign)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_plain_peft_folder_needs_no_detection(tmp_path: Path) -> None:
    """Any format's keys beside PEFT's config: a folder that is called plain is what detection
    finds too; and PEFT's own golden files mostly are."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    copy = tmp_path / "adapter_model.safetensors"
    plain = set()
    for sample in SAMPLES:
        path = weights(sample.path, formats()[sample.form])
        if path.suffix != ".safetensors":
            continue
        shutil.copy(path, copy)
        if is_plain(LocalFolder(tmp_path)):
            form = detect(LocalFolder(tmp_path)).format
            assert form.layout == "adapter" and form.adapter.is_read_by_peft, sample.id
            plain.add(sample.form)
    assert "peft" in plain and len(plain) > 3, plain
