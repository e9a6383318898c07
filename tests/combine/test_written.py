"""What every verb that writes an adapter wrote, laid on its base by PEFT: no key missing or left
over, the answers that are due.

Those are the answers of a model whose parameters are the sum that the verb promises, taken from
what `merge` makes of each input.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit
from adapterkit.core.errors import AdapterkitError
from tests.support import architectures, oracle
from tests.support.usual import usual

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
BUILDS = architectures.BUILDS | {
    "llama": oracle.llama,
    "tied": oracle.tied_llama,
    "classifier": oracle.bert_classifier,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (
        "llama",
        LINEAR
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
    "biases": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias of b": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "dora": ("llama", LINEAR | {"use_dora": True}),
    "trained head": ("llama", LINEAR | {"modules_to_save": ["lm_head"]}),
    "classifier": ("classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "token rows": ("llama", LINEAR | {"trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "tied token rows": ("tied", LINEAR | {"trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "both tied": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied values": (
        "tied",
        LINEAR | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "transposed": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "convolutions": (
        "wav2vec2",
        {"target_modules": ["q_proj", "conv_layers.1.conv"], "modules_to_save": ["lm_head"]},
    ),
    "picture": (
        "vit",
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
    "encoder and decoder": (
        "t5",
        {"target_modules": ["q", "wo"], "modules_to_save": ["relative_attention_bias"]},
    ),
    "experts": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}),
    "experts alone": (
        "qwen3_moe",
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
    "transposed experts": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "bias": "lora_only", **EXPERTS},
    ),
    "beside a parameter": (
        "mamba",
        {"target_modules": ["in_proj"], "target_parameters": ["mixer.A_log"]},
    ),
}
# of a config: what is trained as it is
VALUES = ("bias", "modules_to_save", "trainable_token_indices")
State = dict[str, Tensor]


def inference(name: str, base: Path, adapter: Path) -> list[Tensor]:
    """What PEFT's model answers; every tensor of the adapter is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*adapter keys")
        model = peft.PeftModel.from_pretrained(oracle.load(BUILDS[name], base), adapter).eval()
        left = peft.set_peft_model_state_dict(
            model, load_file(adapter / "adapter_model.safetensors")
        ).unexpected_keys
    assert not left
    return architectures.answers(name, model)


def assert_answers(actual: list[Tensor], expected: list[Tensor]) -> None:
    for answer, due in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            answer, due, rtol=0, atol=2e-5 * max(float(due.abs().max()), 0.01)
        )


class Trained:
    """A base, two adapters of one kind on it, and the states that they lead to."""

    def __init__(self, kind: str, folder: Path):
        self.name, self.config = KINDS[kind]
        self.base = folder / "base"
        self.base.mkdir()
        oracle.save_base(BUILDS[self.name](), self.base, "fp32")
        self.adapters = [self.trained(folder / f"a{seed}", seed, self.config) for seed in (1, 2)]
        self.folder = folder

    def trained(self, out: Path, seed: int, config: dict[str, Any]) -> Path:
        oracle.train(oracle.load(BUILDS[self.name], self.base), out, seed=seed, **config)
        return out

    def merged(self, *adapters: Path) -> Path:
        out = self.folder / ("merged-" + "-".join(adapter.name for adapter in adapters))
        if not out.exists():
            adapterkit.merge(self.base, list(adapters), out=out)
        return out

    def due(self, change: Callable[[State, list[State]], State], *adapters: Path) -> list[Tensor]:
        """The answers of the model whose state is what `change` makes of the base's and those after
        each adapter."""
        models = [self.model(self.merged(adapter)) for adapter in adapters]
        before, after = (
            oracle.load(BUILDS[self.name], self.base).state_dict(),
            [model.state_dict() for model in models],
        )
        models[0].load_state_dict(change(before, after))
        return architectures.answers(self.name, models[0])

    def model(self, folder: Path) -> nn.Module:
        return oracle.load(type(BUILDS[self.name]()).__name__, folder)


