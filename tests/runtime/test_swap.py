"""New weights under an old name: equal to a fresh load, without a new compilation."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.live import llama, peft_of, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def inference(one_thread):
    with torch.no_grad():
        yield


def write(folder, config: LoraConfig, seed: int, model=llama):
    """An adapter with random values in a folder."""
    adapters = attach(model(), config, seed=seed)
    torch.manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    adapters.save(folder)
    return folder


@pytest.fixture
def first(tmp_path):
    return write(tmp_path / "first", LoraConfig(4, 8, ["q_proj", "v_proj", "up_proj"]), 1)


@pytest.fixture
def second(tmp_path):
    """Other ranks and scales, by patterns, on a subset of the modules."""
    config = LoraConfig(
        2, 16, ["q_proj", "v_proj"], rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 3}
    )
    return write(tmp_path / "second", config, 2)


def logits(source) -> torch.Tensor:
    return load(llama(), source).model(tokens()).logits


def test_as_a_fresh_load(first, second):
    adapters = load(llama(), first, pad_rank=8)
    torch.testing.assert_close(adapters.model(tokens()).logits, logits(first), **CLOSE)
    adapters.swap("default", second)
    torch.testing.assert_close(adapters.model(tokens()).logits, logits(second), **CLOSE)
    adapters.swap("default", first)
    torch.testing.assert_close(adapters.model(tokens()).logits, logits(first), **CLOSE)


def test_as_pefts_load_of_the_second(first, second):
    """PEFT's own hotswap takes one scale for all modules, whatever the patterns say."""
    adapters = load(llama(), first, pad_rank=8)
    adapters.swap("default", second)
    theirs = peft_of(second, llama())(tokens()).logits
    torch.testing.assert_close(adapters.model(tokens()).logits, theirs, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_bias": True}], ids=str)
def test_no_new_compilation(tmp_path, options):
    """Other values, ranks and scales, modules left out, another factor: one compilation."""
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    torch.manual_seed(0)
    base = model().state_dict()

    def build():
        same = model()
        same.load_state_dict(base)
        return same

    first = write(tmp_path / "a", LoraConfig(2, 4, ["0", "2"], **options), 1, build)
    config = LoraConfig(3, 5, ["0", "2"], alpha_pattern={"0": 7}, **options)
    second = write(tmp_path / "b", config, 2, build)
    third = write(tmp_path / "c", LoraConfig(1, 2, ["2"], **options), 3, build)
    adapters, x = load(build(), first, pad_rank=4), torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(adapters.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), load(build(), first).model(x), **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for source in (second, third, first):
            adapters.swap("default", source)
            torch.testing.assert_close(compiled(x), load(build(), source).model(x), **CLOSE)
        before = compiled(x)
        adapters.rescale(0.5, name="default")
        assert not torch.allclose(compiled(x), before)


def test_the_count_of_compilations_would_show(tmp_path):
    """Without pad_rank the scale is a number in the compiled code."""
    build = lambda: nn.Sequential(nn.Linear(6, 8))
    first = write(tmp_path / "a", LoraConfig(2, 4, ["0"]), 1, build)
    second = write(tmp_path / "b", LoraConfig(2, 9, ["0"]), 2, build)
    adapters, x = load(build(), first), torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(adapters.model, fullgraph=True, backend="eager")
    compiled(x)
    adapters.swap("default", second)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        compiled(x)


def test_the_saved_file_has_the_true_ranks(tmp_path, first, second):
    adapters = load(llama(), first, pad_rank=16)
    adapters.save(tmp_path / "same")
    adapters.swap("default", second)
    adapters.save(tmp_path / "new")
    for saved, source in (("same", first), ("new", second)):
        values, expected = (
            load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / saved, source)
        )
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[key], expected[key]) for key in values)
    torch.testing.assert_close(logits(tmp_path / "new"), logits(second), **CLOSE)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_parameters_are_the_same_objects_and_train(first, second):
    adapters = load(llama(), first, pad_rank=8, trainable=True)
    before = list(map(id, adapters.parameters()))
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    adapters.swap("default", second)
    assert list(map(id, adapters.parameters())) == before
    with torch.enable_grad():
        adapters.model(tokens()).logits.square().mean().backward()
    optimizer.step()
    changed = adapters.model(tokens()).logits
    assert not torch.allclose(changed, logits(second), **CLOSE)
    ranks = {part.stored_rank for _, part in adapters.state.adapters["default"].patches()}
    assert ranks == {0, 2, 8}  # zeros behind a rank have no gradient


