"""LyCORIS files: what is written from them does in PEFT and diffusers what lycoris does with them,
and lycoris loads what is written for it."""

import logging
import re
import warnings
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.formats.golden.make_lycoris import (
    ALL,
    FOLDER,
    LINEAR,
    NETWORKS,
    WRAPPED,
    WRAPPER,
    kohya_network,
    tiny_unet,
    wrapper_network,
)
from tests.support.kinds import CASES, Net, deltas, net, trained

FULL = 100
HELD = ["locon_tucker", "dora", "loha", "loha_tucker", "lokr", "lokr_tucker", "lokr_both",
        "lokr_full"]  # fmt: skip
# what PEFT has no type for: input norms, rotated outputs, differences of weights
OTHERS = ["dora_in", "oft", "boft"]


@pytest.fixture(autouse=True)
def quietly():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """The base of all golden files."""
    folder = tmp_path_factory.mktemp("unet")
    tiny_unet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return model(image, torch.tensor([3, 7]), text)[0]


def assert_same_output(actual: nn.Module, want: torch.Tensor) -> None:
    """To 2e-5 of what the adapter changes."""
    change = torch.linalg.norm(want - plain_output())
    assert torch.linalg.norm(output(actual) - want) < 2e-5 * change


@cache
def plain_output() -> torch.Tensor:
    return output(tiny_unet())


@cache
def by_lycoris(name: str) -> torch.Tensor:
    """What the UNet gives as lycoris trained it."""
    return output(trained_by_lycoris(name))


def trained_by_lycoris(name: str) -> nn.Module:
    """The UNet as lycoris trained it when the golden file was saved."""
    model = tiny_unet()
    if name in NETWORKS:
        kohya_network(model, *NETWORKS[name])
    else:
        wrapper_network(model, *WRAPPED[name.removeprefix("wrapper/")])
    return model


def convert(source: Path, out: Path, **options) -> Path:
    adapterkit.convert(source, out=out, hash="none", **options)
    return out


@pytest.mark.parametrize("name", HELD)
def test_peft_does_what_lycoris_does(name, tmp_path):
    out = convert(FOLDER / f"{name}.safetensors", tmp_path / "out", to="peft")
    assert_same_output(peft.PeftModel.from_pretrained(tiny_unet(), out).eval(), by_lycoris(name))