@pytest.fixture
def trained(request, cached_folder) -> Trained:
    kind, kept = request.param, {}
    folder = cached_folder(
        f"written-{kind}", lambda folder: kept.setdefault("one", Trained(kind, folder))
    )
    if not kept:
        one = object.__new__(Trained)
        one.name, one.config = KINDS[kind]
        one.folder, one.base, one.adapters = folder, folder / "base", [folder / "a1", folder / "a2"]
        return one
    return kept["one"]


# files with tensors as others here have; only the base is another
ALIKE = (
    "all biases", "classifier", "tied token rows", "tied embedding", "tied head", "picture",
    "experts alone",
)  # fmt: skip
# the sum of the others is that of `combine`, with a weight below zero
SUBTRACTED = (
    "plain", "bias of b", "dora", "embedding", "experts", "convolutions", "biases", "token rows",
    "trained head",
)  # fmt: skip
each = pytest.mark.parametrize(
    "trained", usual(KINDS, lambda kind: kind not in ALIKE), indirect=True
)


@pytest.mark.parametrize("trained", KINDS, indirect=True)
def test_adapters_that_peft_wrote_merge_as_in_peft(trained):
    """The measure of the others: the merged model answers as PEFT's does."""
    actual = architectures.answers(trained.name, trained.model(trained.merged(trained.adapters[0])))
    assert_answers(actual, inference(trained.name, trained.base, trained.adapters[0]))


@each
def test_adapters_that_peft_wrote_combine_linearly(trained, tmp_path):
    options: dict[str, Any] = {"base": trained.base} if trained.config.get("use_dora") else {}
    options |= {"rank": 1000} if options else {}
    sources = [f"{a}={w}" for a, w in zip(trained.adapters, (0.25, 0.75), strict=True)]
    adapterkit.combine(sources, method="linear", out=tmp_path / "out", **options)
    mean = lambda before, after: {
        key: 0.25 * after[0][key] + 0.75 * after[1][key] for key in before
    }
    assert_answers(
        inference(trained.name, trained.base, tmp_path / "out"),
        trained.due(mean, *trained.adapters),
    )


@pytest.mark.parametrize("trained", usual(KINDS, SUBTRACTED), indirect=True)
def test_adapters_that_peft_wrote_are_subtracted(trained, tmp_path):
    """Of an adapter without trained values from one that may have them."""
    plain = {
        key: value
        for key, value in trained.config.items()
        if key not in (*VALUES, "task_type", "lora_bias")
    }
    general, task = trained.trained(tmp_path / "general", 3, plain), trained.adapters[0]
    if trained.config.get("use_dora"):
        with pytest.raises(AdapterkitError, match="make it plain first"):
            adapterkit.subtract([task], general=[general], out=tmp_path / "out")
        for adapter in (general, task):
            adapterkit.resize(
                adapter, base=trained.base, rank=1000, out=tmp_path / "plain" / adapter.name
            )
        general, task = tmp_path / "plain" / "general", tmp_path / "plain" / task.name
    adapterkit.subtract([task], general=[general], out=tmp_path / "out")
    less = lambda before, after: {
        key: after[0][key] - (after[1][key] - before[key]) for key in before
    }
    trained.folder = tmp_path
    assert_answers(
        inference(trained.name, trained.base, tmp_path / "out"), trained.due(less, task, general)
    )


@pytest.mark.parametrize(
    ("trained", "alpha"),
    usual([(kind, "rank") for kind in KINDS], lambda row: row[0] not in ALIKE)
    + [(kind, "keep") for kind in ("plain", "bias of b", "dora", "transposed", "experts")],
    indirect=["trained"],
)
def test_adapters_that_peft_wrote_are_resized(alpha, trained, tmp_path):
    if alpha == "keep" and trained.config.get("lora_bias"):
        with pytest.raises(AdapterkitError, match="--alpha keep with lora_bias"):
            adapterkit.resize(trained.adapters[0], out=tmp_path / "out", rank=1000, alpha=alpha)
        return
    adapterkit.resize(trained.adapters[0], out=tmp_path / "out", rank=1000, alpha=alpha)
    due = inference(trained.name, trained.base, trained.adapters[0])
    assert_answers(inference(trained.name, trained.base, tmp_path / "out"), due)


