"""Several adapters of one changed base: each contains the initial factors that the base lacks, so
they go into it once. PEFT's sums in float64 are the reference."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused
from adapterkit.runtime import load as load_live
from adapterkit.verbs.score.variants import with_adapters
from tests.inits.test_changed_bases import IDS, LLAMA, logits, train_with_peft
from tests.support import initialized, oracle
from tests.support.inspections import inspect, problems_of


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A changed base, and two adapters that PEFT trained on it with different texts."""
    folder = tmp_path_factory.mktemp("two")
    oracle.save_base(oracle.llama(), folder / "original", "fp32")
    given = {"method": "pissa", "rank": 4, "targets": "q_proj,v_proj"}
    adapterkit.init(folder / "original", **given, out=folder / "out")
    base, start = folder / "out/base", folder / "out/adapter"
    for name, ids in (("first", IDS), ("second", IDS.flip(1) % 11)):
        train_with_peft(base, start, folder / name, ids)
    return base, folder / "first", folder / "second"


def refused(call, *words: str) -> Refused:
    """The one refusal of a call, of AK304, with these words."""
    with pytest.raises(Refused) as caught:
        call()
    assert caught.value.code == "AK304"
    assert all(word in caught.value.problem for word in words), caught.value.problem
    return caught.value


def expected(two, weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    """The weights W' + Σ w·s·b@a of PEFT's own merges, in float64."""
    base = oracle.stored(two[0])
    alone = [initialized.rebuilt(LLAMA, two[0], one) for one in two[1:]]
    return {
        key: value.double()
        + sum(
            w * (one[key].double() - value.double()) for w, one in zip(weights, alone, strict=True)
        )
        for key, value in base.items()
    }


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75), (1.0, 0.0), (1.5, -0.5)])
def test_weights_with_the_sum_1_give_what_peft_computes(weights, two, tmp_path):
    base, first, second = two
    adapterkit.merge(base, {first: weights[0], second: weights[1]}, out=tmp_path / "out")
    initialized.assert_close(oracle.stored(tmp_path / "out"), expected(two, weights), 1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.6), (1.0, -1.0), (0.0, 0.0)])
def test_other_sums_are_refused(weights, two, tmp_path):
    base, first, second = two
    call = lambda: adapterkit.merge(
        base, {first: weights[0], second: weights[1]}, out=tmp_path / "out"
    )
    error = refused(call, f"add up to {sum(weights):g} on ", "q_proj", "init-")
    command = f"adapterkit merge {base} {first}=0.5 {second}=0.5 --out merged"
    assert error.hint.endswith(command)
    assert not (tmp_path / "out").exists()


def test_half_of_one_adapter_is_refused(two, tmp_path):
    error = refused(
        lambda: adapterkit.merge(two[0], {two[1]: 0.5}, out=tmp_path / "out"), "add up to 0.5 on "
    )
    assert error.hint.endswith(f"adapterkit merge {two[0]} {two[1]}=1 --out merged")


@pytest.fixture(scope="module")
def merged(two, tmp_path_factory) -> Path:
    """The changed base with the first adapter merged into it."""
    out = tmp_path_factory.mktemp("merged") / "out"
    adapterkit.merge(two[0], [two[1]], out=out, max_shard_size="20KB")
    return out


def test_a_second_adapter_into_a_merge_is_refused(two, merged, tmp_path):
    assert len(list(merged.glob("*.safetensors"))) > 1
    adapterkit.verify(merged)
    for more in ({}, {"base_is_residual": True}):
        call = partial(adapterkit.merge, merged, [two[2]], out=tmp_path / "out", **more)
        error = refused(call, "has an adapter of init-", "once more")
        assert f"adapterkit rebase {two[2]} --initial" in error.hint
    [problem] = problems_of(inspect(two[2], base=merged))
    assert problem == error.problem