def test_trained_values_in_the_padding_are_saved(tmp_path, first):
    adapters = load(llama(), first, pad_rank=6, trainable=True)
    for parameter in adapters.parameters():
        parameter.add_(0.01)
    adapters.save(tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), adapters.model(tokens()).logits, **CLOSE)


def test_the_scale_stays_exact_in_a_half_precision_model(tmp_path):
    build = lambda: nn.Sequential(nn.Linear(6, 8))
    first = write(tmp_path / "a", LoraConfig(3, 1, ["0"]), 1, build)
    adapters = load(build(), first, pad_rank=4)
    adapters.model.to(torch.bfloat16)
    adapters.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_alpha"] == 1
    part = next(iter(adapters.state.adapters["default"].patches()))[1]
    assert part.scale.dtype == torch.float32


def test_merging_and_rows_of_padded_factors(first, second):
    adapters = load(llama(), first, pad_rank=8)
    adapters.swap("default", second)
    expected = adapters.model(tokens()).logits
    with adapters.rows(["default", None]):
        torch.testing.assert_close(adapters.model(tokens()).logits[0], expected[0], **CLOSE)
    adapters.merge()
    torch.testing.assert_close(adapters.model(tokens()).logits, expected, **CLOSE)


# --- refused --------------------------------------------------------------------------------------


def refuses(adapters, source, *words: str) -> None:
    before = adapters.model(tokens()).logits
    with pytest.raises(AdapterkitError) as caught:
        adapters.swap("default", source)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(adapters.model(tokens()).logits, before)


def test_modules_that_the_old_one_lacks(first, second):
    refuses(load(llama(), second, pad_rank=8), first, "up_proj", "modules of the old adapter")


def test_ranks_above_pad_rank(first, second):
    refuses(load(llama(), first, pad_rank=7), second, "rank 8 at", "v_proj", "at most 7")
    refuses(load(llama(), first), second, "rank 8 at", "at most 4", "pad_rank")


@pytest.mark.parametrize("options", [{"dora": True}, {"lora_bias": True}], ids=str)
def test_a_swap_to_another_kind_is_refused(tmp_path, first, options):
    other = write(tmp_path / "other", LoraConfig(4, 8, ["q_proj"], **options), 3)
    refuses(load(llama(), first), other, "LinearPatch with", "q_proj")
    refuses(
        load(llama(), other), write(tmp_path / "plain", LoraConfig(4, 8, ["q_proj"]), 1), "with"
    )


def test_names_and_states(first, second):
    adapters = load(llama(), first, pad_rank=8)
    with pytest.raises(AdapterkitError, match="no adapter other"):
        adapters.swap("other", second)
    with adapters.rows([None, "default"]), pytest.raises(AdapterkitError, match="inside rows"):
        adapters.swap("default", second)
    adapters.merge()
    with pytest.raises(AdapterkitError, match="is merged"):
        adapters.swap("default", second)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_pad_rank_that_is_no_rank(first, rank):
    model = llama()
    with pytest.raises(AdapterkitError, match="pad_rank"):
        load(model, first, pad_rank=rank)
    load(model, first)


def test_pad_rank_below_the_ranks(first):
    with pytest.raises(AdapterkitError, match=r"rank 4 at [\s\S]*at most 3"):
        load(llama(), first, pad_rank=3)


def test_padding_for_rank_one(tmp_path):
    one = write(tmp_path / "one", LoraConfig(1, 2, ["q_proj"]), 3)
    adapters = load(llama(), one, pad_rank=1)
    torch.testing.assert_close(adapters.model(tokens()).logits, logits(one), **CLOSE)
