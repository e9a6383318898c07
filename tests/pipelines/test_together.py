"""LoRAs of several parts of a pipeline in one file: what is made of them is such a file, too, and
diffusers computes with it what it does with the sources."""

import pytest
from safetensors import safe_open

import adapterkit
from adapterkit import Refused
from tests.support.pipeline_files import assert_outputs, lora_file, with_adapters
from tests.support.usual import usual

PARTS = {"sdxl": ("unet", "text_encoder", "text_encoder_2"), "flux": ("transformer",)}


@pytest.fixture
def two(saved, cached_folder):
    """A pipeline, and two adapters for it in a layout; the second one changes fewer parts."""

    def paths(name, to="diffusers"):
        base = saved(name)
        folder = cached_folder(f"two-{name}", lambda folder: write_two(base, PARTS[name], folder))
        if to != "diffusers":
            source, options = folder, {"to": to, "architecture": name}
            folder = cached_folder(
                f"two-{name}-{to}",
                lambda folder: [
                    adapterkit.convert(file, **options, out=folder / file.name)
                    for file in source.iterdir()
                ],
            )
        return base, *(folder / f"{seed}.safetensors" for seed in (1, 7))

    return paths


def write_two(base, parts, folder):
    for seed, own in ((1, parts), (7, parts[:2])):
        lora_file(base, folder / f"{seed}.safetensors", own, seed, rank=2 + seed % 3)


def as_diffusers(file, name, to, tmp_path):
    """The file, or what diffusers reads of a layout that it does not: fused rows of Flux it takes
    in the real model's sizes alone."""
    if to == "diffusers" or (name, to) == ("sdxl", "kohya"):
        return file
    adapterkit.convert(file, to="diffusers", out=tmp_path / f"read-{file.name}")
    return tmp_path / f"read-{file.name}"


CASES = [("sdxl", "comfyui"), ("flux", "diffusers"), ("sdxl", "kohya"), ("flux", "kohya")]


@pytest.mark.parametrize(("name", "to"), usual(CASES, CASES[:2]))
def test_adapters_of_several_components_are_combined(name, to, two, tmp_path):
    base, one, other = two(name, to)
    out = tmp_path / "sum.safetensors"
    plan = adapterkit.combine({one: 0.7, other: -0.4}, method="linear", out=out, dry_run=True)
    assert plan.is_file and not out.exists()
    receipt = adapterkit.combine({one: 0.7, other: -0.4}, method="linear", out=out)
    assert receipt.data["to"] == to
    recipe = receipt.data["recipe"]
    assert [one["name"] for one in recipe["inputs"]] == ["combine", one.name, other.name]
    assert {entry["weight"] for entry in receipt.data["adapters"]} == {0.7, -0.4}
    ours = with_adapters(base, {as_diffusers(out, name, to, tmp_path): 1.0})
    theirs = {as_diffusers(file, name, to, tmp_path): w for file, w in ((one, 0.7), (other, -0.4))}
    assert_outputs(ours, with_adapters(base, theirs))
    assert adapterkit.combine({one: 0.7, other: -0.4}, method="linear", out=out, resume=True)
    assert adapterkit.verify(out)["files"]


@pytest.mark.parametrize(("name", "to"), [("sdxl", "kohya"), ("flux", "diffusers")])
def test_adapters_of_several_components_are_resized(name, to, two, tmp_path):
    """The rank that it has keeps all of it; a lower one is told of in the receipt."""
    base, one, _ = two(name, to)
    adapterkit.resize(one, rank=9, out=tmp_path / "same.safetensors")
    ours = with_adapters(base, {tmp_path / "same.safetensors": 1.0})
    assert_outputs(ours, with_adapters(base, {one: 1.0}))
    receipt = adapterkit.resize(one, energy=0.5, out=tmp_path / "small.safetensors")
    errors = {key: m["error"] for key, m in receipt.data["parameters"].items() if "error" in m}
    assert {key.partition(".")[0] for key in errors} == {*PARTS[name]}
    assert all(0 < error < 0.75 for error in errors.values())
    small, large = tmp_path / "small.safetensors", tmp_path / "same.safetensors"
    assert small.stat().st_size < large.stat().st_size
    with safe_open(small, "pt") as file, safe_open(one, "pt") as source:
        assert {*source.metadata()} - {"lora_adapter_metadata"} <= {*file.metadata()}


def test_adapters_of_several_components_are_subtracted(two, tmp_path):
    base, one, other = two("sdxl")
    adapterkit.subtract([one], general=[other, other], out=tmp_path / "less.safetensors")
    ours = with_adapters(base, {tmp_path / "less.safetensors": 1.0})
    assert_outputs(ours, with_adapters(base, {one: 1.0, other: -1.0}))


def test_a_folder_in_the_layout(saved, tmp_path):
    """Of adapters of other parts each; the first one says the layout."""
    base = saved("sdxl")
    unet = lora_file(base, tmp_path / "unet.safetensors", ("unet",), 1)
    text = lora_file(base, tmp_path / "text.safetensors", ("text_encoder",), 2)
    adapterkit.combine([unet, text], method="linear", out=tmp_path / "both")
    (file,) = (tmp_path / "both").glob("*.safetensors")
    ours = with_adapters(base, {file: 1.0})
    assert_outputs(ours, with_adapters(base, {unet: 1.0, text: 1.0}))
    # of one part it is PEFT's, as ever
    adapterkit.resize(unet, rank=1, out=tmp_path / "small")
    assert (tmp_path / "small" / "adapter_config.json").is_file()


def test_unsupported_edits_of_several_components_are_refused(two, tmp_path):
    _, one, other = two("sdxl")
    adapterkit.convert(one, to="peft", component="unet", out=tmp_path / "peft")
    with pytest.raises(Refused, match="--component"):
        adapterkit.combine([one, tmp_path / "peft"], method="linear", out=tmp_path / "out")
    with pytest.raises(Refused, match="without an ending"):
        adapterkit.resize(tmp_path / "peft", rank=1, out=tmp_path / "out.safetensors")
    with pytest.raises(Refused, match="on the Hub"):
        adapterkit.resize(one, rank=1, out="hf://org/small")
    with pytest.raises(Refused, match="one after the other"):
        adapterkit.subtract([one, other], general=[one], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_verbs_take_them(two, tmp_path):
    """What is read, and the words of a file."""
    base, one, other = two("sdxl", "kohya")
    found = adapterkit.inspect(one)["modules"]
    assert {module["module"].partition(".")[0] for module in found} == {*PARTS["sdxl"]}
    rows = adapterkit.diff(one, other)["changed"]
    assert {row["name"].partition(".")[0] for row in rows} == {*PARTS["sdxl"][:2]}
    assert not adapterkit.check(one, program="diffusers")["findings"]
    adapterkit.report([one, other], out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert [part in page for part in PARTS["sdxl"]] == [True] * 3
    adapterkit.edit(one, title="Ink", trigger="ink", out=tmp_path / "named.safetensors")
    assert_outputs(
        with_adapters(base, {tmp_path / "named.safetensors": 1.0}), with_adapters(base, {one: 1.0})
    )