@pytest.mark.parametrize("name", [*HELD, *OTHERS])
def test_diffusers_does_with_plain_factors_what_lycoris_does(name, unet, tmp_path):
    """LoHa, LoKr and rotations of the outputs at full rank."""
    source = FOLDER / f"{name}.safetensors"
    out = convert(source, tmp_path / "out", to="diffusers", rank=FULL, base=unet)
    model = tiny_unet()
    model.load_lora_adapter(out, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert_same_output(model.eval(), by_lycoris(name))


@pytest.mark.parametrize("name", ["locon_tucker", "loha", "loha_tucker", "lokr", "lokr_tucker",
                                  "lokr_both", "lokr_full"])  # fmt: skip
def test_kernels_are_known_without_a_base(name, tmp_path):
    """By the architecture; of a core by its shape."""
    source = FOLDER / f"{name}.safetensors"
    out = convert(source, tmp_path / "out", to="peft", rank=FULL)
    assert_same_output(peft.PeftModel.from_pretrained(tiny_unet(), out).eval(), by_lycoris(name))


def test_a_core_is_contracted_into_a(tmp_path):
    """Exactly: no rank, and no loss but the one rounding."""
    out = convert(FOLDER / "locon_tucker.safetensors", tmp_path / "out", to="peft")
    source = load_file(FOLDER / "locon_tucker.safetensors")
    head = "lora_unet_down_blocks_0_resnets_0_conv1"
    mid, down = source[f"{head}.lora_mid.weight"], source[f"{head}.lora_down.weight"]
    want = torch.einsum("mnkl,ni->mikl", mid.double(), down[:, :, 0, 0].double()).float()
    key = "base_model.model.down_blocks.0.resnets.0.conv1.lora_A.weight"
    assert torch.equal(load_file(out / "adapter_model.safetensors")[key], want)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_wrapper_s_files_are_read(name, tmp_path):
    out = tmp_path / "out.safetensors"
    convert(WRAPPER / f"{name}.safetensors", out, to="lycoris")
    old, new = load_file(WRAPPER / f"{name}.safetensors"), load_file(out)
    renamed = {key.replace("lycoris_", "lora_unet_", 1): value for key, value in old.items()}
    assert renamed.keys() == new.keys()
    assert all(torch.equal(value, new[key]) for key, value in renamed.items())


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("loha", "lokr")], ids=str)
def test_lycoris_loads_what_was_peft_s(case, base, tmp_path):
    """Its deltas are PEFT's, also where PEFT scales two whole matrices and lycoris does not; and
    back in PEFT they still are."""
    from lycoris import create_lycoris_from_weights

    adapter = trained(case, base, tmp_path / "adapter", modules_to_save=None)
    want = deltas(base, adapter)
    file = convert(adapter, tmp_path / "out.safetensors", to="lycoris-wrapper")
    has_cores = case.options.get("use_effective_conv2d")
    # lycoris takes the rank of a LoKr with a core from the wrong axis, and PEFT's core of a Conv1d
    # has an axis more than the layer
    if not has_cores or (case.kind == "loha" and "line" not in case.targets):
        model = net(base)
        network, _ = create_lycoris_from_weights(1.0, file, model)
        assert len(network.loras) == len(case.targets)
        for lora in network.loras:
            name = lora.lora_name.removeprefix("lycoris_").replace("deep_", "deep.")
            delta = lora.get_weight(lora.shape).double()
            assert torch.linalg.norm(delta - want[name]) <= 1e-6 * torch.linalg.norm(want[name])
    again = convert(file, tmp_path / "again", to="peft", base=base)
    actual = deltas(base, again)
    assert set(actual) == set(want)
    for name, delta in actual.items():
        assert torch.linalg.norm(delta - want[name]) <= 3e-6 * torch.linalg.norm(want[name]), name


@pytest.mark.parametrize("algo, options, name", [
    ("glora", {}, "GLoRA"), ("ia3", {}, "IA3"), ("tlora", {}, "T-LoRA"),
])  # fmt: skip
def test_unsupported_algorithms_are_refused_by_name(algo, options, name, tmp_path):
    network = kohya_network(tiny_unet(), {"algo": algo, **options}, LINEAR)
    file = tmp_path / "in.safetensors"
    network.save_weights(str(file), torch.float32, {"ss_network_module": "lycoris.kohya"})
    with pytest.raises(AdapterkitError, match=f"{name}: lora_unet_down_blocks"):
        convert(file, tmp_path / "out", to="peft", rank=FULL)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("name, to, message", [
    ("dora_in", "peft", "2 modules of other kinds"),
    ("dora_in", "kohya", "input_magnitude of lora, in 2 modules"),
    ("oft", "peft", "4 modules of other kinds"),
    ("boft", "diffusers", "oft, in 4 modules"),
    ("loha", "kohya", "loha, in 4 modules"),
    ("full", "diffusers", "norm|full, in"),
])  # fmt: skip
def test_kinds_that_a_format_lacks_are_refused_without_a_rank(name, to, message, tmp_path):
    for dry_run in True, False:
        with pytest.raises(AdapterkitError, match=message) as caught:
            convert(FOLDER / f"{name}.safetensors", tmp_path / "out", to=to, dry_run=dry_run)
        assert "--rank N" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dora_in", "oft", "boft"])
