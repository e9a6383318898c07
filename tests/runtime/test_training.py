"""transformers' Trainers on a model with adapters: what checkpoints hold, resuming, and losses as
PEFT's."""

import filecmp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import LoraFA, Riemannian, attach, load
from tests.support.live import llama, peft_of, tokens
from tests.support.usual import usual

CONFIG = LoraConfig(4, 8, ["q_proj", "v_proj", "down_proj"], dropout=0.1)
DATA = [{"input_ids": row, "labels": row} for row in tokens(40, 8)]
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def arguments(folder, cls=None, **settings):
    from transformers import TrainingArguments

    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "steps",
    }
    return (cls or TrainingArguments)(output_dir=str(folder), **{**defaults, **settings})


def trainer_of(h, folder, cls=None, optimizer=None, data=DATA, **settings):
    from transformers import Trainer

    return h.trainer(cls or Trainer)(
        model=h.model,
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=data[:8],
        optimizers=(optimizer, None),
    )


def losses(trainer, resume=None):
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def new(config=CONFIG, **options):
    return attach(llama(**options), config, seed=1)


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


def values(h, name=None):
    return [parameter.detach().clone() for parameter in h.parameters(name)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_as_peft_and_no_base_in_checkpoints(tmp_path):
    """Losses of PEFT's model in the stock Trainer; checkpoints that PEFT and `load` read."""
    from transformers import Trainer

    h = new(LoraConfig(4, 8, CONFIG.targets))
    h.save(tmp_path / "start")
    trainer = trainer_of(h, tmp_path / "ours")
    ours = losses(trainer)
    peft = peft_of(tmp_path / "start", llama())
    stock = Trainer(model=peft, args=arguments(tmp_path / "theirs"), train_dataset=DATA)
    assert ours == pytest.approx(losses(stock), rel=1e-6)
    assert ours[-1] < ours[0]

    checkpoint = tmp_path / "ours" / "checkpoint-8"
    assert files(checkpoint) == ADAPTER | STATE
    x, expected = tokens(2, 9, seed=5), h.model.eval()(tokens(2, 9, seed=5)).logits
    torch.testing.assert_close(peft_of(checkpoint, llama())(x).logits, expected)
    load(again := llama(), checkpoint)
    torch.testing.assert_close(again(x).logits, expected, rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "model"))
    assert files(tmp_path / "model") == ADAPTER | {"training_args.bin"}


SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    "checkpointed": {"activation_checkpointing": True},
    "reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "LoRA-FA": {},
    "Riemannian": {},
}
OPTIMIZERS = {
    "LoRA-FA": lambda h: LoraFA(h, lr=1e-2),
    "Riemannian": lambda h: Riemannian(h, torch.optim.SGD, lr=1e-2),
}


@pytest.mark.parametrize(
    "name", usual(SETTINGS, {"accumulated", "reentrant", "LoRA-FA", "Riemannian"})
)
def test_resumed_as_if_never_interrupted(name, tmp_path):
    """With dropout: the losses and the adapter bit for bit."""

    def run(folder, resume=None):
        h = new()
        optimizer = OPTIMIZERS[name](h) if name in OPTIMIZERS else None
        trainer = trainer_of(h, tmp_path / folder, optimizer=optimizer, **SETTINGS[name])
        return losses(trainer, resume), values(h)

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-4")
    assert len(whole[0]) == 8 and whole[0] == resumed[0]
    assert equal(whole[1], resumed[1])
    assert len(set(whole[0])) == 8