def test_a_rebased_second_adapter_goes_into_a_merge(two, merged, tmp_path):
    """The error's hint: W + learned₁ + learned₂."""
    base, _, second = two
    start = base.parent / "adapter"
    adapterkit.rebase(second, initial=start, out=tmp_path / "plain")
    adapterkit.merge(merged, [tmp_path / "plain"], out=tmp_path / "out")
    both, original = expected(two, (1.0, 1.0)), initialized.rebuilt(LLAMA, base, start)
    stored = oracle.stored(base)
    both = {k: v - (original[k].double() - stored[k].double()) for k, v in both.items()}
    initialized.assert_close(oracle.stored(tmp_path / "out"), both, 1e-6)


def test_a_merge_undone_is_the_changed_base_again(two, merged, tmp_path):
    base, first, second = two
    adapterkit.merge(merged, {first: -1}, out=tmp_path / "back")
    initialized.assert_close(oracle.stored(tmp_path / "back"), oracle.stored(base), 1e-6)
    adapterkit.merge(tmp_path / "back", [second], out=tmp_path / "out")
    initialized.assert_close(oracle.stored(tmp_path / "out"), expected(two, (0.0, 1.0)), 1e-6)
    refused(
        lambda: adapterkit.merge(tmp_path / "out", {first: -0.5}, out=tmp_path / "half"),
        "once more",
    )


def test_modules_that_are_left_out_are_refused(two, tmp_path):
    """Their initial factors would be missing."""
    base, first, _ = two
    options = [{"exclude": "v_proj"}, {"weight_for": ["v_proj=0.5"]}]
    for more, total in zip(options, ("0", "0.5"), strict=True):
        call = partial(adapterkit.merge, base, [first], out=tmp_path / "out", **more)
        error = refused(call, f"add up to {total} on ", "v_proj")
        assert "q_proj" not in error.problem and "adapterkit rebase" in error.hint


def test_methods_that_are_no_sum_are_refused(two, tmp_path):
    base, first, second = two
    call = lambda: adapterkit.merge(
        base, {first: 0.5, second: 0.5}, method="ties", density=0.5, out=tmp_path / "out"
    )
    refused(call, "--method ties")


def test_the_mark_stays_with_an_adapter_of_another_base(two, tmp_path):
    base, first, _ = two
    given = {"method": "random", "rank": 2, "targets": "q_proj"}
    adapterkit.init(base, **given, out=tmp_path / "plain")
    adapterkit.merge(base, [tmp_path / "plain/adapter"], out=tmp_path / "out")
    adapterkit.merge(tmp_path / "out", [first], out=tmp_path / "both")
    refused(
        lambda: adapterkit.merge(tmp_path / "out", {first: 2}, out=tmp_path / "twice"),
        "add up to 2",
    )


def live(two, weights: tuple[float, float]):
    """The changed base with both adapters, and the warnings about sums of weights."""
    model = initialized.load(LLAMA, two[0])
    adapters = load_live(model, two[1], name="first")
    adapters.load(two[2], name="second")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapters.activate({"first": weights[0], "second": weights[1]})
    return adapters, model, [str(one.message) for one in caught if "add up to" in str(one.message)]


def test_a_live_model_with_the_sum_1_is_what_peft_computes(two):
    adapters, model, words = live(two, (0.25, 0.75))
    assert words == []
    reference = initialized.load(LLAMA, two[0])
    reference.load_state_dict({k: v.float() for k, v in expected(two, (0.25, 0.75)).items()})
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    adapters.merge()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)


def test_a_live_model_warns_of_other_sums_and_merges_none(two, tmp_path):
    adapters, _, words = live(two, (1.0, 1.0))
    assert len(words) == 1 and "add up to 2 on " in words[0] and "q_proj" in words[0]
    error = refused(adapters.merge, "add up to 2 on ")
    assert error.where == "first, second" and adapters.merged == {}
    refused(lambda: adapters.merge({"first": 0.5}), "add up to 1.5 on ")
    adapters.activate("first")
    with pytest.warns(UserWarning, match="add up to 0.5 on "):
        adapters.rescale(0.5, name="first")
    refused(lambda: adapters.save(tmp_path / "half", name="first"), "times 0.5")
    assert not (tmp_path / "half").exists()
    adapters.rescale(2, name="first")
    adapters.save(tmp_path / "whole", name="first")


