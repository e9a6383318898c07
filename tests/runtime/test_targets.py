"""`resolve` against PEFT: the same modules and parameters, ranks and scales on tiny models."""

import copy
import functools
import json
import random
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

import adapterkit
from adapterkit import LoraConfig, Refused
from adapterkit.core.adapter.config import PEFT_DEFAULTS
from adapterkit.core.adapter.targets import USUAL_TARGETS
from adapterkit.runtime import attach
from adapterkit.runtime.targets import LiveResolver
from tests.fuzz import models
from tests.support import architectures, oracle

SIZES = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 48}


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.lines = nn.Conv1d(4, 8, 3)
        self.image = nn.Conv2d(4, 8, 3, groups=2)
        self.volume = nn.Conv3d(4, 8, 3)
        self.words = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(3)
        )


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**WIDE, max_position_embeddings=40, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**WIDE, head_dim=8))


BUILDS = {
    "llama": functools.partial(oracle.llama, num_hidden_layers=3),
    "tied": oracle.tied_llama,
    "gpt2": oracle.gpt2,
    "neox": oracle.neox,
    "opt": oracle.opt,
    "bert": lambda: oracle.bert("BertForMaskedLM"),
    "bert-cls": oracle.bert_classifier,
    "roberta": roberta,
    "gemma3": gemma3,
    "t5": oracle.t5,
    "vit": oracle.vit,
    "mixed": Mixed,
    **{name: architectures.BUILDS[name] for name in ("mixtral", "gpt_oss", "whisper", "blip2")},
}


@functools.cache
def built(name: str) -> nn.Module:
    with oracle.quiet():
        return BUILDS[name]()


def wrapped(model: nn.Module, config: LoraConfig) -> list[tuple[str, int, float]]:
    """Name, rank and scale of what PEFT wraps."""
    with oracle.quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig.from_peft_type(**config.to_peft())
        ).base_model.model
    rows = []
    modules = dict(theirs.named_modules())
    for path, module in modules.items():
        around = modules.get(path.removesuffix(".base_layer.out_proj"))
        if not isinstance(module, LoraLayer) or isinstance(around, MultiheadAttention) > (
            around is module
        ):
            continue
        name = path.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            name += f".{module.parameter_name}"
        rows.append((name, module.r["default"], module.scaling["default"]))
    return rows


QV = ["q_proj", "v_proj"]
CASES = {
    "llama": [
        LoraConfig(),
        LoraConfig(16, 32, "all-linear", rslora=True),
        LoraConfig(targets="ALL-linear", exclude=["mlp.up_proj", "layers.1.self_attn.k_proj"]),
        LoraConfig(targets=["q_proj", "mlp.down_proj", "lm_head", "embed_tokens"]),
        LoraConfig(targets=["model.layers.1.self_attn.q_proj", "gate_proj"], layers=[0]),
        LoraConfig(targets=QV, layers=2),
        LoraConfig(targets=QV, layers=[0, 2], layers_pattern="layers"),
        LoraConfig(targets=QV, layers=[1], layers_pattern=["h", "lay.*"]),
        LoraConfig(targets=r".*layers\.[02]\..*(q|up)_proj"),
        LoraConfig(targets=QV, exclude=r"model\.layers\.0\..*"),
        LoraConfig(8, 4, QV, rank_pattern={"q_proj": 4, r"layers\.1\.self_attn\.q_proj": 2}),
        LoraConfig(
            8,
            4,
            QV,
            rank_pattern={r"^model\.layers\.[01]\..*": 3, "v_proj": 5},
            alpha_pattern={"layers.1.self_attn.v_proj": 0.5, "self_attn.q_proj": 7},
            rslora=True,
        ),
        LoraConfig(targets=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["lm_head"]),
        LoraConfig(targets="all-linear", modules_to_save=["mlp"]),
        LoraConfig(targets=[], parameters=["q_proj.weight", "mlp.down_proj.weight"], alpha=3),
        LoraConfig(parameters=["o_proj.weight"]),
    ],
    "tied": [
        LoraConfig(targets=["q_proj", "embed_tokens"]),
        LoraConfig(targets=["q_proj", "embed_tokens"], tie=True),
        LoraConfig(targets=["lm_head"], tie=True),
        LoraConfig(targets=r".*(q_proj|embed_tokens)", tie=True),
    ],
    "gpt2": [
        LoraConfig(),
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=["c_attn", "wte"], layers=[1]),
        LoraConfig(targets=["c_proj"], layers=[0], layers_pattern="h", rank_pattern={"mlp.*": 2}),
    ],
    "neox": [LoraConfig(), LoraConfig(targets="all-linear"), LoraConfig(targets=["dense"])],
    "opt": [LoraConfig(), LoraConfig(targets="all-linear")],
    "bert": [LoraConfig(), LoraConfig(targets="all-linear"), LoraConfig(targets=["dense"])],
    "bert-cls": [
        LoraConfig(task_type="SEQ_CLS"),
        LoraConfig(targets="all-linear", task_type="SEQ_CLS"),
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=r".*(query|classifier)", task_type="SEQ_CLS"),
    ],
    "roberta": [
        LoraConfig(task_type="SEQ_CLS"),
        LoraConfig(targets="all-linear", task_type="SEQ_CLS"),
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=["dense", "out_proj"]),
    ],
    "gemma3": [LoraConfig(targets="all-linear"), LoraConfig(targets=QV, layers=[1, 2])],
    "t5": [
        LoraConfig(),
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=["q", "wo"], layers=[1]),
        LoraConfig(targets=["q", "encoder.embed_tokens"], rank_pattern={"decoder.*": 2}),
    ],
    "vit": [
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=["patch_embeddings.projection"]),
        LoraConfig(targets="all-linear", modules_to_save=["classifier"]),
    ],
    "mixed": [
        LoraConfig(targets=["attention", "lines", "image", "volume", "words", "up"]),
        LoraConfig(targets=["attention"], rank_pattern={"attention": 4}, alpha=2),
        LoraConfig(targets=["up", "down"], layers=[1], layers_pattern="blocks"),
        LoraConfig(targets=["up"], parameters=["down.weight", "attention.in_proj_weight"]),
    ],
    "mixtral": [
        LoraConfig(targets=QV, parameters=["experts.gate_up_proj", "experts.down_proj"]),
        LoraConfig(targets=[], parameters=["down_proj", "gate_up_proj", "gate.weight"]),
        LoraConfig(
            targets=QV,
            parameters=["mlp.experts.gate_up_proj"],
            rank_pattern={r".*\.gate_up_proj": 2, "q_proj": 3},
            alpha_pattern={r"layers\.0\.mlp\.experts\.gate_up_proj": 5},
        ),
    ],
    "gpt_oss": [
        LoraConfig(targets="all-linear"),
        LoraConfig(targets="all-linear", parameters=["gate_up_proj", "down_proj"]),
    ],
    "whisper": [
        LoraConfig(targets="all-linear"),
        LoraConfig(targets=QV),
        LoraConfig(targets=["conv1", "conv2", "fc1"]),
    ],
    "blip2": [LoraConfig(targets="all-linear"), LoraConfig(targets=r".*vision_model.*\.qkv")],
}


