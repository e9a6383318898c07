"""Every verb that takes an adapter takes one in any format that is read."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import Refused
from adapterkit.core.inputs.sources import open_adapter

WIDTH, RANK = 16, 4
MODULES = {  # of the file: (in, out)
    "double_blocks_{}_img_attn_qkv": (WIDTH, 3 * WIDTH),
    "double_blocks_{}_img_attn_proj": (WIDTH, WIDTH),
    "single_blocks_{}_linear1": (WIDTH, 7 * WIDTH),
}
PARAMETERS = {  # of the model: shape
    "transformer_blocks.{}.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.{}.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.{}.attn.to_v": (WIDTH, WIDTH),
    "transformer_blocks.{}.attn.to_out.0": (WIDTH, WIDTH),
    "single_transformer_blocks.{}.attn.to_q": (WIDTH, WIDTH),
    "single_transformer_blocks.{}.attn.to_k": (WIDTH, WIDTH),
    "single_transformer_blocks.{}.attn.to_v": (WIDTH, WIDTH),
    "single_transformer_blocks.{}.proj_mlp": (4 * WIDTH, WIDTH),
}


def write_kohya(path, seed, more=()):
    """A file of kohya's for two blocks of Flux, of which its metadata tells."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    names = {name.format(n): size for name, size in MODULES.items() for n in range(2)}
    for module, (inputs, outputs) in names.items():
        key = f"lora_unet_{module}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, RANK, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    for key in more:
        tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(WIDTH, RANK, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    metadata = {"ss_network_dim": str(RANK), "ss_base_model_version": "flux1"}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of kohya's, the same converted into folders of PEFT's, and a base."""
    home = tmp_path_factory.mktemp("formats")
    for seed, name in enumerate("ab"):
        write_kohya(home / f"{name}.safetensors", seed)
        adapterkit.convert(home / f"{name}.safetensors", to="peft", out=home / name)
    generator = torch.Generator().manual_seed(9)
    (home / "base").mkdir()
    weights = {
        f"{name.format(n)}.weight": torch.randn(shape, generator=generator)
        for name, shape in PARAMETERS.items()
        for n in range(2)
    }
    save_file(weights, home / "base" / "diffusion_pytorch_model.safetensors")
    (home / "base" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    return home


VERBS = {
    "merge": lambda home, a, b, out: adapterkit.merge(home / "base", {a: 0.5, b: 1}, out=out),
    "combine": lambda home, a, b, out: adapterkit.combine([a, b], method="linear", out=out),
    "ties": lambda home, a, b, out: adapterkit.combine(
        [a, b], method="ties", density=0.5, rank=4, out=out
    ),
    "subtract": lambda home, a, b, out: adapterkit.subtract(a, general=b, out=out),
    "arrow": lambda home, a, b, out: adapterkit.arrow([a, b], out=out),
    "resize": lambda home, a, b, out: adapterkit.resize(a, rank=2, out=out),
    "rebase": lambda home, a, b, out: adapterkit.rebase(a, initial=b, out=out),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_file_of_another_tool_is_as_good_as_its_conversion(verb, files, tmp_path):
    run = VERBS[verb]
    a, b = files / "a.safetensors", files / "b.safetensors"
    receipt = run(files, a, b, tmp_path / "foreign")
    run(files, files / "a", files / "b", tmp_path / "own")
    names = [path.name for path in (tmp_path / "own").glob("*.safetensors")]
    for name in names:
        foreign, own = (load_file(tmp_path / side / name) for side in ("foreign", "own"))
        assert foreign.keys() == own.keys()
        assert all(torch.equal(foreign[key], own[key]) for key in own)
    source = next(i for i in receipt.data["recipe"]["inputs"] if i["name"] == "a.safetensors")
    assert (source["format"], source["file"]) == ("kohya", "a.safetensors")


def test_a_merge_adds_the_file_s_deltas(files, tmp_path):
    adapterkit.merge(files / "base", files / "a.safetensors", out=tmp_path / "merged")
    name = "diffusion_pytorch_model.safetensors"
    merged, base = load_file(tmp_path / "merged" / name), load_file(files / "base" / name)
    source = load_file(files / "a.safetensors")
    key = "lora_unet_double_blocks_1_img_attn_qkv"
    a, b = source[f"{key}.lora_down.weight"].double(), source[f"{key}.lora_up.weight"].double()
    delta = 3 / RANK * b @ a
    rows = {"to_q": slice(0, 16), "to_k": slice(16, 32), "to_v": slice(32, 48)}
    for part, own in rows.items():
        weight = f"transformer_blocks.1.attn.{part}.weight"
        assert torch.equal(merged[weight], (base[weight].double() + delta[own]).float())


def test_the_base_determines_the_family_of_names(tmp_path):
    """Lumina2 and Z-Image have a layer of that name and shape, under other names in diffusers."""
    path, base, merged = (tmp_path / name for name in ("in.safetensors", "base", "merged"))
    key = "lora_unet_layers_0_attention_out"
    down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    with pytest.raises(Refused, match="lumina2 and z_image"):
        adapterkit.convert(path, to="peft", out=tmp_path / "out")
    base.mkdir()
    (base / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    name, weight = "layers.0.attention.to_out.0.weight", torch.randn(WIDTH, WIDTH)
    save_file({name: weight}, base / "diffusion_pytorch_model.safetensors")
    adapterkit.merge(base, path, out=merged)
    expected = (weight.double() + up.double() @ down.double()).float()
    assert torch.equal(load_file(merged / "diffusion_pytorch_model.safetensors")[name], expected)


def test_inspect_and_diff_tell_of_the_adapter(files):
    told = adapterkit.inspect(files / "a.safetensors")
    assert (told["kind"], told["format"]) == ("adapter", "kohya")
    assert {(m["rank"], m["alpha"]) for m in told["modules"]} == {(RANK, 3)}
    assert adapterkit.diff(files / "a.safetensors", files / "a")["same"]
    assert not adapterkit.diff(files / "a.safetensors", files / "b.safetensors")["same"]


def test_verify_computes_rows_of_a_merge_again(files, tmp_path):
    sources = {files / "a.safetensors": 0.5}
    adapterkit.merge(files / "base", sources, out=tmp_path / "merged")
    checked = adapterkit.verify(tmp_path / "merged", base=files / "base", adapters=sources)
    assert checked["rows"] > 0


def test_a_pipeline_s_file_is_refused_with_its_components(files, tmp_path):
    more = ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"]
    path = write_kohya(tmp_path / "two.safetensors", 3, more=more)
    with pytest.raises(Refused, match="(?s)text_encoder, transformer.*--component"):
        adapterkit.merge(files / "base", path, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    names = [module["module"] for module in adapterkit.inspect(path)["modules"]]
    assert {name.partition(".")[0] for name in names} == {"text_encoder", "transformer"}


def test_diff_of_pipelines_compares_the_deltas_of_each_component(files, tmp_path):
    """In two formats, with other factors of the same deltas, and where one side lacks a part."""
    more = ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"]
    one = write_kohya(tmp_path / "one.safetensors", 3, more=more)
    tensors = load_file(one)
    doubled = {
        k: 2 * v if "lora_up" in k else v / 2 if "lora_down" in k else v for k, v in tensors.items()
    }
    save_file(doubled, tmp_path / "doubled.safetensors")
    result = adapterkit.diff(one, tmp_path / "doubled.safetensors")
    assert (result["kind"], result["same"], result["changed"]) == ("adapters", True, [])
    adapterkit.convert(one, to="diffusers", out=tmp_path / "two.safetensors")
    result = adapterkit.diff(one, tmp_path / "two.safetensors")
    assert result["same"] and result["totals"]["compared"] == 2 * 8 + 1
    (key,) = [k for k in tensors if k.endswith("lora_up.weight") and k.startswith("lora_te1")]
    save_file(tensors | {key: -tensors[key]}, tmp_path / "turned.safetensors")
    (row,) = adapterkit.diff(one, tmp_path / "turned.safetensors")["changed"]
    assert row["name"].startswith("text_encoder.") and row["kind"] == "delta"
    assert row["relative_error"] == pytest.approx(2)
    alone = write_kohya(tmp_path / "alone.safetensors", 3)
    removed = adapterkit.diff(one, alone)["removed"]
    assert [row["name"].partition(".")[0] for row in removed] == ["text_encoder"]


def test_a_plan_pickles_and_a_temporary_folder_does_not_stay(files):
    folder = open_adapter(files / "a.safetensors")
    again = pickle.loads(pickle.dumps(folder))
    place = again.path("adapter_model.safetensors")
    assert place.read_bytes() == (files / "a" / "adapter_model.safetensors").read_bytes()
    del again
    assert not place.exists()


def test_a_file_is_finished_refused_and_resumed_like_a_folder(files, tmp_path):
    source, out = files / "a.safetensors", tmp_path / "b.safetensors"
    adapterkit.convert(source, to="diffusers", out=out)
    first = out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.safetensors",
        "b.safetensors.adapterkit.json",
    ]
    with pytest.raises(Refused, match="a file of this name"):
        adapterkit.convert(source, to="diffusers", out=out)
    assert adapterkit.convert(source, to="diffusers", out=out, resume=True).finished_before
    adapterkit.convert(source, to="diffusers", out=out, overwrite=True)
    assert out.read_bytes() == first
    with pytest.raises(Refused, match="the output .* is the input"):
        adapterkit.convert(out, to="kohya", out=out, overwrite=True)
    assert out.read_bytes() == first


def test_an_alpha_besides_the_file_s_own_is_refused(files, tmp_path):
    with pytest.raises(Refused, match="--alpha 8"):
        adapterkit.convert(files / "a.safetensors", to="peft", out=tmp_path / "out", alpha=8)
