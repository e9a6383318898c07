"""What a merge is held against: PEFT's own merge, and the same sum in float64; and the tiny models
of each kind.

`exact` takes the factors and scales from PEFT's layers but none of PEFT's arithmetic. Where PEFT
0.21 has a defect (attention's out_proj gets its delta twice) it gives the right value.
"""

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft.tuners.lora import layer as peft_layers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from tests.support.usual import usual

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Build = Callable[[], nn.Module]


def in_dtypes(names: Iterable[str], *whole: str) -> list:
    """Each name in bf16, some in every dtype; no rounding knows the kinds of layers."""
    rows = [(n, dtype) for n in names for dtype in DTYPES if dtype != "fp16" or n in whole]
    return usual(rows, lambda row: row[1] == "bf16" or row[0] in whole)


# -- models ----------------------------------------------------------------------------------------


def llama(tie: bool = False, cls: str = "LlamaForCausalLM", **changes) -> nn.Module:
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return _model(
        cls, transformers.LlamaConfig(**(sizes | heads | {"tie_word_embeddings": tie} | changes))
    )


def tied_llama() -> nn.Module:
    return llama(tie=True)


def gemma() -> nn.Module:
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    return _model(
        "GemmaForCausalLM",
        transformers.GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1),
    )


def gpt2(cls: str = "GPT2LMHeadModel") -> nn.Module:
    return _model(
        cls, transformers.GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def neox() -> nn.Module:
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return _model("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**sizes, num_attention_heads=4))


def opt() -> nn.Module:
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "word_embed_proj_dim": 16,
    }
    return _model(
        "OPTForCausalLM",
        transformers.OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64),
    )


def bert(cls: str = "BertModel", **changes) -> nn.Module:
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return _model(
        cls,
        transformers.BertConfig(
            **(sizes | changes), num_attention_heads=4, max_position_embeddings=64
        ),
    )


def bert_classifier() -> nn.Module:
    return bert("BertForSequenceClassification", num_labels=3)


def t5() -> nn.Module:
    sizes = {
        "vocab_size": 80,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    return _model("T5ForConditionalGeneration", transformers.T5Config(**sizes))


def vit() -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return _model(
        "ViTForImageClassification",
        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5),
    )


def clip() -> nn.Module:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 80, "max_position_embeddings": 16},
        vision_config=tower | {"image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    return _model("CLIPModel", config)


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, in a module that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.line = nn.Conv1d(16, 12, 3, padding=1)
        self.image = nn.Conv2d(6, 10, 3)
        self.tall = nn.Conv2d(6, 10, (1, 5))
        self.point = nn.Conv2d(6, 10, 1)
        self.square = nn.Conv2d(8, 8, 3)
        self.volume = nn.Conv3d(4, 6, (2, 3, 1))
        self.attention = nn.MultiheadAttention(16, 4)
        self.fit = nn.Linear(16, 16)  # square
        self.narrow = nn.Linear(16, 3, bias=False)
        self.norm = nn.BatchNorm2d(10)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def _model(cls: str, config) -> nn.Module:
    torch.manual_seed(0)
    with quiet():
        return getattr(transformers, cls)(config).eval()


# -- bases and adapters on disk --------------------------------------------------------------------


@contextmanager
def quiet():
    """Without PEFT's and transformers' advice; warnings of ours are errors all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_base(model: nn.Module, folder: Path, dtype: str = "bf16", **kwargs) -> None:
    model = model.to(DTYPES[dtype])
    if isinstance(model, transformers.PreTrainedModel):
        with quiet():
            model.save_pretrained(folder, **kwargs)
    else:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
        )


def load(build: Build | str, folder: Path) -> nn.Module:
    """The model of a folder in the folder's own dtype, all keys accounted for. `build`: what makes
    it, or its class's name."""
    cls = _class_of(build) if callable(build) else getattr(transformers, str(build))
    torch.manual_seed(0)
    if not issubclass(cls, transformers.PreTrainedModel):
        model, state = build(), load_file(folder / "model.safetensors")
        for name, tensor in state.items():
            _parent(model, name)[name.rpartition(".")[2]].data = tensor
        assert set(state) == set(model.state_dict())
        return model.eval()
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    if sum(stat.st_size for _, stat in stats) > 1 << 20:
        return load_checked(cls, folder)
    state = tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
    return copy.deepcopy(_loaded(cls, folder, state))


@functools.cache
def _class_of(build: Build) -> type[nn.Module]:
    return type(build())


@functools.lru_cache(maxsize=8)
def _loaded(cls, folder: Path, state: tuple) -> nn.Module:
    """The model of a folder whose files are in this state, as most tests load one several times."""
    return load_checked(cls, folder)


def _parent(model: nn.Module, name: str) -> dict:
    module = model.get_submodule(name.rpartition(".")[0])
    return module._parameters | module._buffers


def load_checked(cls, folder: Path) -> nn.Module:
    """`from_pretrained`, with no key missing, left over, or of another shape."""
    with quiet():
        model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ), info
    return model.eval()


