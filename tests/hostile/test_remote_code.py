"""Configs that lead to code, kernels, files or other repositories, at any depth and under other
names: no class that is built of them asks, runs or fetches anything."""

import contextlib
import json
import socket
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, dynamic_module_utils
from transformers.integrations import hub_kernels
from transformers.models.auto import auto_factory, configuration_auto, tokenization_auto

import adapterkit
from adapterkit.cli import main
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.weights import skeleton
from adapterkit.core.weights.safe_config import closed
from adapterkit.verbs.look.configs import compare_model_configs
from adapterkit.verbs.stats.data.samples import load_tokenizer
from adapterkit.verbs.stats.model.stored_model import _without_data
from tests.support import oracle, tiny
from tests.support.raw_files import base
from tests.support.texts import save_tokenizer
from tests.support.usual import usual

Json = dict[str, Any]
AUTOS = ("AutoConfig", "AutoTokenizer", "AutoModelForTextEncoding", "AutoBackbone", *tiny.AUTOS)
POINTER = dict.fromkeys(AUTOS, "evil/repo--modeling_evil.Evil")
KERNEL = "evil/kernel"
FILES: Any = base()
BASE = open_checkpoint(FILES)
KERNELS = {
    f"{a}{kind}_implementation{b}": KERNEL
    for kind in ("attn", "experts") for a in ("", "_", "__") for b in ("", "_internal")
}  # fmt: skip
ALIASES = {"code": "auto_map", "x": "_attn_implementation", "y": "_experts_implementation_internal"}
PLANTED: dict[str, Json] = {
    "code": {"auto_map": POINTER, "_name_or_path": "evil/repo", "name_or_path": "evil/repo"},
    "another name": {"attribute_map": ALIASES, "code": POINTER},
    "a kernel": {"attn_implementation": KERNEL},
    "kernels": {"attribute_map": ALIASES, "x": KERNEL, "y": KERNEL} | KERNELS,
}


@pytest.fixture
def reached(monkeypatch) -> list[str]:
    """What was reached of all that asks, runs or fetches; each fails where it is called."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        def fail(*args: object, **options: object) -> None:
            seen.append(f"{name} {args}")
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(owner, name, fail, raising=False)

    kernels = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *a, **k: True)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *a, **k: True)
    for module in (auto_factory, configuration_auto, tokenization_auto, dynamic_module_utils):
        watch(module, "get_class_from_dynamic_module")
    watch(auto_factory, "resolve_trust_remote_code")
    for owner, name in (
        (hub_kernels, "get_kernel_hub"), (kernels, "get_kernel"),
        (dynamic_module_utils, "get_class_in_module"), (dynamic_module_utils, "signal"),
        ("builtins", "input"), (socket.socket, "connect"), (socket, "getaddrinfo"),
        ("huggingface_hub", "hf_hub_download"), ("transformers.utils.hub", "hf_hub_download"),
        ("transformers.backbone_utils", "hf_api"),
    ):  # fmt: skip
        watch(sys.modules[owner] if isinstance(owner, str) else owner, name)
    return seen


def planted(value: Any, keys: Json, *, models_only: bool = False) -> Any:
    """A config with these keys in every object, those in lists too, or in those of models."""
    if isinstance(value, list):
        return [planted(one, keys, models_only=models_only) for one in value]
    if not isinstance(value, dict):
        return value
    inner = {key: planted(one, keys, models_only=models_only) for key, one in value.items()}
    return inner if models_only and "model_type" not in value else inner | keys


def built(config: Json, class_name: str) -> Any:
    skeleton._built.cache_clear()
    return skeleton._meta_model(replace(BASE, config=config), class_name)


def config_of(config: Json, monkeypatch) -> Any:
    """transformers' object of a config, as a build of a model gets it."""
    made: list[Any] = []
    original = skeleton._config

    def keep(*args: Any) -> Any:
        made.append(original(*args))
        raise Refused("seen")

    monkeypatch.setattr(skeleton, "_config", keep)
    with pytest.raises(Refused):
        built(config, "AutoModel")
    monkeypatch.setattr(skeleton, "_config", original)
    return made[0] if made else None


def parts_of(config: Any) -> list[Any]:
    """A config object and those in its attributes, lists and tables."""
    if isinstance(config, transformers.PretrainedConfig):
        return [config, *parts_of(list(vars(config).values()))]
    if isinstance(config, dict):
        return parts_of(list(config.values()))
    if isinstance(config, list | tuple):
        return [part for one in config for part in parts_of(one)]
    return []


def check_config(config: Any) -> None:
    for part in parts_of(config):
        own = vars(part)
        assert "auto_map" not in own and "attribute_map" not in own
        assert "evil" not in str(part.name_or_path)
        assert "evil" not in str(own.get("_attn_implementation_internal"))
        assert "evil" not in str(own.get("_experts_implementation_internal"))


