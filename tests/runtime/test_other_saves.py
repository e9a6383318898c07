"""What other libraries save and restore of a model with adapters: all of it, or nothing."""

import filecmp
import os
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, collect, create_arrow_model, load
from tests.support.live import llama, tokens

CONFIG = LoraConfig(4, 8, ["q_proj", "v_proj"], init=False)
DATA = [{"input_ids": row, "labels": row} for row in tokens(16, 8)]


def plain(model, folder, cls=Trainer, **settings):
    """transformers' own Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True,
        use_cpu=True, learning_rate=1e-2, **settings,
    )  # fmt: skip
    return cls(model=model, args=arguments, train_dataset=DATA)


def values(h):
    return [parameter.detach().clone() for parameter in h.parameters()]


def equal(ours, theirs):
    return all(map(torch.equal, ours, theirs))


def test_a_plain_trainer_that_saves_is_refused_before_its_first_step(tmp_path):
    h = attach(llama(), CONFIG, seed=1)
    before = values(h)
    with pytest.raises(AdapterkitError, match=r"adapters\.trainer\(Trainer\)"):
        plain(h.model, tmp_path).train()
    assert equal(before, values(h)) and not [*tmp_path.rglob("*.safetensors")]


def test_a_plain_trainer_that_does_not_save_warns(tmp_path):
    h = attach(llama(), CONFIG, seed=1)
    before = values(h)
    trainer = plain(h.model, tmp_path, save_strategy="no")
    with pytest.warns(UserWarning, match=r"adapters\.trainer\(Trainer\)"):
        trainer.train()
    assert not equal(before, values(h))
    with pytest.raises(AdapterkitError, match="without default"):
        trainer.save_model()
    h.save(tmp_path / "adapter")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_follow_the_umask(mask, tmp_path):
    """safetensors 0.8 writes 0600 whatever the umask says."""
    h = attach(llama(), CONFIG, seed=1)
    before = os.umask(mask)
    try:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / ".adapter_model.safetensors.part").touch(0o600)  # of a kill
        h.save(tmp_path / "adapter")
        trainer = plain(h.model, tmp_path / "run", cls=h.trainer(Trainer))
        trainer.save_model(tmp_path / "run" / "last")
        router = create_arrow_model(llama(), [tmp_path / "adapter"], top_k=1)
        router.save(tmp_path / "router")
        model = llama()
        collect(model, lambda: model(tokens()), out=tmp_path / "stats.safetensors")
    finally:
        os.umask(before)
    files = [tmp_path / "stats.safetensors"]
    for folder in ("adapter", "run/last", "router"):
        files += [p for p in (tmp_path / folder).iterdir() if p.suffix in (".safetensors", ".json")]
    assert len(files) >= 7
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


@pytest.mark.parametrize("base, named", [
    ("org/base", ["org/base"]), ("org/base@main", None), ("/models/base", None),
    ("HERE", None), (None, None),
])  # fmt: skip
def test_the_card_of_a_save(base, named, tmp_path, monkeypatch):
    """A Hub id or nothing, and no file that is not there."""
    monkeypatch.chdir(tmp_path)
    Path("local/base").mkdir(parents=True)
    model = llama()
    model.config._name_or_path = base = "local/base" if base == "HERE" else base
    attach(model, CONFIG, seed=1).save(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front.get("base_model") == named and front["base_model_relation"] == "adapter"
    assert "adapterkit.json" not in card and (base is None or named or base not in card)


@pytest.mark.parametrize("way", ["resume", "best"])
def test_a_plain_trainer_restores_nothing_without_a_word(way, tmp_path):
    """From checkpoints that a Trainer wrote of the base."""
    model = llama()
    plain(model, tmp_path / "base").train()
    h = attach(model, CONFIG, seed=1)
    before = values(h)
    trainer = plain(model, tmp_path / "out", save_strategy="no")
    with pytest.raises(AdapterkitError, match="restores the base"):
        if way == "resume":
            trainer.train(resume_from_checkpoint=str(tmp_path / "base" / "checkpoint-4"))
        else:
            trainer.state.best_model_checkpoint = str(tmp_path / "base" / "checkpoint-4")
            trainer._load_best_model()
    assert equal(before, values(h))


def test_a_plain_trainer_of_the_base_is_free(tmp_path):
    """With nothing that acts, and for evaluation."""
    h = attach(llama(), CONFIG, seed=1)
    assert plain(h.model, tmp_path).evaluate(DATA[:4])["eval_loss"] > 0
    h.activate(None)
    h.model.lm_head.weight.requires_grad_(True)
    plain(h.model, tmp_path).train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, labels):
        y = self.second(self.first(x).relu())
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def test_a_trainer_of_a_plain_module(tmp_path):
    h = attach(Plain(), LoraConfig(2, 4, ["first"]))
    with pytest.raises(AdapterkitError, match="without default"):
        plain(h.model, tmp_path).save_model()


def test_save_pretrained_saves_the_base_alone(tmp_path):
    """The base alone is saved where it is asked for alone; both where they are merged."""
    model = llama()
    model.save_pretrained(tmp_path / "before")
    h = attach(model, CONFIG, seed=1)
    with pytest.raises(AdapterkitError, match="save_pretrained saves the base without default"):
        model.save_pretrained(tmp_path / "with")
    assert not [*(tmp_path / "with").glob("*.safetensors")]
    with pytest.raises(AdapterkitError, match="without default"):
        torch.compile(model, backend="eager").save_pretrained(tmp_path / "compiled")
    with h.disabled():
        model.save_pretrained(tmp_path / "base")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "before" / name, tmp_path / "base" / name, shallow=False)
    expected = model(tokens()).logits
    h.merge()
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        type(model).from_pretrained(tmp_path / "merged")(tokens()).logits, expected
    )
    h.detach()
    model.save_pretrained(tmp_path / "after")
    assert not model._state_dict_pre_hooks and not model._forward_pre_hooks


def test_a_state_dict_is_the_bases(tmp_path):
    """Asked for by one's own code, it is what it was, whatever acts."""
    model = llama()
    keys = [*model.state_dict()]
    h = attach(model, CONFIG, seed=1)
    assert [*model.state_dict()] == keys
    model.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    h.detach()