@pytest.mark.parametrize(
    "name, config", [(name, config) for name, configs in CASES.items() for config in configs]
)
def test_targets_are_those_of_peft(name, config):
    model = built(name)
    targets = LiveResolver(model, config).resolve()
    ours = [(target.name, target.rank, target.scale) for target in targets]
    theirs = wrapped(model, config)
    assert sorted(ours) == sorted(theirs)
    assert len(ours) > 0
    for target in targets:
        assert model.get_submodule(target.path) is target.module


def test_usual_targets_of_mixtral():
    """PEFT has them, and loses them when it looks for names of transformers 4."""
    model = built("mixtral")
    ends = {
        target.path.rpartition(".")[2] for target in LiveResolver(model, LoraConfig()).resolve()
    }
    assert ends == set(QV)
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        wrapped(model, LoraConfig())


def test_all_linear_leaves_mixtrals_experts_alone():
    """PEFT adapts its router and experts as well, as parameters."""
    model = built("mixtral")
    paths = {
        target.path for target in LiveResolver(model, LoraConfig(targets="all-linear")).resolve()
    }
    theirs = wrapped(model, LoraConfig(targets="all-linear"))
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert paths == linear - {"lm_head"} < {name for name, _, _ in theirs}


def test_usual_targets_are_those_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    assert {
        kind: targets if isinstance(targets, str) else list(targets)
        for kind, targets in USUAL_TARGETS.items()
    } == theirs


