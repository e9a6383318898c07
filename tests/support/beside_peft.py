"""The same adapter in PEFT and in the runtime: outputs, gradients, training, files both ways."""

import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import peft
import torch
from torch import Tensor, nn

from adapterkit.runtime import Adapters, load
from adapterkit.runtime.load import writing

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}

# What PEFT and transformers say about adapters that mean what they say
WARNINGS = [
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
    "ignore:Careful, disabling adapter layers with bias:UserWarning",
    "ignore:Model has `tie_word_embeddings=True` and:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",
]
# PEFT saves the base's own values too, and names trained ones twice
JUNK = re.compile(r"original_module|modules_to_save\.|base_layer\.weight$")
Run = Callable[[nn.Module], Tensor]


def shake(parameters, seed: int = 1) -> None:
    """Move parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise.to(parameter.dtype)


def in_peft(model: nn.Module, name: str = "default", seed: int = 1, **settings):
    """A PEFT model whose trained values are not those they start with."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=name)
    shake(trained(theirs), seed)
    return theirs


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters_of_peft(theirs) -> dict[str, Tensor]:
    """By the keys of the file."""
    state = theirs.state_dict(keep_vars=True)
    return peft.get_peft_model_state_dict(theirs, state_dict=state)


def parameters_of(adapters: Adapters, name: str = "default") -> dict[str, Tensor]:
    """By the keys of the file."""
    with mock.patch.object(writing, "stored_value", lambda value: value):
        return writing.contents(adapters.state, adapters.state.adapters[name])[0]


def gradients(model: nn.Module, run: Run) -> Tensor:
    model.zero_grad()
    y = run(model)
    y.float().square().mean().backward()
    return y.detach()


def compare(
    make: Callable[[], nn.Module],
    run: Run,
    folder: Path,
    *,
    steps: int = 3,
    replicated: bool = False,
    **settings,
):
    """Assert that an adapter of PEFT has the same outputs, gradients and training in the runtime,
    and that PEFT reads what the runtime writes. Returns both."""
    theirs = in_peft(make(), **settings).train()
    theirs.save_pretrained(folder / "theirs")
    ours = make().train()
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    adapters = load(ours, folder / "theirs", trainable=True)
    optimizers = [torch.optim.AdamW(trained(model), lr=0.01) for model in (theirs, ours)]
    for _ in range(steps):
        torch.testing.assert_close(gradients(ours, run), gradients(theirs, run))
        expected = parameters_of_peft(theirs)
        actual = parameters_of(adapters)
        assert set(actual) <= set(expected)
        assert all(JUNK.search(key) for key in set(expected) - set(actual))
        for key, parameter in actual.items():
            if parameter.requires_grad:
                say = f"gradient of {key}"
                torch.testing.assert_close(parameter.grad, expected[key].grad, msg=say)
        for optimizer in optimizers:
            optimizer.step()
    adapters.save(folder / "ours")
    again = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
    with torch.no_grad():
        y = run(ours.eval())
        torch.testing.assert_close(y, run(theirs.eval()))
        torch.testing.assert_close(y, run(again))
        with adapters.disabled():
            if not replicated:
                assert torch.equal(run(ours), run(make().eval()))
            assert not torch.allclose(run(ours), y)
    assert replicated or ours.state_dict().keys() == state.keys()
    other = load(make().eval(), folder / "ours", trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(run(other.model), y, rtol=0, atol=0)
    return theirs, adapters


def check_merging(adapters: Adapters, run: Run) -> None:
    """Assert that merging changes no output to rounding, and unmerging none at all."""
    model = adapters.model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        y = run(model)
        adapters.merge()
        torch.testing.assert_close(run(model), y)
        with adapters.disabled():
            assert_same(model.state_dict(), before)
        adapters.unmerge()
        assert torch.equal(run(model), y)
    assert_same(model.state_dict(), before)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different