def test_save_pretrained_of_diffusers_saves_the_base(tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    h = attach(unet, LoraConfig(2, 4, ["to_q", "to_v"]))
    with pytest.raises(AdapterkitError, match="without default"):
        unet.save_pretrained(tmp_path / "with")
    with h.disabled():
        unet.save_pretrained(tmp_path / "base")


# --- accelerate -----------------------------------------------------------------------------------


def prepared(h, *others):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(h.parameters(), lr=1e-2)
    return accelerator, accelerator.prepare(h.model, optimizer, *others)


def steps(model, optimizer, seeds):
    losses = []
    for seed in seeds:
        ids = tokens(2, 6, seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate_refuses_what_it_would_lose(tmp_path):
    h = attach(llama(), CONFIG, seed=1)
    accelerator, (model, _) = prepared(h)
    for call in (
        lambda: accelerator.save_state(str(tmp_path / "state")),
        lambda: accelerator.save_model(model, str(tmp_path / "model")),
        lambda: accelerator.get_state_dict(model),
    ):
        with pytest.raises(AdapterkitError, match="without default"):
            call()
    with h.disabled():
        accelerator.save_state(str(tmp_path / "state"))
    before = values(h)
    with pytest.raises(AdapterkitError, match="restores the base without default"):
        accelerator.load_state(str(tmp_path / "state"))
    assert equal(before, values(h))


@pytest.mark.parametrize("several", [False, True])
def test_accelerate_saves_and_restores_adapters(several, tmp_path):
    """Losses after a restart are those of the whole run; the base is not in the files, and another
    model is."""

    def make():
        h = attach(llama(), CONFIG, seed=1)
        if several:
            h.attach(CONFIG, name="second", seed=2)
            h.activate(["default", "second"])
        torch.manual_seed(5)
        other = nn.Linear(3, 3)
        accelerator, (model, optimizer, other) = prepared(h, other)
        h.accelerate(accelerator)
        return h, accelerator, model, optimizer, other

    _, accelerator, model, optimizer, other = make()
    steps(model, optimizer, range(3))
    with torch.no_grad():
        other.weight.zero_()
    accelerator.save_state(str(tmp_path / "state"))
    whole = steps(model, optimizer, range(3, 6))
    stored = load_file(tmp_path / "state" / "model.safetensors")
    assert {*stored} == {"weight", "bias"}
    names = ["default", "second"] if several else [""]
    for name in names:
        load(llama(), tmp_path / "state" / name)
    _, accelerator, model, optimizer, other = make()
    steps(model, optimizer, [9])
    accelerator.load_state(str(tmp_path / "state"))
    assert steps(model, optimizer, range(3, 6)) == whole and not other.weight.any()
