"""combine: weights by module, biases, heads, experts, tokenizers."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.combining import WEIGHTS, combined
from tests.support.deltas import assert_close, deltas, net, trained, truncated, weighted


def test_weight_for_replaces_a_weight(mixed, tmp_path):
    combined(
        mixed,
        tmp_path / "out",
        method="linear",
        weight_for=["2:fit=2", "3:fit=2", "1:fit=0.5", "3:image=0"],
    )
    first, second, third = (deltas(source) for source in mixed)
    expected = weighted(mixed, WEIGHTS)
    expected["fit"] = 0.5 * first["fit"] + 2 * second["fit"] + 2 * third["fit"]
    expected["image"] = first["image"] - 0.4 * second["image"]
    assert_close(deltas(tmp_path / "out"), expected)


def test_a_rule_that_matches_nothing_is_refused(mixed, tmp_path):
    for rule in ("nothing=1", "4:fit=1", "fit=x", "fit"):
        with pytest.raises(Refused, match="weight-for"):
            combined(mixed, tmp_path / "out", method="linear", weight_for=[rule])


def test_the_first_matching_rule_counts(mixed, tmp_path):
    combined(mixed, tmp_path / "out", method="linear", weight_for=["fit=2", "1:fit=0.5"])
    doubled = sum(2 * deltas(source)["fit"] for source in mixed)
    expected = weighted(mixed, WEIGHTS) | {"fit": doubled}
    assert_close(deltas(tmp_path / "out"), expected)


def test_a_rule_that_matches_the_middle_of_a_name_is_refused(mixed, tmp_path):
    with pytest.raises(Refused, match="'im' matches none"):
        combined(mixed, tmp_path / "out", method="linear", weight_for=["im=2"])


def test_biases_follow_the_weights(tmp_path):
    sources = [
        trained(tmp_path / f"a{i}", i, target_modules=["fit"], lora_bias=True, lora_alpha=6 + i)
        for i in range(2)
    ]
    combined(sources, tmp_path / "out", (1.0, -0.5), method="linear")
    biases = [
        load_file(s / "adapter_model.safetensors")["base_model.model.fit.lora_B.bias"]
        for s in sources
    ]
    actual = load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.fit.lora_B.bias"
    ]
    assert torch.allclose(actual, 6 / 4 * biases[0] - 0.5 * 7 / 4 * biases[1], rtol=1e-6)
    with pytest.raises(Refused, match="lora_bias"):
        combined(sources, tmp_path / "ties", (1.0, 1.0), method="ties", density=0.5)


@pytest.mark.parametrize("verb", ["combine", "subtract"])
def test_every_module_has_a_bias_where_one_has(tmp_path, verb):
    """PEFT makes one for each module, and misses those that the file does not hold."""
    biased = trained(tmp_path / "biased", 1, target_modules=["fit"], lora_bias=True)
    plain = trained(tmp_path / "plain", 2, target_modules=["fit", "image", "line"])
    if verb == "combine":
        combined([biased, plain], tmp_path / "out", (1.0, 1.0), method="linear")
    else:
        adapterkit.subtract([plain], general=[biased], out=tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    biases = {key: value for key, value in state.items() if key.endswith("lora_B.bias")}
    assert len(biases) == 3 and sum(bool(value.any()) for value in biases.values()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(net(), tmp_path / "out")


def test_biases_next_to_an_embedding_are_refused(tmp_path):
    biased = trained(tmp_path / "biased", 1, target_modules=["fit"], lora_bias=True)
    embedding = trained(tmp_path / "embedding", 2, target_modules=["embed"])
    with pytest.raises(Refused, match="embed together with biases"):
        combined([biased, embedding], tmp_path / "out", (1.0, 1.0), method="linear")


def test_a_trained_head_is_taken_from_the_one_that_has_it(tmp_path):
    head = trained(tmp_path / "head", 1, target_modules=["fit"], modules_to_save=["narrow"])
    plain = trained(tmp_path / "plain", 2, target_modules=["fit"])
    combined([plain, head], tmp_path / "out", (0.5, 1.0), method="linear")
    key = "base_model.model.narrow.weight"
    ours, theirs = (
        load_file(f / "adapter_model.safetensors")[key] for f in (tmp_path / "out", head)
    )
    assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "modules_to_save"
    ] == ["narrow"]
    with pytest.raises(Refused, match="weight 0.5"):
        combined([plain, head], tmp_path / "no", (1.0, 0.5), method="linear")
    other = trained(tmp_path / "other", 3, target_modules=["fit"], modules_to_save=["narrow"])
    with pytest.raises(Refused, match="head .*, other "):
        combined([head, other], tmp_path / "no", (1.0, 1.0), method="linear")
    twin = oracle.edit_config(head, tmp_path / "twin")
    combined([head, twin], tmp_path / "same", (0.5, 0.5), method="linear")


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 8, 6))


def test_stacks_of_experts_are_combined_expert_by_expert(tmp_path):
    sources = []
    for i, rank in enumerate((2, 3)):
        torch.manual_seed(0)
        model = nn.Module()
        model.mlp = Stacks()
        oracle.train(
            model,
            tmp_path / f"a{i}",
            seed=i,
            r=rank,
            lora_alpha=4,
            target_modules=[],
            target_parameters=["experts.up"],
        )
        sources.append(tmp_path / f"a{i}")
    combined(sources, tmp_path / "out", (1.0, 0.5), method="linear")

    def stack(folder: Path, rank: int, scale: float) -> torch.Tensor:
        tensors = load_file(folder / "adapter_model.safetensors")
        (a,), (b,) = ([t.double() for k, t in tensors.items() if f"lora_{x}" in k] for x in "AB")
        return scale * torch.einsum(
            "ore,eri->eoi", b.view(b.shape[0], rank, 3), a.view(3, rank, -1)
        )

    expected = stack(sources[0], 2, 4 / 2) + 0.5 * stack(sources[1], 3, 4 / 3)
    actual = stack(tmp_path / "out", 5, 1.0)
    assert float((actual - expected).norm() / expected.norm()) < 1e-6
    for refit in ({"rank": 2}, {"energy": 0.7}):
        folder = tmp_path / next(iter(refit))
        metrics = combined(sources, folder, (1.0, 0.5), method="linear", **refit)
        rank = next(iter(metrics.values()))["rank"]
        best = torch.stack([truncated(delta, rank) for delta in expected])
        assert float((stack(folder, rank, 1.0) - best).norm() / expected.norm()) < 1e-5


def test_a_zero_adapter_stays_zero(tmp_path):
    source = trained(tmp_path / "a", 1, target_modules=["fit"])
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()},
        source / "adapter_model.safetensors",
    )
    for method in ("linear", "svd", "ties"):
        options = {"density": 0.5} if method == "ties" else {}
        metrics = combined(
            [source, source], tmp_path / method, (1.0, 1.0), method=method, **options
        )
        assert metrics["fit"]["norm"] == 0 and metrics["fit"]["energy"] == 1
        assert not deltas(tmp_path / method)["fit"].any()
    metrics = combined(
        [source, source], tmp_path / "energy", (1.0, 1.0), method="linear", energy=0.9
    )
    assert metrics["fit"]["rank"] == 1


def tokenizer_files(**changes) -> dict[str, str]:
    """A fast tokenizer's files as a Trainer leaves them beside a checkpoint."""
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "model": {"type": "BPE", "vocab": {"a": 0}},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "model_max_length": 512,
            "padding_side": "right",
        },
        "special_tokens_map.json": {"eos_token": "</s>"},
        "chat_template.jinja": None,
    }
    for key, value in changes.items():
        name = {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}.get(key)
        if name:
            files[name] = files[name] | value
        else:
            files[{"map": "special_tokens_map.json", "template": "chat_template.jinja"}[key]] = (
                value
            )
    return {
        n: v if isinstance(v, str) else json.dumps(v) for n, v in files.items() if v is not None
    }


