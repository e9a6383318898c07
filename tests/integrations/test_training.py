"""After training: the callback of real Trainers, axolotl's plugin by its interface."""

import io
import logging
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import Refused

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, n):
        ids = torch.arange(6) + n
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def train(llama, tmp_path):
    """(callback, options of the Trainer) -> the trained model."""

    def run(callback, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        args = transformers.TrainingArguments(
            tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, **options
        )
        trainer = transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[callback])
        trainer.train()
        return model

    return run


def callback(**options):
    from adapterkit.integrations.transformers import AdapterkitCallback

    return AdapterkitCallback(**options)


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_the_model_is_merged_when_training_ends(saves, train, llama, tmp_path):
    outputs = {"merge": tmp_path / "merged", "report": tmp_path / "report.html"}
    convert = {"mlx": tmp_path / "mlx"}
    model = train(callback(**outputs, convert=convert), save_strategy=saves, save_steps=1)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = model.merge_and_unload().state_dict()
    for name, weight in merged.items():
        assert (weight.float() - wanted[name]).abs().max() <= 2e-2, name  # of bfloat16
    base = load_file(llama / "model.safetensors")
    changed = [name for name, weight in merged.items() if not same(weight, base[name])]
    assert len(changed) == 2 and all("q_proj" in name for name in changed)
    assert (tmp_path / "mlx" / "adapters.safetensors").exists()
    assert "adapterkit report" in (tmp_path / "report.html").read_text("utf-8")


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def test_each_save_is_merged_and_a_failure_does_not_stop_it(train, tmp_path, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(logging.getLogger("adapterkit"), "handlers", [logging.StreamHandler(log)])
    each = callback(merge=tmp_path / "merged", every_save=True, base=str(tmp_path / "absent"))
    with pytest.raises(Refused, match="no such path"):
        train(each, save_strategy="steps", save_steps=1)
    assert "after step 1" in log.getvalue() and "after step 2" in log.getvalue()
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").exists()


def test_options_that_do_not_go_together(train):
    with pytest.raises(Refused, match="push without merge"):
        callback(push="me/merged")


def test_the_plugin_of_axolotl(axolotl, lora, llama, tmp_path, monkeypatch):
    from adapterkit.integrations.axolotl import AdapterkitPlugin

    plugin = AdapterkitPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    args = getattr(sys.modules[module], name)
    options = args(adapterkit={"merge": str(tmp_path / "merged")}).adapterkit
    cfg = {"adapterkit": options, "output_dir": str(lora), "base_model": str(llama)}
    plugin.register(cfg)
    plugin.post_train_unload(cfg | {"adapterkit": None})
    monkeypatch.setenv("RANK", "1")
    plugin.post_train_unload(cfg)
    assert not (tmp_path / "merged").exists()
    monkeypatch.setenv("RANK", "0")
    plugin.post_train_unload(cfg)
    adapterkit.merge(llama, lora, out=tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    made = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(same(made[key], value) for key, value in wanted.items())
    with pytest.raises(TypeError, match="mrege"):
        plugin.register({"adapterkit": {"mrege": "x"}})
