"""Weights of blocks and modules in a pipeline: what diffusers' `set_adapters` gives with the same
settings, and the lists of sd-webui-lora-block-weight."""

import json

import pytest
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.inputs.weights_file import WeightsFile, named_adapter, write_weights
from tests.support.pipeline_files import assert_outputs, loaded, lora_file, quiet, with_adapters
from tests.support.usual import usual

SETTINGS = {
    "sd15": [
        {"unet": {"down": {"block_1": [0.25, -1]}, "mid": 2, "up": 0.5}, "text_encoder": 0.3},
        {"unet": {"up": {"block_2": 0.5, "block_3": [1, 0, 2]}}},
        {"unet": 0.5, "text_encoder": None},
    ],
    "sdxl": [{"unet": {"down": {"block_2": 0.25}, "mid": [0.5]}, "text_encoder_2": 0}],
    "flux": [
        {"transformer": 0.4, "text_encoder": 2},
        {"transformer": {"transformer_blocks.0.ff": 0.5, "attn.to_q": -1}},
    ],
}


def given(name, saved, tmp_path, seed=1):
    base = saved(name)
    parts = [part for part in ("unet", "transformer", "text_encoder") if (base / part).is_dir()]
    parts += ["text_encoder_2"] * (name == "sdxl")
    return base, lora_file(base, tmp_path / f"{seed}.safetensors", tuple(parts), seed)


CASES = [(name, one) for name, several in SETTINGS.items() for one in several]
KEPT = [CASES[0], CASES[2], CASES[-1]]


@pytest.mark.parametrize(("name", "settings"), usual(CASES, KEPT))
def test_nested_settings_are_those_of_diffusers(name, settings, saved, tmp_path):
    base, file = given(name, saved, tmp_path)
    (tmp_path / "blocks.json").write_text(json.dumps(settings))
    lbw = [str(tmp_path / "blocks.json")]
    adapterkit.merge(base, [file], out=tmp_path / "out", lbw=lbw, verify=True)
    assert_outputs(loaded(tmp_path / "out"), with_adapters(base, {file: settings}))
    checked = adapterkit.verify(tmp_path / "out", base=base, adapters=[file])
    assert checked["tensors"] > 0


def test_two_adapters_of_which_one_has_settings(saved, tmp_path):
    """Its own weight multiplies them; the parts number the adapters otherwise."""
    base = saved("sd15")
    text = lora_file(base, tmp_path / "text.safetensors", ("text_encoder",), 3)
    both = lora_file(base, tmp_path / "both.safetensors", ("unet", "text_encoder"), 4)
    settings = {"unet": {"mid": 0.5, "down": 0}, "text_encoder": 0.25}
    adapterkit.merge(
        base, {text: 0.7, both: 1}, out=tmp_path / "out", lbw=[f"2:{json.dumps(settings)}"]
    )
    assert_outputs(loaded(tmp_path / "out"), with_adapters(base, {text: 0.7, both: settings}))


def test_settings_of_both_transformers_of_wan(saved, tmp_path):
    base = saved("wan22")
    file = lora_file(base, tmp_path / "lora.safetensors", ("transformer",), 1)
    settings = {"transformer": {"blocks.1.": 0.5}, "transformer_2": 2}
    adapters = [f"transformer:{file}", f"transformer_2:{file}"]
    adapterkit.merge(base, adapters, out=tmp_path / "out", lbw=[json.dumps(settings)])
    expected = with_adapters(base, {file: 1.0})
    with quiet():
        expected.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="low", load_into_transformer_2=True
        )
        expected.transformer.set_adapters("a0", settings["transformer"])
        expected.transformer_2.set_adapters("low", 2.0)
    assert_outputs(loaded(tmp_path / "out"), expected)


