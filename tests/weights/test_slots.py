"""Slots: conversions of transformers move symbols as they move tensors."""

import pytest
import torch
import transformers
from transformers import core_model_loading

from adapterkit.core.weights.parameters import Unsupported
from adapterkit.core.weights.symbols import Symbol
from tests.support.slots import gathered

pytestmark = pytest.mark.quick


def rope(module, **given):
    return module.PermuteForRope(permute_layer_names=["s0"], **given)  # 5.16 has no default


OPERATIONS = [
    ("Chunk", lambda o: o.Chunk(dim=0), [(12, 5)], 3),
    ("Chunk unequal", lambda o: o.Chunk(dim=0), [(10, 5)], 3),
    ("Concatenate", lambda o: o.Concatenate(dim=1), [(4, 3), (4, 5)], 1),
    ("Interleave", lambda o: o.Interleave(dim=0), [(8, 3)], 1),
    ("Interleave inverse", lambda o: o.Interleave(dim=1, inverse=True), [(3, 8)], 1),
    ("Transpose", lambda o: o.Transpose(0, 1), [(4, 7)], 1),
    ("Transpose stack", lambda o: o.Transpose(1, 2), [(2, 4, 7)], 1),
    ("PermuteForRope", rope, [(16, 3)], 1),
    ("PermuteForRope inverse", lambda o: rope(o, inverse=True), [(16, 3)], 1),
    ("Conv3dToLinear", lambda o: o.Conv3dToLinear(2, (1, 3, 3)), [(4, 2, 1, 3, 3)], 1),
]


@pytest.mark.parametrize("name, make, shapes, targets", OPERATIONS, ids=[o[0] for o in OPERATIONS])
def test_operations_on_symbols_move_what_they_move_on_tensors(name, make, shapes, targets):
    operation = make(core_model_loading)
    sources = [f"s{i}" for i in range(len(shapes))]
    names = [f"t{i}" for i in range(targets)]
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=4)
    stored = {s: torch.arange(float(torch.Size(shape).numel())).view(shape) + 1000 * i
              for i, (s, shape) in enumerate(zip(sources, shapes, strict=True))}  # fmt: skip

    def convert(inputs):
        return operation.convert(
            inputs, source_patterns=sources, target_patterns=names, config=config
        )

    real = convert({k: [v] for k, v in stored.items()})
    symbols = convert({s: [Symbol.of(s, shape)] for s, shape in zip(sources, shapes, strict=True)})
    assert set(real) == set(symbols)
    for key, symbol in symbols.items():
        expected = real[key][0] if isinstance(real[key], list) else real[key]
        symbol = symbol[0] if isinstance(symbol, list) else symbol

        class Parameter:
            shape, slots = tuple(symbol.shape), symbol.slots

        assert torch.equal(gathered(Parameter, stored), expected)


FUNCTIONS = {
    "unbind": lambda x, y: torch.stack([x, y]).unbind(0),
    "unbind another axis": lambda x, y: torch.stack([x, y], 1).unbind(1),
    "chunk and squeeze": lambda x, y: [c.squeeze(-3) for c in torch.stack([x, y]).chunk(2)],
    "squeeze a longer axis": lambda x, y: [x.squeeze(0), y.squeeze(1)],
    "one of a stack": lambda x, y: [torch.stack([x, y])[1], torch.stack([x, y])[-2]],
    "rows of one": lambda x, y: [torch.stack([x, y])[0, 1:3]],
    "split": lambda x, y: torch.cat([x, y]).split([5, 3]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_symbols_move_what_they_move_on_tensors(name):
    stored = {"x": torch.arange(12.0).view(4, 3), "y": torch.arange(20.0, 32).view(4, 3)}
    real = FUNCTIONS[name](*stored.values())
    symbols = FUNCTIONS[name](*(Symbol.of(key, (4, 3)) for key in stored))
    for expected, symbol in zip(real, symbols, strict=True):

        class Parameter:
            shape, slots = tuple(symbol.shape), symbol.slots

        assert torch.equal(gathered(Parameter, stored), expected)


def test_a_stored_axis_stays():
    with pytest.raises(Unsupported, match="a stored axis of length 1"):
        Symbol.of("x", (4, 1)).squeeze(1)


def test_arithmetic_on_symbols_is_refused():
    symbol = Symbol.of("x", (4, 4))
    with pytest.raises(Unsupported, match="mul"):
        symbol * 2