ROUND_TRIPS = [
    LoraConfig(),
    LoraConfig(16, 0.5, "all-linear", rslora=True, dropout=0.1, bias="lora_only"),
    LoraConfig(targets=[], trainable_tokens=[3, 1], task_type="CAUSAL_LM"),
    LoraConfig(targets=["q"], trainable_tokens={"wte": [3, 1]}, layers=2, layers_pattern="h"),
    LoraConfig(targets=["q", "v"], rank_pattern={"^a.q": 3}, alpha_pattern={"v": 7}, tie=True),
    LoraConfig(targets=r".*q", exclude=["a", "b"], init="pissa_niter_4", dora=True),
    LoraConfig(targets=[], parameters=["up", "down"], exclude=r"a.*", init="gaussian"),
    LoraConfig(targets=["q"], layer_replication=[(0, 2), (1, 3)], lora_bias=True, init=False),
    LoraConfig(
        targets=["q"],
        invocation_tokens=[5, 6],
        modules_to_save=["head"],
        init="eva",
        task_type="CAUSAL_LM",
    ),
    LoraConfig(targets=["q"], init="orthogonal", bias="all", task_type="SEQ_CLS"),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_peft_reads_and_writes_the_same_config(config, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "adapter_config.json").write_text(json.dumps(config.to_peft("org/base")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of unknown settings
        warnings.filterwarnings("ignore", message="`init_lora_weights` is 'eva' but")
        read = peft.LoraConfig.from_pretrained(str(ours))
    read.save_pretrained(theirs)
    stored = json.loads((theirs / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules"):  # sets in PEFT
        if isinstance(stored[key], list):
            stored[key].sort(key=config.to_peft()[key].index)
    back = LoraConfig.from_peft(stored, "x")
    assert back.init_options.items() >= config.init_options.items()  # PEFT writes its defaults too
    assert replace(back, init_options=config.init_options) == config
    assert set(stored) == set(config.to_peft())


def test_the_settings_of_a_plain_lora_are_those_of_peft():
    stored = peft.LoraConfig().to_dict()
    assert stored | {"inference_mode": True, "peft_version": None} == PEFT_DEFAULTS | {
        "peft_version": None
    }


def wrappers(model: nn.Module, config: LoraConfig, kind: type) -> dict[str, nn.Module]:
    with oracle.quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig.from_peft_type(**config.to_peft())
        ).base_model.model
    return {path: module for path, module in theirs.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("name, config", [
    ("llama", LoraConfig(targets=["q_proj"], modules_to_save=["lm_head", "1.input_layernorm"])),
    ("bert-cls", LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"])),
    ("roberta", LoraConfig(task_type="TOKEN_CLS")),
    ("llama", LoraConfig(targets=[], modules_to_save=["norm"])),
    ("llama", LoraConfig(targets=["q_proj"], modules_to_save=["n_proj", "head"])),
    ("bert-cls", LoraConfig(targets=["query"], modules_to_save=["Norm", "ssifier"])),
])  # fmt: skip
def test_modules_trained_in_full_are_those_of_peft(name, config):
    model = built(name)
    theirs = wrappers(model, config, ModulesToSaveWrapper)
    assert sorted(LiveResolver(model, config).saved()) == sorted(theirs)


@pytest.mark.parametrize("name, tokens", [
    ("llama", [3, 1]), ("gpt2", [7]), ("llama", {"embed_tokens": [2], "lm_head": [1, 5]}),
])  # fmt: skip
def test_rows_of_tokens_are_those_of_peft(name, tokens):
    model = built(name)
    config = LoraConfig(targets="all-linear", trainable_tokens=tokens)
    theirs = wrappers(model, config, TrainableTokensWrapper)
    rows = LiveResolver(model, config).tokens()
    for path, indices in rows.items():
        assert tuple(theirs[path].token_adapter.token_indices["default"]) == indices
    head = {"lm_head"} if name == "gpt2" else set()  # tied: not named, and wrapped
    assert set(theirs) == set(rows) | head


ODD = {"phimoe": "router", "deepseek_v4": "o_a_proj"}  # llama4's router is as phimoe's


@pytest.mark.parametrize("kind", ODD)
def test_linear_by_its_weight_only(kind, tmp_path):
    """A router that gives a tuple, a product for each group: all-linear and `init` leave them out,
    a parameter's factors act."""
    base = models.save_base(kind, random.Random(0), tmp_path / "base", tie=False)
    model = base.load(torch.float32)
    paths = [path for path, _ in model.named_modules() if path.endswith(f".{ODD[kind]}")]
    paths = [path for path in paths if isinstance(model.get_submodule(path), nn.Linear)]
    found = {
        target.path for target in LiveResolver(model, LoraConfig(2, 4, "all-linear")).resolve()
    }
    assert paths and not found & set(paths)
    with pytest.raises(Refused, match=rf"(?s)target .*{ODD[kind]}.*parameters="):
        LiveResolver(model, LoraConfig(2, 4, [ODD[kind]])).resolve()
    adapters = attach(model, LoraConfig(2, 4, "all-linear"))
    plain = models.outputs(model, model)
    adapters.detach()
    config = LoraConfig(2, 4, [], parameters=[f"{ODD[kind]}.weight"], init=False)
    attach(model, config, seed=0)
    y, z = (each["logits"] for each in (plain, models.outputs(model, model)))
    assert not torch.allclose(y, z)
    adapterkit.init(
        base.folder, out=tmp_path / "init", method="default", rank=2, targets="all-linear"
    )
    stored = oracle.stored(tmp_path / "init" / "adapter")
    assert not [key for key in stored if any(f"{path}." in key for path in paths)]
