"""Slots: every parameter of a loaded model, gathered from the stored tensors as its slots say, is that parameter."""

import traceback
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import conversion_mapping, core_model_loading
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import adapterkit
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.weights.skeleton import Skeleton
from adapterkit.weights.slots import Symbol, Unsupported
from tests.support import tiny

PACKAGE = Path(adapterkit.__file__).parent
TABLES = sorted(
    set(conversion_mapping._build_checkpoint_conversion_mapping()) & set(CONFIG_MAPPING_NAMES)
)
# one model for each kind of conversion: experts stored singly, fused, interleaved, chunked, concatenated, renamed, nested
SOME = [
    "mixtral", "qwen3_moe", "inkling_mm_model", "hrm_text", "kimi_k25", "nomic_bert", "gte", "sarvam_moe", "deepseek_v4",
    "bailing_hybrid", "llava", "qwen2_vl", "gemma3", "gpt_oss", "vit", "bert-generation",
]  # fmt: skip


UNREADABLE = (
    "message_input.query",
)  # Inkling2's merged queries: more than a move of elements, refused by name


def gathered(parameter, stored):
    """The parameter put together from the stored tensors, NaN where no slot lies."""
    whole = torch.full(parameter.shape, torch.nan)
    for slot in parameter.slots:
        part = stored[slot.key].float().view(slot.shape)
        for axis in slot.axes:
            if axis.axis is not None:
                part = part.index_select(axis.axis, torch.tensor(list(axis.of)))
        part = part.permute([axis.axis for axis in slot.axes if axis.axis is not None])
        for i, axis in enumerate(slot.axes):
            part = part.unsqueeze(i) if axis.axis is None else part
        whole[tuple(slice(axis.at, axis.stop) for axis in slot.axes)] = part
    return whole


def check(kind, folder):
    made = tiny.model(kind)
    if made is None:
        return "too large"
    made.save_pretrained(folder)
    cls = type(made)
    back, info = cls.from_pretrained(folder, output_loading_info=True)
    if any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return "transformers does not read back what it saves"
    base = open_checkpoint(LocalFolder(folder))
    skeleton = Skeleton(base, cls.__name__)
    stored = {}
    for name in base.shards:
        stored |= load_file(folder / name)
    state = back.state_dict()
    assert all(name.endswith(UNREADABLE) for name in skeleton.unreadable)
    assert set(state) == set(skeleton.parameters) | set(skeleton.unreadable)
    for name, parameter in skeleton.parameters.items():
        assert torch.equal(gathered(parameter, stored), state[name].float()), name
    return None


@pytest.mark.parametrize("kind", SOME)
def test_parameters_are_where_their_slots_say(kind, tmp_path):
    assert check(kind, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_every_conversion_table_of_transformers(kind, tmp_path):
    """All model types with a conversion table. Some cannot be made tiny or saved by transformers itself: listed, not judged."""
    try:
        reason = check(kind, tmp_path)
    except AssertionError:
        raise
    except Exception as error:  # transformers' own code on a shrunk config; never ours
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(Path(name).is_relative_to(PACKAGE) for name in frames):
            raise
        reason = f"{type(error).__name__}: {error}"
    if reason:
        pytest.skip(reason[:100])


OPERATIONS = [
    ("Chunk", lambda o: o.Chunk(dim=0), [(12, 5)], 3),
    ("Chunk unequal", lambda o: o.Chunk(dim=0), [(10, 5)], 3),
    ("Concatenate", lambda o: o.Concatenate(dim=1), [(4, 3), (4, 5)], 1),
    ("Interleave", lambda o: o.Interleave(dim=0), [(8, 3)], 1),
    ("Interleave inverse", lambda o: o.Interleave(dim=1, inverse=True), [(3, 8)], 1),
    ("Transpose", lambda o: o.Transpose(0, 1), [(4, 7)], 1),
    ("Transpose stack", lambda o: o.Transpose(1, 2), [(2, 4, 7)], 1),
    ("PermuteForRope", lambda o: o.PermuteForRope(), [(16, 3)], 1),
    ("PermuteForRope inverse", lambda o: o.PermuteForRope(inverse=True), [(16, 3)], 1),
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


def test_arithmetic_on_symbols_is_refused():
    symbol = Symbol.of("x", (4, 4))
    with pytest.raises(Unsupported, match="mul"):
        symbol * 2
