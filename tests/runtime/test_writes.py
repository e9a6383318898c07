"""What is computed once is computed again after a write, in whichever way it was written."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adapterkit import LoraConfig
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.weights_file import NamedAdapter, WeightsFile, write_weights
from adapterkit.runtime import Adapters, LoraFA, attach, load
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.memo import bits_of

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
DORA = LoraConfig(4, 8, ["0"], dora=True, init=False)


def handle(config: LoraConfig = DORA, seed: int = 1) -> Adapters:
    torch.manual_seed(seed)
    return attach(nn.Sequential(nn.Linear(16, 12)).eval(), config, seed=seed)


def factors(h: Adapters) -> FactorsPatch:
    return h.state.sites["0"].patches["default"]["delta"]


def output(h: Adapters) -> Tensor:
    with torch.no_grad():
        return h.model(X)


def step(h: Adapters, **how) -> None:
    """A step of an optimizer with gradients from elsewhere, as a replayed graph leaves them."""
    optimizer = torch.optim.AdamW(h.parameters(), lr=0.1, **how)
    for parameter in h.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def ema(h: Adapters) -> None:
    from diffusers.training_utils import EMAModel

    own = list(h.parameters())
    shadows = EMAModel(own)
    for shadow in shadows.shadow_params:
        shadow.mul_(1.5)
    shadows.store(own)
    shadows.copy_to(own)


def restored(h: Adapters) -> None:
    """The weights of training, after an evaluation of the average."""
    from diffusers.training_utils import EMAModel

    own = list(h.parameters())
    shadows = EMAModel(own)
    shadows.store(own)
    with torch.no_grad():
        for parameter in own:
            parameter.mul_(2)
    before = output(h)
    shadows.restore(own)
    assert not torch.equal(output(h), before)
    factors(h).b.data.mul_(2)


def averaged(h: Adapters) -> None:
    """The average of weights, put into the model."""
    average = torch.optim.swa_utils.AveragedModel(h.model, avg_fn=lambda a, b, n: 3 * b)
    average.update_parameters(h.model), average.update_parameters(h.model)
    other = average.module._adapterkit
    for parameter, value in zip(h.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(value)


def swapped(h: Adapters, folder) -> None:
    with torch.inference_mode():
        handle(seed=2).save(folder / "other")
        h.swap("default", folder / "other")


def loaded(h: Adapters, assign: bool) -> None:
    state = {name: 2 * value for name, value in h.model.state_dict().items()}
    h.model.load_state_dict(state, assign=assign)


def by_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[:] *= 2


def set_(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.set_(parameter.detach() * 2)


def in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(2)


def under_no_grad(tensor: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(other)


def assigned(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value


ON_TENSORS: dict[str, Callable[[nn.Parameter], object]] = {
    "data in place": lambda p: p.data.mul_(2),
    "data": lambda p: assigned(p, p.data * 2),
    "negated data": lambda p: p.data.neg_(),
    "copy": lambda p: under_no_grad(p, p * 2),
    "list of data": lambda p: torch._foreach_mul_([p.data], 2.0),
    "numpy": by_numpy,
    "set": set_,
    "inference mode": in_inference_mode,
    "one value": lambda p: p.data.view(-1)[5].add_(1.0),
    "rows that change places": lambda p: p.data.copy_(p.data.flip(0)),
    "columns that change places": lambda p: p.data.copy_(p.data.roll(1, -1)),
}
ON_ALL: dict[str, Callable] = {
    "step": lambda h, folder: step(h, foreach=False),
    "step of lists": lambda h, folder: step(h, foreach=True),
    "fused step": lambda h, folder: step(h, fused=True),
    "EMA": lambda h, folder: ema(h),
    "restored": lambda h, folder: restored(h),
    "averaged": lambda h, folder: averaged(h),
    "swap in inference mode": swapped,
    "load_state_dict": lambda h, folder: loaded(h, assign=False),
    "load_state_dict, assigned": lambda h, folder: loaded(h, assign=True),
    "rescale": lambda h, folder: h.rescale(2.0, name="default"),
}


def check(h: Adapters, write: Callable[[], object]) -> None:
    """The output after a write is that of a copy, which starts with nothing kept."""
    before = output(h)
    assert torch.equal(output(h), before)
    write()
    expected = output(copy.deepcopy(h.model)._adapterkit)
    y = output(h)
    assert torch.equal(y, expected) and not torch.equal(y, before)


@pytest.mark.parametrize("value", ["a", "b", "magnitude", "weight"])
@pytest.mark.parametrize("way", ON_TENSORS)
def test_a_dora_acts_with_what_was_written(way, value):
    h = handle()
    owner = h.model[0] if value == "weight" else factors(h)
    check(h, lambda: ON_TENSORS[way](getattr(owner, value)))


@pytest.mark.parametrize("way", ON_ALL)
def test_a_dora_acts_with_what_was_written_to_all(way, tmp_path):
    check(h := handle(), lambda: ON_ALL[way](h, tmp_path))


def test_a_dora_of_inference_tensors_acts_with_what_was_written():
    with torch.inference_mode():
        h = handle()
    for tensor in (factors(h).a, factors(h).b, h.model[0].weight):
        check(h, lambda tensor=tensor: in_inference_mode(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bits_of_a_large_tensor_change_with_any_value_and_its_place(dtype):
    x = torch.arange(1234 * 1001).view(1234, 1001)[:, 1:].remainder(97).to(dtype)
    before, seen = bits_of([x], wait=False), []
    for change in (
        lambda t: t[0, 0].add_(1),
        lambda t: t[-1, -1].add_(1),
        lambda t: t[617, 500].neg_(),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t.copy_(t.roll(2, 1)),
        lambda t: t.copy_(t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]),
    ):
        change(y := x.clone())
        seen.append(bits_of([y], wait=False))
    assert torch.equal(bits_of([x.clone()], wait=False), before)
    assert not any(torch.equal(each, before) for each in seen)


# ------------------------------------------------------------------------ weights of directions


def directed(folder) -> Adapters:
    """An adapter that acts with a weight for each direction of its delta."""
    handle(LoraConfig(4, 8, ["0"], init=False)).save(folder / "adapter")
    weights = WeightsFile((NamedAdapter("adapter"),), (1.0,), {"0": ((2.0, 0.5, 0.0, -1.0),)})
    write_weights(replace(weights, per="direction"), folder / "weights.json")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 12)).eval()
    names = [str(folder / "adapter")]
    return load(model, names, weights=folder / "weights.json")


@pytest.mark.parametrize("way", ["data in place", "numpy", "inference mode", "list of data"])
@pytest.mark.parametrize("value", ["a", "b"])
def test_directions_are_those_of_what_was_written(way, value, tmp_path):
    h = directed(tmp_path)
    (part,) = h.state.sites["0"].patches[next(iter(h.names))].values()
    check(h, lambda: ON_TENSORS[way](getattr(part, value)))


def test_directions_are_those_of_a_swap_and_have_its_scale(tmp_path):
    h, weighted = directed(tmp_path), lambda: output(h) - bias(h)
    before = weighted()
    h.rescale(3.0, name=h.names[0])
    torch.testing.assert_close(weighted(), 3 * before)
    handle(LoraConfig(4, 8, ["0"], init=False), seed=2).save(tmp_path / "other")
    check(h, lambda: h.swap(h.names[0], tmp_path / "other"))


def bias(h: Adapters) -> Tensor:
    with h.disabled():
        return output(h)


# ------------------------------------------------------------------------ stores and optimizers


def test_a_store_keeps_what_was_written_unseen(tmp_path):
    for name in "abc":
        handle(LoraConfig(4, 8, ["0"], init=False)).save(tmp_path / name)
    h = load(nn.Sequential(nn.Linear(16, 12)), tmp_path / "c", name="own")
    store = h.store(tmp_path, max_loaded=1)
    h.activate("a")
    (part,) = h.state.sites["0"].patches["a"].values()
    part.b.data.mul_(2)
    h.activate("own")
    with pytest.raises(Refused, match="active or changed"):
        h.activate("b")
    part.b.data.div_(2)
    h.activate("b")
    assert store.loaded == ["b"]


def test_lorafa_projects_by_an_a_that_was_written_unseen():
    h = handle(LoraConfig(4, 8, ["0"], init=False))
    optimizer, part = LoraFA(h, lr=1e-2), factors(h)
    part.b.grad = torch.ones_like(part.b)
    before = optimizer._projected([part.b])[part.b]
    part.a.data.mul_(2)
    torch.testing.assert_close(4 * optimizer._projected([part.b])[part.b], before)
