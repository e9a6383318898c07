"""TRL's trainers on a model with adapters: the reference is the model as it was, the numbers are
PEFT's, and there is no second model."""

import pytest
import torch

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.live import SIZES, llama, peft_of, tokens
from tests.support.usual import usual

# TRL (1.16) asks transformers (5.24) under an old name
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")

WORDS = [f"w{i}" for i in range(SIZES["vocab_size"] - 2)]
QUIET = {
    "max_steps": 3, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "save_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", *WORDS])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture
def started(tmp_path):
    """An adapter with a delta, and the base that its config names."""
    llama(dtype=torch.float32).save_pretrained(tmp_path / "base")
    attach(llama(), LoraConfig(4, 8, ["q_proj", "v_proj"], init=False), seed=3).save(
        tmp_path / "adapter"
    )
    return tmp_path / "adapter"


def texts(rows, length, seed):
    return [" ".join(WORDS[int(i) % 60] for i in row) for row in tokens(rows, length, seed)]


def pairs():
    from datasets import Dataset

    columns = zip(texts(12, 4, 1), texts(12, 5, 2), texts(12, 6, 3), strict=True)
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in columns])


def labelled():
    from datasets import Dataset

    rows = zip(texts(12, 4, 1), texts(12, 5, 2), strict=True)
    return Dataset.from_list(
        [{"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c) in enumerate(rows)]
    )


def prompts():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": texts(12, 4, 1)})


def reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


CASES = {
    "DPO": (pairs, {"beta": 0.5}, {}),
    "KTO": (labelled, {"beta": 0.5}, {}),
    "GRPO": (
        prompts,
        {"beta": 0.5, "num_generations": 2, "max_completion_length": 5, "temperature": 1.0},
        {"reward_funcs": reward},
    ),
    "RLOO": (
        prompts,
        {"beta": 0.5, "num_generations": 2, "max_completion_length": 5, "temperature": 1.0},
        {"reward_funcs": reward},
    ),
}


def trained(kind, model, folder, tokenizer, make=lambda cls: cls, **settings):
    """What a trainer logs."""
    import trl

    data, options, arguments = CASES[kind]
    cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    torch.manual_seed(0)
    trainer = make(cls)(
        model=model,
        args=config(output_dir=str(folder), **{**QUIET, **options, **settings}),
        train_dataset=data(),
        processing_class=tokenizer,
        **arguments,
    )
    trainer.train()
    return trainer


def logged(trainer):
    times = ("runtime", "per_second", "time", "flos", "learning_rate", "epoch")
    return [
        {key: x for key, x in row.items() if not any(word in key for word in times)}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("kind", "start"),
    # RLOO has the reference of GRPO
    usual([("DPO", "new"), *((kind, "trained") for kind in CASES)], lambda row: row[0] != "RLOO"),
)
def test_losses_and_references_as_peft(kind, start, started, tmp_path, tokenizer):
    """Every number that the trainer logs: losses, rewards and the distance to the reference."""
    folder = started
    if start == "new":
        folder = tmp_path / "new"
        attach(llama(), LoraConfig(4, 8, ["q_proj", "v_proj"]), seed=3).save(folder)
    h = load(llama(), folder, trainable=True)
    ours = trained(kind, h.model, tmp_path / "ours", tokenizer, h.trainer)
    assert not [*ours.ref_model.parameters()]
    theirs = trained(kind, peft_of(folder, llama()), tmp_path / "theirs", tokenizer)
    for own, other in zip(logged(ours), logged(theirs), strict=True):
        assert own == pytest.approx(other, rel=2e-4, abs=1e-5)
    assert not [*(tmp_path / "ours").rglob("model*.safetensors")]


@pytest.mark.parametrize("settings", [
    {"precompute_ref_log_probs": True},
    {"disable_dropout": True},  # TRL's default: PEFT's dropout is a module, ours is not
    {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
], ids=str)  # fmt: skip
def test_settings_of_dpo_as_peft(settings, started, tmp_path, tokenizer):
    config = LoraConfig(4, 8, ["q_proj", "down_proj"], dropout=0.5, init=False)
    attach(llama(), config, seed=4).save(tmp_path / "dropping")
    h = load(llama(), tmp_path / "dropping", trainable=True)
    ours = trained("DPO", h.model, tmp_path / "ours", tokenizer, h.trainer, **settings)
    peft = peft_of(tmp_path / "dropping", llama())
    theirs = trained("DPO", peft, tmp_path / "theirs", tokenizer, **settings)
    for own, other in zip(logged(ours), logged(theirs), strict=True):
        assert own == pytest.approx(other, rel=2e-4, abs=1e-5)
    h.save(tmp_path / "again")
    assert '"lora_dropout": 0.5' in (tmp_path / "again" / "adapter_config.json").read_text()


def test_a_frozen_adapter_acts_in_the_reference_too(started, tmp_path, tokenizer):
    """The reference is the model as it was: only what is trained goes back."""
    h = load(llama(), started, name="style")
    h.attach(LoraConfig(4, 8, ["q_proj"]), name="new", seed=1)
    h.activate(["style", "new"])
    trainer = trained("DPO", h.model, tmp_path / "out", tokenizer, h.trainer)
    ids = tokens(2, 7, seed=8)
    with torch.no_grad():
        present = h.model(ids).logits
        reference = trainer.ref_model(ids).logits
        h.activate("style")
        assert torch.equal(reference, h.model(ids).logits)
        h.activate(["style", "new"])
        assert torch.equal(present, h.model(ids).logits)
    assert not torch.equal(present, reference)
    assert trained_files(tmp_path / "out" / "checkpoint-3") == {"adapter_model.safetensors"}


def trained_files(folder):
    return {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("config", "settings", "word"),
    [
        ({"targets": ["q_proj", "lm_head"]}, {}, "the head"),
        ({"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, "the head"),
        ({"targets": ["q_proj"]}, {"sync_ref_model": True}, "sync_ref_model"),
    ],
    ids=str,
)
def test_adapters_that_trl_would_ignore_are_refused(config, settings, word, tmp_path, tokenizer):
    """SFT and DPO multiply by the head's weight themselves."""
    from trl.trainer import dpo_trainer

    loader = dpo_trainer.create_model_from_path
    h = attach(llama(), LoraConfig(4, 8, **config))
    with pytest.raises(AdapterkitError, match=word):
        trained("DPO", h.model, tmp_path, tokenizer, h.trainer, **settings)
    assert dpo_trainer.create_model_from_path is loader
    assert not any(tmp_path.iterdir())