def test_a_score_refuses_other_sums(two):
    call = lambda: with_adapters(LocalFolder(two[0]), [(LocalFolder(one), 1.0) for one in two[1:]])
    refused(call, "add up to 2 on ")


@pytest.mark.parametrize(
    "method", [{}, {"method": "mean"}, {"method": "ema", "settings": {"decay": 0.5}}]
)
def test_a_sum_with_the_weight_1_keeps_the_mark(method, two, tmp_path):
    base, first, second = two
    weights = {"mean": (3.0, 1.0), "ema": (0.5, 1.5)}.get(method.get("method"), (0.75, 0.25))
    shares = {"ema": (0.25, 0.75)}.get(method.get("method"), (0.75, 0.25))
    adapterkit.combine(
        dict(zip((first, second), weights, strict=True)), out=tmp_path / "both", **method
    )
    adapterkit.merge(base, [tmp_path / "both"], out=tmp_path / "out")
    initialized.assert_close(oracle.stored(tmp_path / "out"), expected(two, shares), 1e-6)
    call = lambda: adapterkit.merge(base.parent.parent / "original", [tmp_path / "both"], out="x")
    refused(call, "no mark")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "add up to 2 on "),
        ({"weights": (0.5, 0.2)}, "add up to 0.7 on "),
        ({"weights": (0.5, 0.5), "weight_for": ["1:v_proj=1"]}, "add up to 1.5 on "),
        ({"method": "ties", "density": 0.5}, "--method ties"),
        ({"weights": (0.5, 0.5), "space": "factors"}, "--space factors"),
        ({"settings": {"strength": "strongest"}}, "add up to "),
    ],
)
def test_combinations_that_lose_initial_factors_are_refused(options, words, two, tmp_path):
    """PEFT's `linear`, --space factors, has the cross terms of the initial factors too."""
    options = {"method": "linear"} | options
    weights = options.pop("weights", (1.0, 1.0))
    adapters = dict(zip(two[1:], weights, strict=True))
    error = refused(lambda: adapterkit.combine(adapters, out=tmp_path / "out", **options), words)
    assert "adapterkit rebase ADAPTER --initial" in error.hint or f"rebase {two[1]}" in error.hint


@pytest.fixture(scope="module")
def others(two, tmp_path_factory) -> tuple[Path, Path]:
    """A plain adapter, and one of another changed base."""
    folder, original = tmp_path_factory.mktemp("others"), two[0].parent.parent / "original"
    given = {"rank": 2, "targets": "q_proj,v_proj"}
    adapterkit.init(original, method="random", **given, out=folder / "plain")
    adapterkit.init(original, method="milora", **given, out=folder / "milora")
    return folder / "plain/adapter", folder / "milora/adapter"


def test_a_plain_adapter_first_does_not_drop_the_mark(two, others, tmp_path):
    adapterkit.combine([others[0], two[1]], method="linear", out=tmp_path / "both")
    adapterkit.merge(two[0], [tmp_path / "both"], out=tmp_path / "out")
    adapterkit.merge(two[0], [two[1], others[0]], out=tmp_path / "expected")
    wanted = oracle.stored(tmp_path / "expected")
    initialized.assert_close(oracle.stored(tmp_path / "out"), wanted, 1e-6)
    call = lambda: adapterkit.merge(
        two[0].parent.parent / "original", [tmp_path / "both"], out=tmp_path / "wrong"
    )
    refused(call, "no mark")


def test_adapters_of_two_changed_bases_are_refused(two, others, tmp_path):
    call = lambda: adapterkit.combine([two[1], others[1]], method="linear", out=tmp_path / "out")
    refused(call, "2 changed bases")


