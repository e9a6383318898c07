"""resize of other kinds: what is refused, and how it is named."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit import resize
from adapterkit.core.errors import Refused
from adapterkit.core.registry import members
from tests.support.kinds import PRUNED, SIMPLE, Case, resized, rewritten, trained


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(params=SIMPLE)
def simple(request, base, tmp_path):
    case = SIMPLE[request.param]
    return case, trained(case, base, tmp_path / "adapter")


def refused(case, base, adapter, tmp_path, match, **how):
    with pytest.raises(Refused) as caught:
        resized(case, base, adapter, tmp_path / "out", **({"rank": 2} | how))
    assert re.search(match, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_an_unknown_setting_is_refused(simple, base, tmp_path):
    case, adapter = simple
    text = refused(case, base, edited(adapter, use_magic=True, more_magic=3), tmp_path, "use_magic")
    assert "more_magic" in text and "2 problems" in text


def test_settings_that_make_no_sense_are_refused(simple, base, tmp_path):
    case, adapter = simple
    for key in members("kinds")[case.kind].settings:
        now = json.loads((adapter / "adapter_config.json").read_text())[key]
        wrong = 7 if key == "feedforward_modules" else "many"
        refused(case, base, edited(adapter, **{key: wrong}), tmp_path, f"{key} = {wrong!r}")
        edited(adapter, **{key: now})
    refused(case, base, edited(adapter, modules_to_save="head"), tmp_path, "modules_to_save")


@pytest.mark.parametrize(
    "kind", [kind for kind in SIMPLE if kind not in ("oft", "hra", "ia3", "miss")]
)  # whose modules have one
def test_a_missing_tensor_is_refused(kind, base, tmp_path):
    adapter = rewritten(
        trained(SIMPLE[kind], base, tmp_path / "adapter"),
        lambda t: t.pop(next(k for k in t if ".fit." in k)),
    )
    refused(SIMPLE[kind], base, adapter, tmp_path, "fit has .*\n.*also ")


def test_a_tensor_of_another_shape_is_refused_with_all_others(simple, base, tmp_path):
    case, adapter = simple

    def cut(tensors):
        for key in [k for k in tensors if ".fit." in k or ".tall." in k]:
            tensors[key] = torch.zeros(5, 4)

    text = refused(case, base, rewritten(adapter, cut), tmp_path, "fit: ")
    assert "tall: " in text


def test_a_tensor_of_another_type_of_adapter_is_refused(simple, base, tmp_path):
    case, adapter = simple
    key = "base_model.model.fit.boft_R"
    refused(
        case, base, rewritten(adapter, lambda t: t.update({key: torch.ones(1)})), tmp_path, "boft_R"
    )


def test_a_module_inside_another_adapters_layer_is_refused(simple, base, tmp_path):
    case, adapter = simple

    def wrap(tensors):
        for key in [k for k in tensors if ".fit." in k]:
            tensors[key.replace(".fit.", ".fit.base_layer.")] = tensors.pop(key)

    refused(case, base, rewritten(adapter, wrap), tmp_path, "fit.base_layer.* is inside")


def test_integers_are_refused(simple, base, tmp_path):
    case, adapter = simple

    def count(tensors):
        key = next(k for k in tensors if ".fit." in k)
        tensors[key] = tensors[key].int()

    refused(case, base, rewritten(adapter, count), tmp_path, "is I32")


def test_another_base_is_refused(simple, base, tmp_path):
    """Its `fit` has other shapes, its `tall` is missing."""
    _, adapter = simple
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"fit.weight": torch.zeros(11, 11)}, other / "model.safetensors")
    with pytest.raises(Refused) as caught:
        resize(adapter, base=other, out=tmp_path / "out", rank=2)
    assert "no matrix tall.weight" in str(caught.value) and "fit: " in str(caught.value)


def test_keeping_alpha_is_refused(simple, base, tmp_path):
    case, adapter = simple
    refused(case, base, adapter, tmp_path, "--alpha keep", alpha="keep")


@pytest.mark.parametrize("kind", [kind for kind, case in SIMPLE.items() if case.base])
def test_without_its_base_it_is_refused(kind, base, tmp_path):
    adapter = trained(SIMPLE[kind], base, tmp_path / "adapter")
    refused(
        Case(kind, []),
        base,
        adapter,
        tmp_path,
        f"a {kind.upper()} adapter without its base.*\n.*--base BASE",
    )


def test_verbs_without_a_base_point_to_a_conversion_with_it(base, tmp_path):
    from adapterkit import combine

    adapter = trained(SIMPLE["vera"], base, tmp_path / "adapter")
    with pytest.raises(Refused, match="(?s)a VERA adapter without.*convert .* --base BASE"):
        combine([adapter, adapter], out=tmp_path / "out")


def test_types_that_nobody_knows_are_refused(base, tmp_path):
    adapter = edited(trained(SIMPLE["loha"], base, tmp_path / "adapter"), peft_type="SHIRA")
    known = ", ".join(["LORA", *map(str.upper, members("kinds"))])
    refused(SIMPLE["loha"], base, adapter, tmp_path, f"peft_type 'SHIRA'\n  expected: {known}")
    refused(SIMPLE["loha"], base, edited(adapter, peft_type=None), tmp_path, "peft_type None")


def test_vera_without_its_projections_is_refused(base, tmp_path):
    adapter = trained(SIMPLE["vera"], base, tmp_path / "adapter", save_projection=False)
    refused(
        SIMPLE["vera"], base, adapter, tmp_path, "(?s)save_projection false.*adapterkit extract"
    )
    refused(
        SIMPLE["vera"],
        base,
        edited(adapter, save_projection=True),
        tmp_path,
        "no vera_A and no vera_B",
    )


@pytest.mark.parametrize(
    "a, b", [((0, -1), (0, 0)), ((-1, 0), (0, 0)), ((0, 0), (-1, 0)), ((0, 0), (0, -1))]
)
def test_projections_of_vera_that_are_too_small_are_refused(a, b, base, tmp_path):
    """By one row or one column, of the one or the other."""

    def cut(tensors):
        for name, (rows, columns) in (("vera_A", a), ("vera_B", b)):
            key = next(key for key in tensors if key.endswith(name))
            value = tensors[key]
            tensors[key] = value[: len(value) + rows, : value.shape[1] + columns].contiguous()

    adapter = rewritten(trained(SIMPLE["vera"], base, tmp_path / "adapter"), cut)
    refused(SIMPLE["vera"], base, adapter, tmp_path, "vera_A .*, vera_B ")


def test_oft_of_a_kernel_is_refused(base, tmp_path):
    case = Case("oft", ["image", "fit"], {"oft_block_size": 3}, base=True)
    refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "image: OFT of a kernel"
    )


def test_ia3_of_outputs_with_biases_needs_a_merge(base, tmp_path):
    case = Case("ia3", ["fit", "wide", "tall"], {"feedforward_modules": ["tall"]}, base=True)
    adapter = trained(case, base, tmp_path / "adapter")
    text = refused(case, base, adapter, tmp_path, "(?s)fit: .*scales the bias.*adapterkit merge")
    assert "wide" not in text and "tall" not in text


def test_the_series_of_old_peft_is_refused(base, tmp_path):
    adapter = edited(trained(SIMPLE["oft"], base, tmp_path / "adapter"), peft_version="0.17.1")
    refused(SIMPLE["oft"], base, adapter, tmp_path, "use_cayley_neumann, and peft_version 0.17.1")


def test_a_full_w2_on_a_conv1d_is_refused(base, tmp_path):
    """PEFT's product there is a permuted one: no Kronecker product."""
    case = Case("lokr", ["line"], {"r": 50})
    refused(case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "line: PEFT's product")


