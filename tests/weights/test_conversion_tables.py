"""Every parameter of a loaded model, gathered from the stored tensors as its slots say, is that
parameter."""

import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.weights.skeleton import Skeleton
from tests.support import tiny
from tests.support.slots import gathered
from tests.support.usual import usual

PACKAGE = Path(adapterkit.__file__).parent
TABLES = sorted(
    set(conversion_mapping._build_checkpoint_conversion_mapping()) & set(CONFIG_MAPPING_NAMES)
)
# one model for each kind of conversion: experts stored singly, fused, interleaved, chunked,
# concatenated, renamed, nested
SOME = [
    "mixtral", "qwen3_moe", "inkling_mm_model", "hrm_text", "kimi_k25", "nomic_bert", "gte",
    "sarvam_moe", "deepseek_v4", "bailing_hybrid", "llava", "qwen2_vl", "gemma3", "gpt_oss", "vit",
    "bert-generation",
]  # fmt: skip


UNREADABLE = (
    "message_input.query",
)  # Inkling2's merged queries: more than a move of elements, refused by name


def check(kind, folder):
    result = tiny.model(kind)
    if result is None:
        return "too large"
    result.save_pretrained(folder)
    cls = type(result)
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


# the others are converted as these, and merged in test_experts_and_names
LIKE_OTHERS = ("gte", "vit", "kimi_k25", "gemma3")


@pytest.mark.parametrize("kind", usual(SOME, lambda kind: kind not in LIKE_OTHERS))
def test_parameters_are_where_their_slots_say(kind, tmp_path):
    assert check(kind, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_every_conversion_table_of_transformers(kind, tmp_path):
    """All model types with a conversion table. Some cannot be made tiny or saved by transformers
    itself: listed, not judged."""
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