def saved(config: Any) -> Json:
    """Without the name of the folder that it was read from."""
    config = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def default_of(kind: str) -> Json:
    """The default config of a type, as it is saved; empty where it has none."""
    try:
        with oracle.quiet():
            return saved(CONFIG_MAPPING[kind]())
    except Exception:  # a type that needs its parts
        return {}


def test_no_config_class_keeps_what_leads_elsewhere(reached, monkeypatch):
    """Of all types; in the parts of each, and in lists and tables, too."""
    monkeypatch.setattr(transformers.PretrainedConfig, "__repr__", object.__repr__)  # half the time
    seen, more = 0, {"more": [{"model_type": "llama"}, [{"model_type": "bert"}]]}
    names = PLANTED["another name"] | PLANTED["kernels"]
    for kind in CONFIG_MAPPING:
        config = default_of(kind)
        everywhere = planted(config, PLANTED["code"] | KERNELS | {"attribute_map": ALIASES})
        made: Any = config and config_of(everywhere, monkeypatch)
        if not made:  # a type that needs its parts, or names another model
            continue
        check_config(made)
        kept = saved(made)  # some types save more than they were made of
        assert kept == config or kept == saved(config_of(config, monkeypatch)), kind
        if made.sub_configs or not seen:
            named = planted(config | more, names, models_only=True)
            check_config(config_of(named, monkeypatch))
        seen += 1
    assert seen > 300 and not reached


# -- models ----------------------------------------------------------------------------------------

NESTED = {  # with classes of their own where no AutoModel knows them
    "llava": "", "qwen2_vl": "", "blip-2": "", "clip": "", "idefics2": "", "qwen2_audio": "",
    "gpt_oss": "", "encoder-decoder": "", "speech-encoder-decoder": "",
    "vision-text-dual-encoder": "", "rag": "RagModel", "colpali": "ColPaliForRetrieval",
    "musicgen": "MusicgenForConditionalGeneration", "rt_detr": "",
}  # fmt: skip
SOME_NESTED = ("llava", "blip-2", "clip", "gpt_oss", "encoder-decoder", "rag", "colpali")
PARTS: dict[str, Json] = {
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "gpt2"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "rag": {"question_encoder": "dpr", "generator": "bart"},
}


def tiny_config(kind: str) -> Json:
    with oracle.quiet():
        parts = {key: tiny_config(part) for key, part in PARTS.get(kind, {}).items()}
        config = transformers.AutoConfig.for_model(kind, **parts)
        return saved(config if parts else tiny.shrink(config))


def class_of(kind: str) -> str:
    config = CONFIG_MAPPING[kind]
    return NESTED.get(kind) or next(
        n for n in tiny.AUTOS if config in getattr(transformers, n)._model_mapping
    )


def check_model(kind: str, keys: Json, plain: Any) -> None:
    """A model of a planted config is that of the plain one."""
    model = built(planted(tiny_config(kind), keys, models_only=True), class_of(kind))
    check_config(model.config)
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (model, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", usual(NESTED, SOME_NESTED))
def test_no_model_asks_runs_or_fetches(kind: str, reached):
    plain = built(tiny_config(kind), class_of(kind))
    for keys in PLANTED.values():
        check_model(kind, keys, plain)
        assert not reached


@pytest.mark.slow
def test_no_model_of_any_type_with_parts_asks_runs_or_fetches(reached):
    seen = 0
    for kind in (kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind].sub_configs):
        try:
            plain = built(tiny_config(kind), class_of(kind))
        except Exception:  # transformers' own code on a shrunk config
            continue
        seen += 1
        for keys in PLANTED.values():
            check_model(kind, keys, plain)
            assert not reached, kind
    assert seen > 90


def of_statistics(folder: Path) -> Any:
    return _without_data(transformers.LlamaModel, transformers.LlamaConfig(), torch.float32)


def of_gguf(folder: Path) -> Any:
    from tests.support import gguf_files

    path = gguf_files.write(folder / "m.gguf", "llama", *gguf_files.llama()[1:])
    return adapterkit.dequantize(path, out=folder / "out", dry_run=True)