KINDS = {
    "dora": {"dora": True},
    "bias": {"lora_bias": True, "bias": "all"},
    "copies": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_tokens": [3, 5, 7]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "pissa": {"init": "pissa"},
    "aLoRA": {"invocation_tokens": [9], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("kind", usual(KINDS, {"bias", "copies", "tokens", "pissa", "aLoRA"}))
def test_every_kind_of_part_is_resumed(kind, tmp_path):
    """All that an adapter trains is in the checkpoint and comes back, bit for bit."""
    config = LoraConfig(4, 8, **{"targets": ["q_proj", "down_proj"], **KINDS[kind]})
    rows = tokens(40, 8)
    rows[:, 2], rows[:, 4] = 9, 5
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(folder, resume=None):
        h = attach(llama(attention_bias=True), config, seed=1)
        trainer = trainer_of(h, tmp_path / folder, data=data)
        start = values(h)
        table = losses(trainer, resume), values(h)
        assert not any(map(torch.equal, start, table[1]))
        return table

    whole = run("whole")
    assert files(tmp_path / "whole" / "checkpoint-4") == ADAPTER | STATE
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-4")
    assert whole[0] == resumed[0] and equal(whole[1], resumed[1])


def test_checkpointing_changes_nothing(tmp_path):
    """Gradients with either kind of gradient checkpointing are those without."""
    table = {}
    for name in ("plain", "checkpointed", "reentrant"):
        h = new(LoraConfig(4, 8, CONFIG.targets))
        table[name] = losses(trainer_of(h, tmp_path / name, **SETTINGS[name])), values(h)
    for name in ("checkpointed", "reentrant"):
        assert table[name][0] == pytest.approx(table["plain"][0], rel=1e-6)
        for ours, other in zip(table[name][1], table["plain"][1], strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_best_model_at_the_end(tmp_path):
    """A rate so high that the loss grows: the first checkpoint is the best one."""
    h = new()
    trainer = trainer_of(
        h, tmp_path, learning_rate=3.0, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    losses(trainer)
    history = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    best = min(history, key=lambda step: history[step])
    assert best < max(history)
    stored = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    h.save(tmp_path / "end")
    end = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert end.keys() == stored.keys() and all(torch.equal(end[k], stored[k]) for k in end)
    assert trainer.evaluate()["eval_loss"] == history[best]


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_padded_factors_are_restored(init, tmp_path):
    """Loaded with `pad_rank`: resumed, and the best one at the end, with rank, scale and room."""
    new(LoraConfig(4, 6, CONFIG.targets, init=init, dropout=0.1)).save(tmp_path / "adapter")

    def run(folder, resume=None, **settings):
        h = load(llama(), tmp_path / "adapter", trainable=True, pad_rank=12)
        trainer = trainer_of(h, tmp_path / folder, **settings)
        return losses(trainer, resume), values(h), h

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-4")
    assert whole[0] == resumed[0] and equal(whole[1], resumed[1])
    *_, h = run(
        "best", learning_rate=3.0, eval_strategy="steps", eval_steps=4,
        lr_scheduler_type="constant", load_best_model_at_end=True,
    )  # fmt: skip
    rank = 4 if init == "default" else 8
    for _, part in h.state.adapters["default"].patches():
        assert part.stored_rank == rank and part.stored_scale == float(part.scale) == 1.5
        assert part.a.shape[part.rank_axes[0]] == 12
    h.swap("default", tmp_path / "whole" / "checkpoint-8")
    load(again := llama(), tmp_path / "whole" / "checkpoint-8")
    x = tokens(2, 9, seed=5)
    torch.testing.assert_close(h.model.eval()(x).logits, again(x).logits, rtol=1e-4, atol=1e-5)


def test_several_adapters_have_folders_of_their_names(tmp_path):
    """What is trained is saved: not what is inactive, nor what was loaded to be used."""

    def make():
        h = new()
        h.attach(LoraConfig(2, 4, ["k_proj"]), name="second", seed=2)
        h.attach(LoraConfig(2, 4, ["k_proj"], init=False), name="idle", seed=3)
        h.load(tmp_path / "other", name="used")
        h.activate({"default": 1.0, "second": 0.5, "used": 1.0})
        return h

    new(LoraConfig(2, 2, ["o_proj"], init=False)).save(tmp_path / "other")
    h = make()
    frozen = values(h, "idle")
    whole = losses(trainer_of(h, tmp_path / "whole"))
    assert files(tmp_path / "whole" / "checkpoint-4") == STATE | {"default", "second"}
    assert files(tmp_path / "whole" / "checkpoint-4" / "second") == ADAPTER
    assert equal(frozen, values(h, "idle"))
    again = make()
    trainer = trainer_of(again, tmp_path / "again")
    assert losses(trainer, tmp_path / "whole" / "checkpoint-4") == whole
    assert equal(values(h), values(again)) and again.active == h.active


def test_the_base_stays_as_it_was(tmp_path):
    """`save_pretrained` of the base: the same files before, while and after training."""
    model = llama()
    model.save_pretrained(tmp_path / "before")
    h = attach(model, CONFIG)
    with h.disabled():
        model.save_pretrained(tmp_path / "with")
    losses(trainer_of(h, tmp_path / "out", max_steps=2))
    model.config.use_cache = True  # which the Trainer turns off and leaves so
    with h.disabled():
        model.save_pretrained(tmp_path / "trained")
    h.detach()
    model.save_pretrained(tmp_path / "after")
    names = files(tmp_path / "before")
    assert "model.safetensors" in names
    for other in ("with", "trained", "after"):
        assert files(tmp_path / other) == names
        for name in names:
            pair = tmp_path / "before" / name, tmp_path / other / name
            assert filecmp.cmp(*pair, shallow=False), (other, name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_trains_and_resumes_exactly(kind, tmp_path):
    """The stock Trainer refuses it; checkpoints hold the adapter, resuming is exact."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}

    def make():
        config = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )

    model = make()
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=arguments(tmp_path / "stock"), train_dataset=DATA)
    h = attach(model, CONFIG, seed=1)
    whole = losses(trainer_of(h, tmp_path / "whole", max_steps=6, save_steps=3))
    assert files(tmp_path / "whole" / "checkpoint-3") == ADAPTER | STATE
    assert len(set(whole)) == 6
    again = attach(make(), CONFIG, seed=1)
    trainer = trainer_of(again, tmp_path / "again", max_steps=6, save_steps=3)
    assert losses(trainer, tmp_path / "whole" / "checkpoint-3") == whole
    assert not vars(model).get("_hf_peft_config_loaded")


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return T5ForConditionalGeneration(config)


def test_the_seq2seq_trainer_resumes_exactly(tmp_path):
    """With generation in the evaluation."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    def run(folder, resume=None):
        h = attach(t5(), LoraConfig(4, 8, ["q", "v"]), seed=1)
        trainer = h.trainer(Seq2SeqTrainer)(
            model=h.model,
            train_dataset=DATA,
            args=arguments(
                tmp_path / folder, Seq2SeqTrainingArguments, max_steps=4, save_steps=2,
                predict_with_generate=True, generation_max_length=6,
            ),
        )  # fmt: skip
        return losses(trainer, resume), trainer.predict(DATA[:4]).predictions.tolist()

    whole = run("whole")
    assert files(tmp_path / "whole" / "checkpoint-2") >= ADAPTER | STATE
    assert run("again", tmp_path / "whole" / "checkpoint-2") == whole


class Plain(nn.Module):
    """No transformers model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x, labels):
        y = self.second(self.norm(self.first(x)).relu())
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def test_a_plain_module_with_batchnorm_resumes_exactly(tmp_path):
    """Means and variances of a trained BatchNorm are resumed too."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(8, generator=generator), "labels": torch.randn(4, generator=generator)}
        for _ in range(16)
    ]

    def run(folder, resume=None):
        config = LoraConfig(2, 4, ["first", "second"], modules_to_save=["norm"])
        h = attach(Plain(), config, seed=1)
        trainer = trainer_of(h, tmp_path / folder, data=data, remove_unused_columns=False)
        return losses(trainer, resume), trainer.evaluate()["eval_loss"]

    whole = run("whole")
    assert files(tmp_path / "whole" / "checkpoint-4") == ADAPTER | STATE
    assert run("again", tmp_path / "whole" / "checkpoint-4") == whole


@pytest.mark.parametrize("case", ["inactive", "frozen", "other model", "no model", "name"])
def test_trainer_arguments_that_do_not_fit_are_refused(case, tmp_path):
    from transformers import Trainer

    h = new()
    model = llama() if case == "other model" else None if case == "no model" else h.model
    if case == "inactive":
        h.activate(None)
    elif case == "frozen":
        h.save(tmp_path / "adapter")
        h.load(tmp_path / "adapter", name="used")
        h.activate("used")
    elif case == "name":
        h.attach(CONFIG, name="../second")
        h.activate(["default", "../second"])
    with pytest.raises(AdapterkitError):
        h.trainer(Trainer)(model=model, args=arguments(tmp_path / "out"), train_dataset=DATA)


@pytest.mark.parametrize("case", ["modules", "rank", "several", "nothing"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(case, tmp_path):
    losses(trainer_of(new(), tmp_path / "first", max_steps=4))
    checkpoint = tmp_path / "first" / "checkpoint-4"
    h = new()
    if case == "modules":
        h = new(LoraConfig(4, 8, ["q_proj", "v_proj"]))
    elif case == "rank":
        h = new(LoraConfig(2, 8, CONFIG.targets))
    elif case == "several":
        h.attach(CONFIG, name="second")
        h.activate(["default", "second"])
    else:
        (checkpoint / "adapter_model.safetensors").unlink()
    before = values(h)
    trainer = trainer_of(h, tmp_path / "second")
    with pytest.raises(AdapterkitError):
        losses(trainer, checkpoint)
    assert equal(before, values(h))


# TRL (1.16) asks transformers (5.24) under an old name
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_sft_trainer(tmp_path):
    """TRL's, from text to a checkpoint and on."""
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(60)]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *words])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    from datasets import Dataset

    texts = [" ".join(words[int(i) % 60] for i in row) for row in tokens(16, 8)]

    def run(folder, resume=None):
        h = new()
        trainer = h.trainer(trl.SFTTrainer)(
            model=h.model,
            args=arguments(tmp_path / folder, trl.SFTConfig, max_length=16, bf16=False),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=fast,
        )
        return losses(trainer, resume)

    whole = run("whole")
    assert files(tmp_path / "whole" / "checkpoint-4") >= ADAPTER | STATE | {"tokenizer.json"}
    assert not [*(tmp_path / "whole").rglob("model*.safetensors")]
    assert run("again", tmp_path / "whole" / "checkpoint-4") == whole