def test_a_difference_keeps_the_initial_factors_or_is_refused(two, others, tmp_path):
    base, first, second = two
    plain = others[0]
    adapterkit.subtract([first], general=[plain], out=tmp_path / "out")
    adapterkit.merge(base, [tmp_path / "out"], out=tmp_path / "merged")
    adapterkit.merge(base, {first: 1, plain: -1}, out=tmp_path / "expected")
    wanted = oracle.stored(tmp_path / "expected")
    initialized.assert_close(oracle.stored(tmp_path / "merged"), wanted, 1e-6)
    subtract = lambda one, other, **more: adapterkit.subtract(
        [one], general=[other], out=tmp_path / "no", **more
    )
    refused(lambda: subtract(first, second), "add up to 0 on ")
    refused(lambda: subtract(plain, first), "add up to -1 on ")
    refused(lambda: subtract(first, second, space="factors"), "--space factors")


def test_what_is_no_sum_is_refused(two, tmp_path):
    base, first, _ = two
    words = "was initialized by init-"
    refused(lambda: adapterkit.arrow([first], out=tmp_path / "arrow"), words)
    given = {"energy": 0.9, "base": base, "drop_intruders": 1.0}
    refused(lambda: adapterkit.resize(first, **given, out=tmp_path / "resized"), words)


@pytest.mark.parametrize("by", ["data", "score"])
def test_a_fit_is_refused(by, two, tmp_path):
    """Its weights would have any sum."""
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n' * 20)
    given = {
        "data": {"data": tmp_path / "ids.jsonl", "samples": 16},
        "score": {"score": "evaluate {}"},
    }
    with pytest.raises(Refused, match="was initialized by init-"):
        adapterkit.fit(two[0], two[1:], **given[by], out=tmp_path / "weights.json")


@pytest.mark.parametrize(
    "options", [{}, {"dequantize": True}, {"rounding": "stochastic", "seed": 1}]
)
def test_a_quantized_base_gets_the_mark_of_a_merge(options, tmp_path):
    """Its files keep their format, so their layout is another code."""
    oracle.save_base(oracle.llama(hidden_size=64), tmp_path / "original", "bf16")
    given = {"method": "pissa", "rank": 4, "targets": "q_proj,v_proj", "quantize": "nf4"}
    adapterkit.init(tmp_path / "original", **given, out=tmp_path / "start")
    base, adapter = tmp_path / "start/base", tmp_path / "start/adapter"
    adapterkit.merge(base, [adapter], out=tmp_path / "merged", **options)
    adapterkit.verify(tmp_path / "merged")
    refused(lambda: adapterkit.merge(tmp_path / "merged", [adapter], out="x"), "once more")


def test_adapters_of_an_init_of_peft_on_their_changed_base(two, tmp_path):
    """--base-is-residual says that BASE is the changed base of all of them."""
    for number, source in enumerate(two[1:]):
        folder = shutil.copytree(source, tmp_path / str(number))
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"revision": None, "init_lora_weights": ["pissa", "pissa_niter_4"][number]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    base = shutil.copytree(two[0], tmp_path / "base")
    data = (file := base / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")  # of a header, which gets spaces at its end
    header = (size + 64).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 64
    file.write_bytes(header + data[8 + size :])
    merge = lambda first, second, out: adapterkit.merge(
        base,
        {tmp_path / "0": first, tmp_path / "1": second},
        base_is_residual=True,
        out=tmp_path / out,
    )
    error = refused(lambda: merge(1, 1, "wrong"), "an init that names no base add up to 2 on ")
    assert error.hint.endswith("=0.5 --base-is-residual --out merged")
    merge(0.25, 0.75, "out")
    merged = (tmp_path / "out/model.safetensors").read_bytes()
    assert merged.startswith(header)  # no mark without a name
    initialized.assert_close(oracle.stored(tmp_path / "out"), expected(two, (0.25, 0.75)), 1e-6)