LLAMA = {"model_type": "llama"}
BUILDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a config": ("AutoConfig.from_pretrained", lambda _: built(LLAMA, "AutoModel")),
    "a model": ("AutoModel.from_config", lambda _: built(LLAMA, "AutoModel")),
    "a model of a class": ("LlamaModel.__init__", lambda _: built(LLAMA, "LlamaModel")),
    "a model of diffusers": (
        "diffusers.UNet2DModel.from_config",
        lambda _: built({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ),
    "a model to run": ("LlamaModel._from_config", of_statistics),
    "configs to compare": (
        "LlamaConfig.to_dict", lambda _: compare_model_configs(LLAMA | {"a": 1}, LLAMA),
    ),
    "a tokenizer": (
        "AutoTokenizer.from_pretrained",
        lambda folder: load_tokenizer(LocalFolder(save_tokenizer(folder))),
    ),
    "a config of GGUF": ("AutoConfig.for_model", of_gguf),
    "a tokenizer of GGUF": ("AutoTokenizer.from_pretrained", of_gguf),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_every_build_is_closed(name: str, monkeypatch, tmp_path: Path):
    function, build = BUILDS[name]
    offline: list[bool] = []

    def record(*args: object, **options: object) -> None:
        offline.append(huggingface_hub.constants.is_offline_mode())
        assert options.get("trust_remote_code", False) is False
        raise Refused("seen")

    if "diffusers" not in function:
        function = f"transformers.{function}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(function, record)
    with contextlib.suppress(AdapterkitError):
        build(tmp_path)
    assert offline and all(offline) and not huggingface_hub.constants.is_offline_mode()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_backbone_by_name_is_refused_and_not_looked_up(depth: int, monkeypatch):
    config: Json = {"model_type": "detr", "backbone": "evil/repo", "use_timm_backbone": False}
    for kind in ("llava", "vision-text-dual-encoder")[:depth]:
        text = {"model_type": "bert"}
        config = {"model_type": kind, "vision_config": config, "text_config": text}
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    with pytest.raises(Refused, match="names a backbone, evil/repo"):
        built(config, "AutoModel")
    assert not asked


def test_another_file_of_a_tokenizer_is_not_read(tmp_path: Path, monkeypatch):
    """transformers would take it in place of the folder's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.4.0.0.json").write_text("{}")
    settings = save_tokenizer(tmp_path / "base") / "tokenizer_config.json"
    other = {"fast_tokenizer_files": ["/proc/self/cwd/tokenizer.4.0.0.json"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | other))
    assert load_tokenizer(LocalFolder(tmp_path / "base")).convert_tokens_to_ids("A")


def test_kernels_are_closed_only_for_the_building_thread(monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", lambda name, **_: loaded.append(name), False)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    ask = lambda: dynamic_module_utils.resolve_trust_remote_code(None, "evil", False, True)
    with closed():
        with pytest.raises(FileNotFoundError):
            hub_kernels.get_kernel("evil/kernel")
        with pytest.raises(FileNotFoundError):
            dynamic_module_utils.get_class_from_dynamic_module("evil.Evil", ".")
        with pytest.raises(ValueError, match="execute"):
            ask()
        with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
            huggingface_hub.HfApi().repo_exists("evil/repo")
        other = threading.Thread(target=hub_kernels.get_kernel, args=("a/kernel",))
        other.start()
        other.join()
    assert loaded == ["a/kernel"] and ask()
    hub_kernels.get_kernel("b/kernel")
    assert loaded == ["a/kernel", "b/kernel"]


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["code", "another name"])
@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_a_command_that_gets_yes_runs_no_code(command: str, name: str, tmp_path: Path):
    """`GPT2` has no model of kind seq2seq: transformers asks whether to take the checkpoint's."""
    evil, folder = tmp_path / "evil", tmp_path / "base"
    evil.mkdir()
    (evil / "modeling_evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    pointer = dict.fromkeys(AUTOS, "modeling_evil.Evil")
    keys = {"code": {"auto_map": pointer},
            "another name": {"attribute_map": {"other": "auto_map"}, "other": pointer}}  # fmt: skip
    decoder = tiny_config("vit") | keys[name] | {"_name_or_path": str(evil)}
    config = {"model_type": "encoder-decoder", "encoder": tiny_config("bert"), "decoder": decoder}
    folder.mkdir()
    config |= {"architectures": ["EncoderDecoderModel"], "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    layer = "encoder.layer.0.attention.self.query"
    save_file({f"encoder.{layer}.weight": torch.ones(64, 64)}, folder / "model.safetensors")
    words = {"inspect": [str(folder), "--modules"], "merge": [str(folder), str(tmp_path / "a")]}
    adapter(tmp_path / "a", f"encoder.{layer}")
    out = ["--out", str(tmp_path / "out"), "--dry-run"] if command == "merge" else []
    done = CliRunner().invoke(main, [command, *words[command], *out], input="y\n" * 9)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "custom code" not in done.output and not (tmp_path / "run").exists()


def adapter(folder: Path, module: str) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{module}.lora"
    values = {f"{name}_A.weight": torch.ones(2, 64), f"{name}_B.weight": torch.ones(64, 2)}
    save_file(values, folder / "adapter_model.safetensors")
