"""docs/from-peft.md: each row's two sides, run one after the other, give the same."""

import contextlib
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import peft
import peft.helpers
import peft.optimizers
import peft.utils.hotswap
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import LoraFA, attach, collect, load, loraplus
from tests.support.live import llama, tokens

DOCUMENT = Path(__file__).parents[2] / "docs" / "from-peft.md"
CODE = re.compile(r"`([^`]+)`")


def table(title: str) -> list[tuple[str, str]]:
    """The rows of a section's table, without the backticks."""
    section = DOCUMENT.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [tuple(CODE.findall(cell)[0] for cell in row) for row in rows]


def test_settings_have_the_names_of_the_table():
    ours = {field.name for field in fields(LoraConfig)}
    for theirs, name in table("Settings"):
        assert theirs in peft.LoraConfig.__dataclass_fields__ and name in ours
        with pytest.raises(AdapterkitError, match=rf"\b{name}\b"):
            LoraConfig(**{theirs: None})
    text = DOCUMENT.read_text().split("`bias`", 1)[1].split("keep their names")[0]
    same = {"bias", *CODE.findall("`" + text.split("`", 1)[1])}
    for name in same:
        assert name in peft.LoraConfig.__dataclass_fields__ and name in ours
    assert ours == {name for _, name in table("Settings")} | same


SETTINGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.[qk]_proj", "use_rslora": True, "bias": "lora_only"},
    "all": {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1},
    "patterns": {
        "target_modules": {"q_proj", "down_proj"}, "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "layers_to_transform": [0, 1],
        "layers_pattern": "layers", "exclude_modules": ["1.self_attn.q_proj"],
    },
    "more": {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed_tokens": [1, 5]}, "init_lora_weights": "pissa_niter_2",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_config_of_peft_is_a_config(settings):
    """PEFT's object, its dict, its JSON, and ours by both names."""
    theirs = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    text = json.dumps(peft_json(theirs))
    config = LoraConfig.of(theirs)
    assert (config.rank, config.alpha) == (4, 8)
    for other in (theirs.to_dict(), json.loads(text), {"r": 4, "lora_alpha": 8, **settings}):
        assert LoraConfig.of(other) == config
    own = {f.name: getattr(config, f.name) for f in fields(config)}
    assert LoraConfig.of(own) == config and LoraConfig.of(config) is config
    model = llama()
    other = peft.get_peft_model(llama(), theirs)
    adapters = attach(model, theirs)
    count = sum(p.numel() for p in adapters.parameters())
    assert count == sum(p.numel() for p in other.parameters() if p.requires_grad)
    adapters.attach(theirs.to_dict(), name="second")


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_model_ties_its_factors(tied: bool):
    """The text below *Settings*: PEFT warns where `tie` is refused."""
    theirs = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    models = [llama(tie_word_embeddings=tied) for _ in range(2)]
    if tied:
        adapted = peft.get_peft_model(models[0], theirs)
        assert {*adapted.targeted_module_names} == {"model.embed_tokens", "lm_head"}
        assert {*attach(models[1], theirs).state.sites} == {"model.embed_tokens", "lm_head"}
        return
    with pytest.warns(UserWarning, match="no tied modules were found"):
        peft.get_peft_model(models[0], theirs)
    with pytest.raises(AdapterkitError, match="tie = True, but the model has no tied weights"):
        attach(models[1], theirs)


def peft_json(config: peft.LoraConfig) -> dict:
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


@pytest.fixture
def folders(tmp_path):
    """Adapters to load, made with PEFT."""
    for seed, name in enumerate(("french", "german"), 1):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=4, lora_alpha=8 * seed, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    return tmp_path


def side(name: str) -> dict:
    """The names that a side's code sees."""
    ids = tokens()
    common = {"model": llama(), "ids": ids, "AdamW": torch.optim.AdamW}
    if name == "ours":
        return common | {
            "adapterkit": adapterkit, "attach": attach, "collect": collect, "load": load,
            "loraplus": loraplus, "LoraFA": LoraFA,
        }  # fmt: skip
    return (
        common
        | vars(peft)
        | vars(peft.optimizers)
        | {
            "peft": peft,
            "preprocess_corda": preprocess_corda,
            "preprocess_loraga": preprocess_loraga,
            "hotswap_adapter": peft.utils.hotswap.hotswap_adapter,
            "rescale_adapter_scale": peft.helpers.rescale_adapter_scale,
        }
    )


def run(code: str, names: dict, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder), contextlib.redirect_stdout(None):
        exec(code, names)


def test_each_row_on_both_sides(folders):
    theirs, ours = side("theirs"), side("ours")
    for name in ("theirs", "ours"):
        (folders / name).mkdir()
        for adapter in ("french", "german"):
            os.symlink(folders / adapter, folders / name / adapter)
    rows = table("Calls")
    assert len(rows) >= 25
    for left, right in rows:
        run(left, theirs, folders / "theirs")
        run(right, ours, folders / "ours")
        with torch.no_grad():
            expected, actual = (
                names["model"].eval()(input_ids=names["ids"]).logits for names in (theirs, ours)
            )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=right)
        for name in ("logits", "text"):
            if name in theirs:
                torch.testing.assert_close(
                    ours.pop(name), theirs.pop(name), rtol=1e-4, atol=1e-5, msg=right
                )
    new = peft.PeftModel.from_pretrained(llama(), folders / "ours" / "new")
    assert load(llama(), folders / "theirs" / "new").names and new.active_adapters
    stored = [
        type(llama()).from_pretrained(folders / name / "merged") for name in ("theirs", "ours")
    ]
    one, other = (model(tokens()).logits for model in stored)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