def test_norms_and_rotations_need_the_base(name, tmp_path):
    with pytest.raises(Refused, match=r"modules whose delta depends on the weight.*\n.*--base"):
        convert(FOLDER / f"{name}.safetensors", tmp_path / "out", to="diffusers", rank=2)
    assert not list(tmp_path.iterdir())


def test_differences_become_factors_and_the_rest_is_dropped_on_request(tmp_path):
    """Norms have no place in diffusers' files; biases have, beside factors."""
    source = FOLDER / "full.safetensors"
    with pytest.raises(AdapterkitError, match="full, in 2 modules: .*norm1"):
        convert(source, tmp_path / "out", to="diffusers", rank=FULL)
    receipt = adapterkit.convert(
        source, to="diffusers", out=tmp_path / "out", rank=FULL, lossy=True, hash="none"
    ).data
    norms = [
        float(v.norm())
        for key, v in load_file(source).items()
        if key.endswith(("w_norm", "b_norm"))
    ]
    (note,) = (note for note in receipt["notes"] if note.startswith("dropped"))
    largest = re.search(r"differences of 2 vectors .* of norm ([\d.]+) at most", note)
    assert largest and float(largest[1]) == pytest.approx(max(norms), rel=1e-5)
    model, by_tool = tiny_unet(), trained_by_lycoris("full")
    model.load_lora_adapter(
        tmp_path / "out", prefix="unet", weight_name="pytorch_lora_weights.safetensors"
    )
    for module in by_tool.modules():
        if type(module).__name__ in ("GroupNorm", "LayerNorm"):
            vars(module).pop("forward", None)
    assert_same_output(model.eval(), output(by_tool))


def rewritten(name: str, path: Path, change) -> Path:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FOLDER / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def test_an_alpha_of_0_is_refused(tmp_path):
    """The trainers take the rank for it, ComfyUI no change at all."""
    key = "lora_unet_down_blocks_0_resnets_0_conv1.alpha"
    source = rewritten("loha", tmp_path / "in.safetensors", lambda t: t[key].zero_())
    with pytest.raises(Refused, match=f"{key} is 0"):
        convert(source, tmp_path / "out", to="peft")


def test_alpha_is_ignored_for_two_full_matrices(tmp_path):
    """LyCORIS ignores it there, and writes whatever it is."""

    def change(tensors):
        for key in tensors:
            if key.endswith(".alpha"):
                tensors[key] = torch.tensor(1e10)

    source = rewritten("lokr_full", tmp_path / "in.safetensors", change)
    out = convert(source, tmp_path / "out", to="peft")
    model = peft.PeftModel.from_pretrained(tiny_unet(), out).eval()
    assert_same_output(model, by_lycoris("lokr_full"))


def test_shapes_that_do_not_fit_are_refused_with_all_of_them(tmp_path):
    head = "lora_unet_down_blocks_0_resnets_0_conv1"

    def change(tensors):
        tensors[f"{head}.hada_w1_b"] = tensors[f"{head}.hada_w1_b"][:2].clone()

    source = rewritten("loha", tmp_path / "in.safetensors", change)
    with pytest.raises(Refused, match=r"w1_a \(8, 3\), w1_b \(2, 72\)"):
        convert(source, tmp_path / "out", to="lycoris")


def test_a_lokr_that_peft_cannot_make_is_refused_and_fitted(tmp_path):
    """One factor for all modules: 8 as 2·4 of three, as 4·2 of one."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

    def change(tensors):
        for name in [name for name in tensors if name.startswith(f"{key}.lokr_")]:
            del tensors[name]
        tensors.update({f"{key}.lokr_w1": torch.ones(4, 3), f"{key}.lokr_w2": torch.ones(2, 4)})

    source = rewritten("lokr", tmp_path / "in.safetensors", change)
    with pytest.raises(Refused, match="LoKr of 4 modules that need different factors"):
        convert(source, tmp_path / "out", to="peft")
    convert(source, tmp_path / "out", to="peft", rank=FULL)
    assert len(ALL) == 4