@each
def test_adapters_that_peft_wrote_are_rebased(trained, tmp_path):
    """Trained from PiSSA's start where PEFT has it, else from its own."""
    pissa = not {"use_dora", "target_parameters", "lora_bias"} & set(
        trained.config
    ) and trained.name not in ("wav2vec2", "vit")
    pissa = pissa and not {"embed_tokens", "lm_head"} & set(trained.config["target_modules"])
    config = trained.config | ({"init_lora_weights": "pissa"} if pissa else {})
    base = oracle.load(BUILDS[trained.name], trained.base)
    with oracle.quiet():
        model = peft.get_peft_model(
            base, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | config))
        ).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        oracle.perturb(model, 5)
        if pissa:
            model.peft_config["default"].init_lora_weights = "pissa"
        due = architectures.answers(trained.name, model)
        model.save_pretrained(tmp_path / "trained")
    adapterkit.rebase(tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "out")
    assert_answers(inference(trained.name, trained.base, tmp_path / "out"), due)


def test_rebase_of_an_init_on_a_tied_head(cached_folder, tmp_path):
    """PEFT's init takes its part out of the one weight, so the embedding has lost it too."""
    base = cached_folder(
        "written-init-tied", lambda folder: oracle.save_base(oracle.tied_llama(), folder, "fp32")
    )
    config = {"target_modules": ["q_proj", "lm_head"], "r": 4, "init_lora_weights": "pissa"}
    with oracle.quiet():
        model = peft.get_peft_model(oracle.load(oracle.tied_llama, base), peft.LoraConfig(**config))
        model.save_pretrained(tmp_path / "trained")
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
    receipt = adapterkit.rebase(
        tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "out"
    )
    assert any("give --base to check" in note for note in receipt.data["notes"])
    with pytest.raises(AdapterkitError, match=r"lm_head is tied to model\.embed_tokens"):
        adapterkit.rebase(
            tmp_path / "trained", initial=tmp_path / "initial", base=base, out=tmp_path / "no"
        )


MODELS = ["llama", "tied", "bert", "gpt2", "vit", "t5", "mixtral", "mamba", "whisper", "siglip"]


# what init and loftq read of a model: all kinds of layers in tests/inits and tests/quantized
@pytest.mark.parametrize("name", usual(MODELS, {"llama", "tied", "gpt2", "vit", "mixtral"}))
def test_models_after_init_answer_as_the_base(name, cached_folder, tmp_path):
    base = cached_folder(
        f"written-init-{name}", lambda folder: oracle.save_base(BUILDS[name](), folder, "fp32")
    )
    adapterkit.init(base, out=tmp_path / "out", method="pissa", rank=4, targets="all-linear")
    due = architectures.answers(name, oracle.load(BUILDS[name], base))
    assert_answers(inference(name, tmp_path / "out" / "base", tmp_path / "out" / "adapter"), due)


@pytest.mark.parametrize("name", usual(MODELS, {"tied", "gpt2", "t5", "mixtral", "whisper"}))
def test_models_after_loftq_answer_as_their_merge(name, cached_folder, tmp_path):
    """The quantized base as it decodes, and the adapter on it."""
    base = cached_folder(
        f"written-init-{name}", lambda folder: oracle.save_base(BUILDS[name](), folder, "fp32")
    )
    adapterkit.loftq(base, out=tmp_path / "out", rank=4, bits=8)
    adapterkit.dequantize(tmp_path / "out" / "base", out=tmp_path / "plain", dtype="fp32")
    adapterkit.merge(tmp_path / "plain", [tmp_path / "out" / "adapter"], out=tmp_path / "merged")
    due = architectures.answers(name, oracle.load(BUILDS[name], tmp_path / "merged"))
    assert_answers(inference(name, tmp_path / "plain", tmp_path / "out" / "adapter"), due)