def test_lists_and_prefixes_are_of_original_names(saved, tmp_path):
    base, file = given("sdxl", saved, tmp_path)
    mid = "0.5,0,0,0,0,2,0,0,0,0,0,0"
    adapterkit.merge(base, [file], out=tmp_path / "list", lbw=[mid])
    blocks = {"down": 0, "mid": 2, "up": 0}
    settings = {"unet": blocks, "text_encoder": 0.5, "text_encoder_2": 0.5}
    expected = with_adapters(base, {file: settings})
    with quiet():  # what is beside the attentions has the weight of its block, too
        scale = expected.unet.mid_block.resnets[0].conv1.scaling["a0"]
    assert scale == 1.5
    for module in expected.unet.modules():
        if "a0" in getattr(module, "scaling", {}):
            module.set_scale("a0", 0.0)
    for module in expected.unet.mid_block.modules():
        if "a0" in getattr(module, "scaling", {}):
            module.set_scale("a0", 2.0)
    assert_outputs(loaded(tmp_path / "list"), expected)
    lbw = ['{"input_blocks.": 0, "output_blocks.": 0, "middle_block.": 2}']
    rules = ["text_encoder.*=0.5"]
    adapterkit.merge(base, [file], out=tmp_path / "prefixes", lbw=lbw, weight_for=rules)
    ours, theirs = (
        {path.relative_to(tmp_path / one): load_file(path)
         for path in sorted((tmp_path / one).rglob("*.safetensors"))}
        for one in ("list", "prefixes")
    )  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(a.equal(theirs[f][key]) for f, one in ours.items() for key, a in one.items())


def test_weights_of_modules_name_the_part(saved, tmp_path):
    base, file = given("sd15", saved, tmp_path)
    adapterkit.merge(
        base, [file], out=tmp_path / "out", weight_for=["unet[.].*=0.5", "text_encoder[.].*=2"]
    )
    expected = with_adapters(base, {file: {"unet": 0.5, "text_encoder": 2.0}})
    assert_outputs(loaded(tmp_path / "out"), expected)


def test_a_file_of_weights_names_the_part(saved, tmp_path):
    """Modules of parts that are left out may be in it; directions may not."""
    base = saved("sd15")
    text = lora_file(base, tmp_path / "text.safetensors", ("text_encoder",), 3)
    both = lora_file(base, tmp_path / "both.safetensors", ("unet", "text_encoder"), 4)
    adapters = tuple(named_adapter(one.name, LocalFolder(one)) for one in (text, both))
    adapterkit.merge(base, [text, both], out=tmp_path / "plain")
    names = json.loads((tmp_path / "plain" / "adapterkit.json").read_text())["parameters"]
    of_model = lambda name: name.replace("encoder.encoder", "encoder.text_model.encoder")
    modules = [of_model(name).replace("/", ".").removesuffix(".weight") for name in names]
    own = {name: (0.5, -1.5 if name.startswith("unet.") else 0.25) for name in modules}
    write_weights(WeightsFile(adapters, (0.7, 1.0), own), tmp_path / "w.json")
    receipt = adapterkit.merge(base, weights=tmp_path / "w.json", out=tmp_path / "out")
    rules = ["1:.*=0.5", "2:unet[.].*=-1.5", "2:text_encoder[.].*=0.25"]
    adapterkit.merge(base, [text, both], weight_for=rules, out=tmp_path / "rules")
    assert_outputs(loaded(tmp_path / "out"), loaded(tmp_path / "rules"))
    assert receipt.data["recipe"]["options"]["weights_file"]["default"] == [0.7, 1.0]
    assert adapterkit.verify(tmp_path / "out", base=base, adapters=[text, both])["tensors"] > 0
    adapterkit.merge(base, weights=tmp_path / "w.json", exclude="unet", out=tmp_path / "text")
    unet = next(name for name in modules if name.startswith("unet."))
    for wrong, problem in (
        ({"vae.x": (1.0, 1.0)}, "no adapter has: vae.x"),
        ({unet: (1.0, (1.0, 2.0))}, "2 weights of directions"),
    ):
        write_weights(WeightsFile(adapters, (1.0, 1.0), wrong, "direction"), tmp_path / "w.json")
        with pytest.raises(adapterkit.Refused, match=problem):
            adapterkit.merge(base, weights=tmp_path / "w.json", out=tmp_path / "no")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lbw": ['{"unet": {"block_1": 1}}']}, "down, mid, up"),
        ({"lbw": ['{"unet": {"down": {"block_7": 1}}}']}, "down_blocks.7"),
        ({"lbw": ['{"unet": {"down": {"block_1": [1, 2, 3]}}}']}, "one, or 2"),
        ({"lbw": ['{"unet": "0.5"}']}, "a number"),
        ({"lbw": ['{"transformer": 0.5}']}, "no parts transformer"),
        ({"lbw": ['{"unet": 1']}, "no JSON"),
        ({"weight_for": ["vae.*=0"]}, "matches none"),
    ],
)
def test_invalid_block_weights_are_refused(options, text, saved, tmp_path):
    base, file = given("sd15", saved, tmp_path)
    with pytest.raises(adapterkit.Refused, match=text):
        adapterkit.merge(base, [file], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