INITS = {
    "corda": (CordaConfig(corda_method="kpm"), {"corda_method": "kpm"}),
    "eva": (EvaConfig(rho=2.0), {"rho": 2.0}),
    "lora_ga": (LoraGAConfig(direction="ArBr"), {"direction": "ArBr"}),
}


# PEFT's
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:lora with eva init")
@pytest.mark.parametrize("number, init", [*enumerate(INITS)])
def test_each_init_from_data_on_both_sides(number: int, init: str, tmp_path):
    """The directions of the factors, whose signs and lengths are free, and CorDA's product."""
    theirs, ours = side("theirs"), side("ours")
    batches = [{"input_ids": tokens(1, 40)}]
    for names in (theirs, ours):
        model = names["model"]
        names["batches"] = batches
        names["run_model"] = lambda model=model: model(**batches[0])
        names["train_step"] = lambda model=model: model(
            **batches[0], labels=batches[0]["input_ids"]
        ).loss.backward()
    peft_options, options = INITS[init]
    theirs["config"] = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        **{f"{init}_config": peft_options},
    )  # fmt: skip
    targets = ["q_proj", "down_proj"]
    ours["config"] = LoraConfig(8, 16, targets, init=init, init_options=options)
    left, right = table("Inits from data")[number]
    assert init.replace("_", "") in left
    run(left, theirs, tmp_path)
    run(right, ours, tmp_path)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in theirs["model"].named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    parts = {site.path: part for site, part in ours["adapters"].state.adapters["default"].patches()}
    assert parts.keys() == layers.keys()
    for path, part in parts.items():
        a, b = (layers[path].get_submodule(f"lora_{x}.default").weight.detach() for x in "AB")
        assert part.scale == layers[path].scaling["default"]
        actual, expected = (part.b @ part.a, b @ a) if init == "corda" else (part.a, a)
        if init != "corda":
            actual, expected = actual.T @ actual, expected.T @ expected
        largest = float(expected.abs().max())
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-2, atol=5e-3 * largest)
    with torch.no_grad():
        expected, actual = (
            names["model"].eval()(input_ids=names["ids"]).logits for names in (theirs, ours)
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
