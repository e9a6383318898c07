"""A word about every name of the installed PEFT and transformers: types, fields, keys of files and
quantization methods. The words on types and fields are docs/from-peft.md's, and are checked."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import config as lora
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraVariant
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

import adapterkit
from adapterkit.core.adapter.config import KNOWN_SETTINGS, PEFT_DEFAULTS, WITHOUT_WEIGHTS
from adapterkit.core.adapter.peft import NO_ARITHMETIC, NOT_READ, ROLES, TOKENS
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.registry import members
from adapterkit.core.weights.unread import read_methods
from tests.support import oracle
from tests.support.documents import ROOT

TEXT = (ROOT / "docs" / "from-peft.md").read_text("utf-8")
CODE = re.compile(r"`([^`]+)`")
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
# setting -> the class of its value
OWNERS = {
    "use_bdlora": lora.BdLoraConfig, "monteclora_config": lora.MontecloraConfig,
    "velora_config": lora.VeloraConfig, "loftq_config": lora.LoftQConfig,
    "arrow_config": lora.ArrowConfig, "kasa_config": lora.KasaConfig,
    "runtime_config": lora.LoraRuntimeConfig, "eva_config": lora.EvaConfig,
    "corda_config": lora.CordaConfig, "lora_ga_config": lora.LoraGAConfig,
}  # fmt: skip
Field = tuple[str, str]  # a setting and a field of its value, or ""


def cells_of(title: str) -> list[list[str]]:
    """The rows of a section's tables that begin with code."""
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = (line for line in section.splitlines() if line.startswith("| `"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def described_fields() -> dict[Field, tuple[str, str]]:
    """The first words on each field, in files and in new configs."""
    words: dict[Field, tuple[str, str]] = {}
    for names, *cells in cells_of("PEFT field by field"):
        first, *others = CODE.findall(names)
        found = cells[0].split()[0].strip(":"), cells[1].split()[0].strip(":")
        is_owner = names.startswith(f"`{first}`:")
        keys = (
            [(first, name) for name in others] if is_owner else [(n, "") for n in (first, *others)]
        )
        assert not words.keys() & set(keys)
        words |= dict.fromkeys(keys, found)
    return words


WORDS = described_fields()


def names_of_settings() -> set[str]:
    """PEFT's names in *Settings*."""
    same = TEXT.split("\n`bias`")[1].split("keep their names")[0]
    renamed = {CODE.findall(theirs)[0] for theirs, *_ in cells_of("Settings")}
    return {"bias", *CODE.findall(same), *renamed}


def test_every_field_of_pefts_lora_config_has_a_word():
    assert {name for name, _ in WORDS} | names_of_settings() == FIELDS
    assert FIELDS <= KNOWN_SETTINGS and PEFT_DEFAULTS.keys() <= FIELDS


def test_every_field_of_pefts_other_configs_has_a_word():
    classes = {
        value
        for value in vars(lora).values()
        if dataclasses.is_dataclass(value) and value.__module__ == lora.__name__
    }
    assert classes == {peft.LoraConfig, *OWNERS.values()}
    theirs = {(s, field.name) for s, kind in OWNERS.items() for field in dataclasses.fields(kind)}
    assert {key for key in WORDS if key[1]} == theirs


def test_the_table_names_the_installed_version():
    assert f"all others of PEFT {peft.__version__}." in TEXT
    assert PEFT_DEFAULTS["peft_version"] == peft.__version__


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a plain adapter merged into it."""
    home = tmp_path_factory.mktemp("names")
    oracle.save_base(oracle.llama(), home / "base", "fp32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with oracle.quiet():
        peft.get_peft_model(oracle.llama(), config).save_pretrained(str(home / "adapter"))
    adapterkit.merge(home / "base", home / "adapter", out=home / "merged")
    return home


# values that change the arithmetic, or that no file has
WRONG: dict[Field, dict[str, Any]] = {
    ("peft_type", ""): {"peft_type": "NEW"},
    ("peft_version", ""): {"peft_version": 19},
    ("use_qalora", ""): {"use_qalora": True},
    ("qalora_group_size", ""): {"use_qalora": True, "qalora_group_size": 0},
    ("use_bdlora", "nblocks"): {"use_bdlora": {"nblocks": 0}},
    ("use_bdlora", "match_strict"): {"use_bdlora": {"nblocks": 2, "match_strict": "yes"}},
    **{
        ("use_bdlora", side): {"use_bdlora": {"nblocks": 2, side: [1]}}
        for side in ("target_modules_bd_a", "target_modules_bd_b")
    },
}


OTHERS = {"qalora_group_size": 8, "auto_mapping": {"a": "b"}, "megatron_config": {"a": "b"}}


def value_of(key: Field) -> dict[str, Any]:
    """A setting that is not the default, as in an adapter_config.json."""
    name, field = key
    if name in OWNERS:
        return {name: {field: dataclasses.asdict(OWNERS[name]())[field]}}
    if isinstance(default := PEFT_DEFAULTS[name], bool):
        return {name: not default}
    return {name: OTHERS.get(name, "other")}


@pytest.mark.parametrize("key", WORDS, ids=lambda key: ".".join(filter(None, key)))
def test_a_field_in_a_file_is_read_ignored_or_refused_as_the_table_says(
    key: Field, home: Path, tmp_path: Path
):
    word, _ = WORDS[key]
    settings = WRONG[key] if word == "read" else value_of(key)
    adapter = oracle.edit_config(home / "adapter", tmp_path / "adapter", **settings)
    if word == "ignored":
        adapterkit.merge(home / "base", adapter, out=tmp_path / "out")
        one, other = (
            folder / "model.safetensors" for folder in (home / "merged", tmp_path / "out")
        )
        assert one.read_bytes() == other.read_bytes()
        return
    assert word in ("read", "refused")
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.merge(home / "base", adapter, out=tmp_path / "out")
    # a plain adapter has other widths than QA-LoRA's
    name = "q_proj" if key[0] == "use_qalora" else key[1] if word == "read" and key[1] else key[0]
    assert name in str(caught.value)


@pytest.mark.parametrize("key", WORDS, ids=lambda key: ".".join(filter(None, key)))
def test_a_field_of_a_new_config_is_read_ignored_or_refused_as_the_table_says(key: Field):
    _, word = WORDS[key]
    plain: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    if key[0].removesuffix("_config") in ("eva", "corda", "lora_ga"):
        plain["init_lora_weights"] = key[0].removesuffix("_config")
    settings = plain | (WRONG[key] if key[0] == "peft_type" else value_of(key))
    if word == "ignored":
        assert adapterkit.LoraConfig.of(settings) == adapterkit.LoraConfig.of(plain)
    elif word == "read" and key[1]:
        assert adapterkit.LoraConfig.of(settings).init_options == settings[key[0]]
    else:
        assert word in ("read", "refused")
        with pytest.raises(AdapterkitError, match=key[0]):
            adapterkit.LoraConfig.of(settings)


# ---- types -------------------------------------------------------------------------------------


def types_by_advice() -> dict[str, str]:
    """Type -> the last cell of its row in *Types and variants*."""
    rows = cells_of("Types and variants")
    return {name: row[-1] for row in rows for name in CODE.findall(row[0]) if name.isupper()}


def test_every_type_of_peft_has_a_word():
    """`test_types_of_peft.py` merges those that are read, and tests that others are refused."""
    described = {*types_by_advice(), "LORA"}
    assert described == {kind.value for kind in peft.PeftType}
    read = {name.upper() for name in members("kinds")}
    assert read <= described and {*WITHOUT_WEIGHTS} <= described


def converts_to_lora(kind: str) -> bool:
    """True if PEFT converts linear layers of a type."""
    layer = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(kind)), "tuner_layer_cls", None)
    if layer is None:
        return False
    linear = SimpleNamespace(get_base_layer=lambda: nn.Linear(1, 1))
    found = vars(sys.modules[layer.__module__]).values()
    kinds = [one for one in found if isinstance(one, type) and issubclass(one, layer)]
    return any(one.supports_lora_conversion(linear) for one in kinds)


def test_types_that_peft_converts_to_lora_are_named_so():
    advice = types_by_advice()
    read = {name.upper() for name in members("kinds")}
    named = {kind for kind in advice if "save_as_lora" in advice[kind]}
    assert {kind for kind in {*advice} - read if converts_to_lora(kind)} == named


# names of LoRA's layers that no AdaLoRA has
UNUSED = {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


@pytest.mark.parametrize("kind", members("kinds"))
def test_every_tensor_of_a_type_that_is_read_has_a_role(kind: str):
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind.upper())]
    theirs = {*tuner.tuner_layer_cls.adapter_layer_names} - (UNUSED if kind == "adalora" else set())
    assert theirs <= {*members("kinds")[kind].keys}


# ---- keys of LoRA ------------------------------------------------------------------------------

MODULES = {"target_modules": ["q_proj", "down_proj"]}
ARROW = lora.ArrowConfig(top_k=1)
ARROW.task_adapter_names = ["default"]  # as PEFT's create_arrow_model sets it
# adapters that together have every key
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "embed_tokens"]},
    "bias": MODULES | {"lora_bias": True, "bias": "all"},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "tokens": MODULES | {"trainable_token_indices": [1, 2], "modules_to_save": ["lm_head"]},
    "mica": MODULES | {"init_lora_weights": "mica"},
    "monteclora": MODULES | {"monteclora_config": lora.MontecloraConfig()},
    "velora": MODULES | {"velora_config": lora.VeloraConfig(num_groups=4)},
    "kasa": MODULES | {"kasa_config": lora.KasaConfig()},
    "arrow": MODULES | {"arrow_config": ARROW},
    "qalora": MODULES | {"use_qalora": True, "qalora_group_size": 8},
    "bdlora": MODULES | {
        "use_bdlora": lora.BdLoraConfig(
            target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2
        )
    },
    "alora": MODULES | {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
}  # fmt: skip
KEYS = {
    "lora_A.weight": "read", "lora_B.weight": "read", "lora_B.bias": "read",
    "lora_embedding_A": "read", "lora_embedding_B": "read", "lora_magnitude_vector": "read",
    "token_adapter.trainable_tokens_delta": "read", "lora_diag": "refused",
    "lora_monteclora_sampler": "ignored", "lora_velora_embed": "ignored",
}  # fmt: skip


def saved_keys(settings: dict[str, Any]) -> set[str]:
    """The names after the modules' of what PEFT saves, without trained copies."""
    with oracle.quiet():
        model = peft.get_peft_model(oracle.llama(), peft.LoraConfig(r=4, **settings))
        tensors = get_peft_model_state_dict(model)
    adapted = [key for key in tensors if re.search(r"lora_|token_adapter", key)]
    return {re.sub(r"^.*?\.(?=lora_|token_adapter)", "", key) for key in adapted}


def word_on(key: str) -> str:
    """What a reading does with a key of a module."""
    key = f"model.q_proj.{key}"
    if any(pattern.match(key) for pattern in (*(p for p, _ in ROLES), TOKENS)):
        return "read"
    return "ignored" if NO_ARITHMETIC.search(key) else "refused" if NOT_READ.search(key) else "none"


def test_every_key_of_a_saved_lora_has_a_word():
    found = set[str]().union(*map(saved_keys, VARIANTS.values()))
    starts = {re.sub(r"^(lora_monteclora_sampler)\..*", r"\1", key) for key in found}
    assert starts == {*KEYS}
    for key in found:
        assert word_on(key) == KEYS.get(key, "ignored")
    assert word_on("lora_new_part") == "refused"


def test_every_variant_of_pefts_lora_is_among_those():
    kinds = {kind for kind in vars(variants).values() if isinstance(kind, type)}
    names = {k.__name__ for k in kinds if issubclass(k, LoraVariant) and k is not LoraVariant}
    ends = r"(Linear|Embedding|Conv\w+)Variant$"
    assert {re.sub(ends, "", name).strip("_").lower() for name in names} <= {*VARIANTS}


# ---- quantization methods ----------------------------------------------------------------------

# `test_damaged.py` tests that these are refused by name
NOT_CODED = {
    "aqlm", "vptq", "quanto", "eetq", "higgs", "fbgemm_fp8", "gguf", "bitnet", "spqr", "quark",
    "fp_quant", "nvfp4", "fouroversix", "sinq", "gemma",
}  # fmt: skip
NOT_OF_TRANSFORMERS = {"mlx", "modelopt"}


def test_every_quantization_method_of_transformers_has_a_word():
    assert not NOT_CODED & read_methods()
    methods = {method.value for method in QuantizationMethod}
    assert NOT_CODED | read_methods() == methods | NOT_OF_TRANSFORMERS