def train(model: nn.Module, folder: Path, *, seed: int = 1, size: float = 0.1, **config) -> None:
    """A LoRA of `model` as training would leave it: every trained value moved at random, saved by
    PEFT."""
    with quiet():
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | config))
        )
        perturb(wrapped, seed, size)
        wrapped.save_pretrained(folder)


@torch.no_grad()
def perturb(model: nn.Module, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if "lora_magnitude" in name:
            parameter.mul_(1 + 0.1 * noise)
        elif "lora_" in name:
            parameter.copy_(size * noise)
        else:
            parameter.add_(size * noise)


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


def edit_config(source: Path, out: Path, **changes) -> Path:
    """A copy of an adapter (or base) with keys of its config changed; None removes one."""
    shutil.copytree(source, out)
    path = next(out / n for n in ("adapter_config.json", "config.json") if (out / n).exists())
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")
    return out


# -- results ---------------------------------------------------------------------------------------


def peft_model(model: nn.Module, *adapters: Path) -> peft.PeftModel:
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for i, adapter in enumerate(adapters[1:], start=1):
            wrapped.load_adapter(adapter, adapter_name=f"a{i}")
        if len(adapters) > 1:
            wrapped.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return wrapped.eval()


def peft_merged(model: nn.Module, *adapters: Path) -> dict[str, Tensor]:
    """The state that PEFT's `merge_and_unload` gives, in its default mode."""
    with quiet():
        return peft_model(model, *adapters).merge_and_unload().state_dict()


def merged(out: Path, build: Build | str) -> dict[str, Tensor]:
    """The state of a merged folder, loaded as a model."""
    return load(build, out).state_dict()


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files by key."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def merge(base: Path, *adapters: Path | str, out: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return adapterkit.merge(base, adapters, out=out, **options)


@dataclass
class Exact:
    """A parameter's merged value in float64, and per element the size of the numbers it was summed
    from."""

    value: Tensor
    size: Tensor
    inputs: int  # terms of the longest sum


def exact(wrapped: nn.Module, weights: tuple[float, ...] = ()) -> dict[str, Exact]:
    """W + Σ weight·scale·b@a of every adapted parameter, in float64, by its name in the plain
    model."""
    actual: dict[str, Exact] = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, peft_layers.LoraLayer) and not path.endswith(".base_layer"):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            for parameter, value in _exact_layer(module, weights).items():
                actual[f"{name}.{parameter}"] = value
    return actual


def _exact_layer(module, weights: tuple[float, ...]) -> dict[str, Exact]:
    base, active = module.get_base_layer(), list(module.active_adapters)
    leaf = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    weight = getattr(base, leaf)
    value = weight.detach().double()
    size, rank, biases = value.abs(), 0, {}
    for i, name in enumerate(active):
        if name not in module.scaling:
            continue
        factor = module.scaling[name] * (weights[i] if weights else 1.0)
        delta, bound, r = _delta(module, name, base)
        before, value = value, value + factor * delta
        size, rank = size + abs(factor) * bound, rank + r
        if module.use_dora.get(name):
            value = _decomposed(module, name, before, value)
        if getattr(module, "lora_bias", {}).get(name):
            biases["bias"] = (
                biases.get("bias", base.bias.detach().double())
                + factor * module.lora_B[name].bias.double()
            )
    result = {leaf: Exact(value, size, rank)}
    return result | {k: Exact(v.detach(), v.detach().abs() + 1, 2) for k, v in biases.items()}


