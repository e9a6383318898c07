"""What trainers save beside an adapter: small files go along, states and pickles do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapterkit import convert

GOLDEN = Path(__file__).parent / "golden"
SOURCE = GOLDEN / "peft" / "llama_patterns"
BASE = "unsloth/Llama-3.2-1B-bnb-4bit"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
# trainer -> what it saves beside an adapter, and of that what goes along
TRAINERS = {
    "unsloth": (TOKENIZER | {"README.md", "chat_template.jinja"}, ()),
    "llama_factory": (
        TOKENIZER | {"value_head.safetensors", "training_args.yaml", "README.md"},
        ("trainer_state.json", "trainer_log.jsonl", "training_args.bin", "optimizer.pt"),
    ),
    "axolotl": (TOKENIZER | {"chat_template.jinja"}, ("checkpoint-5/optimizer.pt", "debug.log")),
    "ms_swift": (
        {"additional_config.json", "args.json", "README.md"},
        ("scheduler.pt", "rng_state.pth", "optimizer.pt"),
    ),
    "trl": (TOKENIZER | {"added_tokens.json", "merges.txt", "vocab.json"}, ("training_args.bin",)),
}


def folder_of(trainer: str, place: Path) -> Path:
    """An adapter as a trainer leaves it: these names, with their own names as contents."""
    place.mkdir()
    shutil.copy(SOURCE / "adapter_model.safetensors", place)
    settings = json.loads((SOURCE / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = BASE
    (place / "adapter_config.json").write_text(json.dumps(settings))
    for name in (*TRAINERS[trainer][0], *TRAINERS[trainer][1]):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(name)
    if "value_head.safetensors" in TRAINERS[trainer][0]:
        save_file({"v_head.summary.weight": torch.ones(1, 8)}, place / "value_head.safetensors")
    return place


@pytest.mark.parametrize("to", ["peft", "peft-0.18", "peft-per-expert"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_within_the_layout(trainer: str, to: str, tmp_path: Path) -> None:
    source = folder_of(trainer, tmp_path / "in")
    receipt = convert(source, to=to, out=tmp_path / "out")
    taken, left = TRAINERS[trainer]
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    own = {"adapter_config.json", "adapter_model.safetensors", "adapterkit.json", "README.md"}
    assert names == taken | own
    for name in taken:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert taken <= set(receipt.data["files"])
    notes = "\n".join(receipt.data["notes"])
    for name in sorted(left)[:3]:
        assert name in notes.partition("not copied: ")[2]
    assert ("not copied" in notes) == bool(left)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_servers_get_the_tokenizer(to: str, tmp_path: Path) -> None:
    """SGLang refuses an adapter beside added_tokens.json with tokens that its base lacks."""
    source = folder_of("trl", tmp_path / "in")
    convert(source, to=to, out=tmp_path / "out", base=SOURCE / "base")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= TOKENIZER and "added_tokens.json" not in names


def test_the_name_of_the_base_stays(tmp_path: Path) -> None:
    """Unsloth's quantized one, too; a base without a Hub id does not change it."""
    source = folder_of("unsloth", tmp_path / "in")
    for number, base in enumerate((None, SOURCE / "base")):
        convert(source, to="vllm", out=tmp_path / str(number), base=base)
        settings = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == BASE


def test_nothing_goes_along_into_another_layout(tmp_path: Path) -> None:
    source = folder_of("llama_factory", tmp_path / "in")
    (source / "adapter_config.json").write_text(
        json.dumps(
            json.loads((source / "adapter_config.json").read_text())
            | {"rank_pattern": {"layers.0.self_attn.v_proj": 4, "down_proj": 1}}
        )
    )
    convert(source, to="mlx", out=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & TRAINERS["llama_factory"][0]


@pytest.mark.parametrize("to", ["mlx", "gguf", "vllm", "peft"])
def test_a_value_head_is_not_left_behind_without_a_word(to: str, tmp_path: Path) -> None:
    source = folder_of("llama_factory", tmp_path / "in")
    shutil.copytree(SOURCE / "base", tmp_path / "base")
    receipt = convert(source, to=to, out=tmp_path / "out", base=tmp_path / "base")
    notes = [note for note in receipt.data["notes"] if "value_head.safetensors" in note]
    is_there = (tmp_path / "out/value_head.safetensors").exists()
    assert is_there == (to == "peft") and (is_there or len(notes) == 1), receipt.data["notes"]
