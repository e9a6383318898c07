"""Planning at size: what it reads, and what it does once instead of for each of thousands of
tensors."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.checkpoint.reader import Sources, read_small
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine.computed import _SortedPlaces
from adapterkit.core.engine.local import local
from adapterkit.core.errors import Damaged, Unrecoverable
from adapterkit.core.execute import run
from adapterkit.core.inputs.base_door import Base, kind_of
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.plan import OutputFile
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.core.weights.skeleton import Skeleton
from tests.support import oracle, quantized_llama


class Remote:
    """A folder that is not here; notes the ranges that it is asked for."""

    def __init__(self, path: Path):
        self.folder, self.ranges = LocalFolder(path), []
        self.name, self.label = self.folder.name, self.folder.label
        self.origin, self.hashes = self.folder.origin, self.folder.hashes

    def files(self):
        return self.folder.files()

    def read(self, name, start, stop):
        self.ranges.append((name, start, stop))
        return self.folder.read(name, start, stop)

    def path(self, name):
        return self.folder.path(name)

    def prefetch(self, names):
        pass


@pytest.fixture
def scaled(cached_folder, tmp_path):
    """A function that forges a checkpoint in which one weight's scale holds NaN."""

    def build(form: str, ending: str) -> Path:
        quantized_llama.base(quantized_llama.FORMS[form], tmp_path / form)
        key = "model.layers.0.self_attn.q_proj.weight" + ending
        scale = {
            spec.key: spec
            for spec in open_checkpoint(LocalFolder(tmp_path / form)).tensors.values()
        }[key]
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[scale.dtype]
        values = torch.full(scale.shape, 0.01, dtype=dtype)
        values.view(-1)[-1] = torch.nan
        quantized_llama.change(tmp_path / form, {key: values})
        return tmp_path / form

    return build


@pytest.fixture
def adapter(cached_folder) -> Path:
    return cached_folder(
        "planning-lora",
        lambda folder: oracle.train(quantized_llama.llama(), folder, target_modules=oracle.LINEAR),
    )