SAME_TOKENS = [
    {"config": {"model_max_length": 2048, "name_or_path": "/home/me/run"}},
    {"tokenizer": {"truncation": {"max_length": 9}, "padding": {"pad_id": 0}}},
    {"config": {"padding_side": "left"}},
    {"map": None},
]
OTHER_TOKENS = [
    {"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}},
    {"config": {"add_bos_token": True}},
    {"template": "{{ messages }}"},
    {"map": {"eos_token": "<end>"}},
]


@pytest.mark.parametrize("verb", ["combine", "subtract"])
@pytest.mark.parametrize("changes", [*SAME_TOKENS, *OTHER_TOKENS], ids=str)
def test_tokenizers_next_to_the_adapters(changes, verb, tmp_path):
    """Settings that make no other tokens do not count; for others there is a way out."""
    sources = [trained(tmp_path / f"a{i}", i, target_modules=["fit"]) for i in range(2)]
    for source, files in zip(sources, (tokenizer_files(), tokenizer_files(**changes)), strict=True):
        for name, text in files.items():
            (source / name).write_text(text)

    def run(out: Path, **options):
        if verb == "combine":
            return adapterkit.combine(sources, out=out, method="linear", **options)
        return adapterkit.subtract(sources[:1], general=sources[1:], out=out, **options)

    if changes in SAME_TOKENS:
        notes = run(tmp_path / "out").data["notes"]
        assert (
            json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"]
            == 512
        )
        assert any("padding_side" in note for note in notes) == ("padding_side" in str(changes))
    else:
        with pytest.raises(Refused) as caught:
            run(tmp_path / "out")
        assert "different tokenizers" in str(caught.value) and "--tokenizer base" in str(
            caught.value
        )
    run(tmp_path / "base", tokenizer="base")
    assert not list((tmp_path / "base").glob("*token*"))


def test_a_chat_template_is_the_same_in_either_file(tmp_path):
    sources = [trained(tmp_path / f"a{i}", i, target_modules=["fit"]) for i in range(2)]
    files = (
        tokenizer_files(template="{{ x }}"),
        tokenizer_files(config={"chat_template": "{{ x }}"}),
    )
    for source, named in zip(sources, files, strict=True):
        for name, text in named.items():
            (source / name).write_text(text)
    combined(sources, tmp_path / "out", (1.0, 1.0), method="linear")