def _delta(module, name: str, base) -> tuple[Tensor, Tensor, int]:
    """b @ a as it lies on the weight, |b| @ |a|, and the rank."""
    if isinstance(base, nn.Embedding):
        a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
    else:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
    a, b = a.detach().double(), b.detach().double()
    flat = (b.flatten(1), a.flatten(1))
    results = [x @ y for x, y in (flat, (flat[0].abs(), flat[1].abs()))]
    if isinstance(base, nn.Embedding | transformers.pytorch_utils.Conv1D):
        results = [x.T for x in results]
    shape = (
        base.in_proj_weight.shape if isinstance(base, nn.MultiheadAttention) else base.weight.shape
    )
    return results[0].reshape(shape), results[1].reshape(shape), a.shape[0]


def _decomposed(module, name: str, before: Tensor, value: Tensor) -> Tensor:
    """magnitude ⊙ V / ‖V‖, the norm over all that makes one output."""
    base = module.get_base_layer()
    magnitude = module.lora_magnitude_vector[name].weight.detach().double().reshape(-1)
    outputs = 1 if isinstance(base, nn.Embedding | transformers.pytorch_utils.Conv1D) else 0
    rest = [d for d in range(value.dim()) if d != outputs]
    norm = value.square().sum(rest).sqrt()
    shape = [-1 if d == outputs else 1 for d in range(value.dim())]
    return value * (magnitude / norm).view(shape)


def assert_rounded(actual: Tensor, expected: Exact, name: str = "") -> None:
    """Each element is the correctly rounded value; its neighbor only where float32 arithmetic
    cannot tell the two apart."""
    assert actual.shape == expected.value.shape, name
    slack = (expected.inputs + 8) * 2.0**-24 * (expected.size + expected.value.abs())
    difference = (actual.double() - expected.value).abs()
    if actual.dtype == torch.float32:
        assert bool((difference <= slack).all()), (name, float((difference / slack).max()))
        return
    nearest = expected.value.to(actual.dtype)
    wrong = actual != nearest
    assert int(wrong.sum()) <= 2 + 1e-3 * actual.numel(), (name, int(wrong.sum()), actual.numel())
    middle = (actual.double() + nearest.double()) / 2
    assert bool(((expected.value - middle).abs() <= slack)[wrong].all()), name


def assert_all_rounded(
    state: dict[str, Tensor], expected: dict[str, Exact], untouched: dict[str, Tensor]
) -> None:
    """Every expected parameter is right, every other is the base's, bit for bit."""
    assert expected and set(expected) <= set(state)
    for name, tensor in state.items():
        if name in expected:
            assert_rounded(tensor, expected[name], name)
            assert not torch.equal(tensor, untouched[name]), f"{name} did not change"
        elif name in untouched:
            assert torch.equal(tensor, untouched[name]), f"{name} changed"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two states, bit for bit, dtypes too."""
    assert set(actual) == set(expected)
    wrong = [
        n
        for n in actual
        if actual[n].dtype != expected[n].dtype or not torch.equal(actual[n], expected[n])
    ]
    assert not wrong, wrong


def assert_as_peft(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two states, bit for bit, but for the last bits of a float32 kernel of several positions: PEFT
    multiplies those factors by a convolution, and in which order that sums is the processor's
    affair."""
    kernels = {
        n
        for n, t in expected.items()
        if t.dtype == torch.float32 and t.dim() > 2 and t[0, 0].numel() > 1
    }
    assert_same(
        {n: t for n, t in actual.items() if n not in kernels},
        {n: t for n, t in expected.items() if n not in kernels},
    )
    for name in kernels:
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=2.0**-21,
            atol=2.0**-22 * float(expected[name].abs().max()),
        )