def test_a_kernel_of_one_axis_needs_the_base(base, tmp_path):
    case = Case("loha", ["line", "strip", "fit"], {"r": 2, "use_effective_conv2d": True})
    text = refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "line: a kernel"
    )
    assert "strip: a kernel" in text and "fit" not in text


def test_a_grouped_convolution_is_refused(tmp_path):
    """Its weight does not show it: (8, 1, 7, 7) could be a convolution of one channel."""
    import transformers

    from tests.support import oracle

    oracle.save_base(
        transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1)
        ),
        tmp_path,
        "fp32",
    )
    model = transformers.ConvNextModel.from_pretrained(tmp_path)
    peft.get_peft_model(model, peft.LoHaConfig(target_modules=["dwconv"], r=1)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(Refused, match="dwconv has 8 groups"):
        resize(tmp_path / "adapter", base=tmp_path, out=tmp_path / "out", rank=1)


def test_a_wrong_rank_pattern_is_refused(base, tmp_path):
    case = Case(
        "adalora",
        ["fit", "prime"],
        {"init_r": 4},
        pruned={k: PRUNED[k] for k in ("fit.lora_E", "prime.lora_E")},
    )
    adapter = trained(case, base, tmp_path / "adapter")
    refused(case, base, edited(adapter, rank_pattern=None), tmp_path, "(?s)fit: .*prime: ")
    refused(
        case,
        base,
        edited(adapter, rank_pattern={"fit.lora_E": [1, 0]}),
        tmp_path,
        r"rank_pattern.fit.lora_E\[0\] = 1\n.*true or false",
    )


def test_an_adapter_pruned_to_nothing_is_refused(base, tmp_path):
    case = Case("adalora", ["tall"], {"init_r": 4}, pruned={"tall.lora_E": [False] * 4})
    refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "no module with factors"
    )


def test_dora_of_a_changed_base_is_refused(base, tmp_path):
    case = Case("dora", ["fit"], base=True)
    adapter = edited(trained(case, base, tmp_path / "adapter"), init_lora_weights="pissa")
    refused(case, base, adapter, tmp_path, "initialized by pissa")


def test_dora_of_a_row_of_zeros_has_no_value(base, tmp_path):
    from adapterkit.core.errors import Unrecoverable

    case = Case("dora", ["fit"], base=True)
    adapter = trained(case, base, tmp_path / "adapter")
    rewritten(adapter, lambda t: [t[k][0].zero_() for k in t if "lora_B" in k])
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(base / "model.safetensors")
    tensors["fit.weight"][0] = 0
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text("{}")
    with pytest.raises(Unrecoverable, match="delta of fit is not finite"):
        resize(adapter, base=broken, out=tmp_path / "out", rank=2)