@pytest.mark.parametrize("form, ending", [("fp8", "_scale_inv"), ("fp8-channel", "_scale")])
def test_bad_scales_are_refused_here_while_planning_and_far_away_when_they_are_decoded(
    form, ending, scaled, adapter, tmp_path
):
    folder = scaled(form, ending)
    with pytest.raises(Damaged, match="NaN or infinite"):
        plan_merge(Base(LocalFolder(folder)), [(LocalFolder(adapter), 1.0)], MergeOptions())
    far = Remote(folder)
    plan = plan_merge(Base(far), [(LocalFolder(adapter), 1.0)], MergeOptions())
    assert len(far.ranges) <= 3  # the header, the config, and its hash
    with pytest.raises(Unrecoverable, match="not finite"):
        run(plan, Stage(FolderOutput(tmp_path / "out")), local("cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["int4-g_idx", "gptq4"])
def test_tensors_that_describe_others_are_read_in_ranges(form, tmp_path):
    quantized_llama.base(quantized_llama.FORMS[form], tmp_path / "base")
    far = Remote(tmp_path / "base")
    weights = quantized_weights(decoded_view(open_checkpoint(far)).tensors)
    assert len(weights) == 14 and len(far.ranges) <= 3
    assert weights == quantized_weights(
        decoded_view(open_checkpoint(LocalFolder(tmp_path / "base"))).tensors
    )


def test_small_tensors_are_read_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = [random.Random(i).choice([1, 7, 900, 5000, 3_000_000]) for i in range(60)]
    tensors = {
        f"t{i:02}": torch.randint(0, 255, (n,), dtype=torch.uint8, generator=generator)
        for i, n in enumerate(sizes)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    specs = [
        s for s in open_checkpoint(LocalFolder(tmp_path)).tensors.values() if s.nbytes < 1_000_000
    ]
    for folder in (LocalFolder(tmp_path), Remote(tmp_path)):
        back = [
            (spec.key, bytes(data))
            for spec, data in read_small(folder, [*reversed(specs), specs[3]])
        ]
        assert sorted(key for key, _ in back) == sorted(
            [*(spec.key for spec in specs), specs[3].key]
        )
        assert all(data == tensors[key].numpy().tobytes() for key, data in back)
    assert len(folder.ranges) <= sum(n > 1_000_000 for n in sizes) + 1


def test_a_file_that_ends_too_early_is_damaged(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10))
    for folder in (LocalFolder(tmp_path), Remote(tmp_path)):
        with pytest.raises(Damaged, match="ends at byte 10"):
            list(read_small(folder, [TensorSpec("a", "U8", (8,), "x", 4, 12)]))


def mixture(folder: Path, layers: int = 4) -> Skeleton:
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_experts": 4,
    }
    config = transformers.Qwen3MoeConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return Skeleton(open_checkpoint(LocalFolder(folder)), "Qwen3MoeForCausalLM")


def test_like_layers_are_converted_once(tmp_path, monkeypatch):
    calls, convert = [], Skeleton._converted
    monkeypatch.setattr(
        Skeleton, "_converted", lambda self, *args: calls.append(args) or convert(self, *args)
    )
    skeleton = mixture(tmp_path)
    assert sorted(name.rpartition(".")[2] for name, *_ in calls) == ["down_proj", "gate_up_proj"]
    for layer in range(4):  # and each layer's slots are those of its own conversion
        for leaf, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            converter = next(c for c in skeleton.converters if c.target_patterns[0].endswith(leaf))
            sources = [
                (
                    f"model.layers.{layer}.mlp.experts.{e}.{part}.weight",
                    pattern,
                    (32, 16) if leaf == "down_proj" else (16, 32),
                )
                for part, pattern in zip(parts, converter.source_patterns, strict=True)
                for e in range(4)
            ]
            assert (
                skeleton.parameters[name].slots
                == convert(skeleton, name, converter, sources)[name].slots
            )


def test_layers_of_other_shapes_are_converted_by_themselves(tmp_path, monkeypatch):
    skeleton = mixture(tmp_path)
    tensors = dict(skeleton.base.tensors)
    for key in [key for key in tensors if ".layers.2.mlp.experts." in key]:
        tensors[key] = replace(tensors[key], shape=tensors[key].shape[::-1])
    skeleton.base = replace(skeleton.base, tensors=tensors)
    slots = skeleton._slots(skeleton.state)
    name = "model.layers.{}.mlp.experts.down_proj"
    assert slots[name.format(2)][0].shape == (16, 32) and slots[name.format(3)][0].shape == (32, 16)


@dataclass(frozen=True)
class Texts:
    """A task of a text whose size is a guess, and a weight."""

    name: str
    reads = ()
    memory = 0

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        text = TensorPlan(self.name + ".text", "U8", (100,), varies=True)
        return text, TensorPlan(self.name, "U8", (10,))


def test_places_after_texts_of_other_sizes():
    file = OutputFile.computed(
        "x", tuple(Texts(f"w{i:03}") for i in range(50)), safetensors_order=True
    )
    places, at, draw = _SortedPlaces(file), len(file.layout.header), random.Random(0)
    for stored in file.layout.tensors:
        nbytes = stored.nbytes + (draw.randint(-50, 50) if stored.key.endswith(".text") else 0)
        assert places.next(TensorPlan(stored.key, "U8", (nbytes,))) == at
        at += nbytes
    assert places.grown == at - file.layout.size and len(places.stored()) == 100


def test_a_place_before_what_varies_is_known_is_a_bug():
    file = OutputFile.computed("x", (Texts("w0"), Texts("w1")), safetensors_order=True)
    for number in (2, 3):  # w1 and its text, before w0's text
        with pytest.raises(AssertionError, match="before it made first"):
            _SortedPlaces(file).next(file.layout.tensors[number])


def test_an_index_shares_the_strings_of_the_headers(tmp_path):
    model = oracle.llama()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    base = open_checkpoint(LocalFolder(tmp_path))
    assert base.index is not None and len(base.shards) > 1
    for key, file in base.index["weight_map"].items():
        assert key is base.tensors[key].key and file is base.tensors[key].file
    shapes = [spec.shape for spec in base.tensors.values() if spec.file == file]
    assert len({id(shape) for shape in shapes}) == len(set(shapes))


@pytest.mark.parametrize("stacked", [False, True])
def test_bytes_read_are_those_that_are_read(stacked, tmp_path, monkeypatch):
    """Of experts stored one by one each step reads its own part of a, and the stack of b is read
    once for all."""
    mixture(tmp_path / "base")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    experts = {"target_parameters": ["gate_up_proj", "down_proj"]} if stacked else {}
    oracle.train(model, tmp_path / "lora", target_modules=["q_proj", "o_proj"], **experts)
    plan = plan_merge(
        kind_of(LocalFolder(tmp_path / "base")),
        [(LocalFolder(tmp_path / "lora"), 1.0)],
        MergeOptions(),
    )
    weights = sum(
        spec.nbytes for spec in open_checkpoint(LocalFolder(tmp_path / "base")).tensors.values()
    )
    read, ranges = Sources.read_into, []

    def noted(self, spec, offset, buffer):
        ranges.append((spec.folder, len(buffer)))
        read(self, spec, offset, buffer)

    monkeypatch.setattr(Sources, "read_into", noted)
    run(plan, Stage(FolderOutput(tmp_path / "out")), local("cpu"))
    assert plan.totals()["bytes_read"] - weights == sum(
        size for folder, size in ranges if folder == 1
    )


class Counted(dict):
    """A dict that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def items(self):
        self.passes += 1
        return super().items()

    def values(self):
        self.passes += 1
        return super().values()


def test_the_base_is_gone_through_as_often_for_many_modules_as_for_few(tmp_path, monkeypatch):
    mixture(tmp_path / "base")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    passes = []
    for modules in (r".*layers\.0\.self_attn\.q_proj", "all-linear"):
        oracle.train(
            model,
            tmp_path / str(len(modules)),
            target_modules=modules,
            target_parameters=["gate_up_proj", "down_proj"],
        )
        base = open_checkpoint(LocalFolder(tmp_path / "base"))
        counted = replace(base, tensors=Counted(base.tensors))
        monkeypatch.setattr(
            "adapterkit.core.inputs.base_door.open_checkpoint",
            lambda folder, number, counted=counted: counted,
        )
        plan_merge(
            kind_of(LocalFolder(tmp_path / "base")),
            [(LocalFolder(tmp_path / str(len(modules))), 1.0)],
            MergeOptions(),
        )
        passes.append(counted.tensors.passes)
        model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    assert passes[0] == passes[1] > 0
