"""Layouts of experts: PEFT's stacks of two versions, and each expert's own modules."""

import json
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit import combine, convert
from adapterkit.adapters.formats.detect import detect
from adapterkit.adapters.formats.modules.experts import (
    Stack,
    is_transposed,
    neutral_factors,
    split_experts,
    stack_experts,
    stacks_of,
    stored_factors,
)
from adapterkit.adapters.formats.modules.kinds import EXPERTS
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.tensors import Expression
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Refused
from adapterkit.core.plan import Plan
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.reader import TensorReader
from tests.support import oracle

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("peft", "peft-0.18", "peft-per-expert")
# adapters beside the model that they were made on, and its logits
FOLDERS = sorted(
    path.parent
    for name in LAYOUTS
    for path in (GOLDEN / name).glob("*/logits.safetensors")
    if path.parent.name.startswith(("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"))
)
EACH = [path.name for path in FOLDERS if path.parent.name == "peft-per-expert"]
FACTOR = re.compile(r"base_model\.model\.(.*)\.lora_([AB])\.weight")


@dataclass(frozen=True, eq=False, kw_only=True)
class Value(Expression):
    """A tensor as an expression."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def value(self, reader: TensorReader) -> Tensor:
        return self.tensor


def held(tensor: Tensor) -> Value:
    """The expression of a tensor."""
    dtype = dtypes.name_of(tensor.dtype)
    return Value(shape=tuple(tensor.shape), dtype=dtype, tensor=tensor)


READER: Any = None  # nothing is stored


def values(module: AdapterModule) -> tuple[Tensor, Tensor]:
    return module.parts["a"].value(READER).double(), module.parts["b"].value(READER).double()


def delta(module: AdapterModule) -> Tensor:
    a, b = values(module)
    return module.scale * b @ a


def stacks_at(base: Path) -> dict[str, Stack]:
    checkpoint = open_checkpoint(LocalFolder(base), 0)
    return stacks_of(Names(checkpoint, task="CAUSAL_LM", build_model=True))


def modules_at(folder: Path) -> list[AdapterModule]:
    """The modules of an adapter without patterns, one for each pair of factors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    parts: dict[str, dict[str, Expression]] = {}
    for key, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        match = FACTOR.fullmatch(key)
        assert match
        parts.setdefault(match[1], {})[match[2].lower()] = held(tensor)
    return [
        AdapterModule("", name, "lora", own, config["lora_alpha"], own["a"].shape[0])
        for name, own in parts.items()
    ]


@pytest.mark.parametrize("transpose", [False, True])
def test_layout_of_stacks(transpose: bool) -> None:
    """a counts (expert, rank) and b (rank, expert): PEFT's einsum of both versions."""
    torch.manual_seed(0)
    experts, rank, x, y = 3, 2, 5, 4
    a, b = torch.randn(experts * rank, x), torch.randn(y, rank * experts)
    parts = neutral_factors(held(a), held(b), experts, transpose=transpose)
    module = AdapterModule("", "stack", EXPERTS, parts, 3.0, rank)
    stored = torch.einsum(
        "ore,eri->eoi", b.view(y, rank, experts), a.view(experts, rank, x)
    ).double()
    expected = stored.transpose(1, 2) if transpose else stored
    torch.testing.assert_close(delta(module), 1.5 * expected)
    again = stored_factors(parts, transpose=transpose)
    assert again == {"a": held(a), "b": held(b)} or (
        torch.equal(again["a"].value(READER), a) and torch.equal(again["b"].value(READER), b)
    )
    assert type(again["a"]) is type(again["b"]) is Value  # bytes are copied


def test_shapes_of_a_gated_pair_tell() -> None:
    hidden, inner = 8, 6
    pair = {"gate_up_proj": (3, hidden, 2 * inner), "down_proj": (3, inner, hidden)}
    assert is_transposed(pair) is False
    assert is_transposed({name: (e, y, x) for name, (e, x, y) in pair.items()}) is True
    square = {"gate_up_proj": (3, 8, 8), "down_proj": (3, 4, 8)}
    assert is_transposed(square) is False
    assert is_transposed({"gate_up_proj": (3, 8, 8)}) is None


# PEFT 0.21.2 leaves out the experts of qwen2_moe without a word: its table has heirs of that alone
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_as_peft_converts_them(kind: str) -> None:
    """The factors that PEFT makes of per-expert ones while it loads them, and their ranks."""
    folder = GOLDEN / "peft-per-expert" / kind
    stacks = stacks_at(folder / "base")
    modules = stack_experts(modules_at(folder), stacks.values(), READER)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    expected = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    ours = {m.name: m for m in modules if m.kind == EXPERTS}
    assert len(ours) == 2
    (home,) = {name.rpartition(".")[0] for name in ours}
    for leaf, key in (("gate_up_proj", f"{home}.base_layer"), ("down_proj", home)):
        own = stored_factors(ours[f"{home}.{leaf}"].parts, transpose=False)
        for role, name in (("a", "lora_A"), ("b", "lora_B")):
            theirs = expected[f"base_model.model.{key}.{name}.weight"]
            assert torch.equal(own[role].value(READER), theirs), (leaf, role)
        assert ours[f"{home}.{leaf}"].scale == 1.5
    assert ours[f"{home}.gate_up_proj"].rank == 4


@pytest.mark.parametrize("kind", EACH)
def test_back_from_a_stack(kind: str) -> None:
    """The same modules, of the same ranks and bytes."""
    folder = GOLDEN / "peft-per-expert" / kind
    stacks, source = stacks_at(folder / "base"), modules_at(folder)
    stacked = stack_experts(source, stacks.values(), READER)
    again = {m.name: m for m in split_experts(stacked, stacks, READER)}
    assert again.keys() == {m.name for m in source}
    for module in source:
        own = again[module.name]
        assert (own.rank, own.scale) == (module.rank, module.scale)
        assert all(map(torch.equal, values(own), values(module)))


@pytest.mark.parametrize("kind", EACH)
def test_shared_a_stays_one(kind: str) -> None:
    """A stack that was trained as one keeps its rank: apart, gate and up share a, and together they
    are one again."""
    stacks = stacks_at(GOLDEN / "peft-per-expert" / kind / "base")
    torch.manual_seed(0)
    stacked = []
    for stack in stacks.values():
        experts, out, width = stack.shape
        parts: dict[str, Expression] = {
            "a": held(torch.randn(experts, 2, width)), "b": held(torch.randn(experts, out, 2)),
        }  # fmt: skip
        stacked.append(AdapterModule("", stack.name, EXPERTS, parts, 3.0, 2))
    apart = split_experts(stacked, stacks, READER)
    assert {m.rank for m in apart} == {2}
    for stack, module in zip(stacks.values(), stacked, strict=True):
        whole = delta(module)
        own = {m.name: m for m in apart}
        for piece in stack.pieces:
            expected = whole[piece.expert, piece.rows.start : piece.rows.stop]
            torch.testing.assert_close(delta(own[piece.module]), expected)
    again = {m.name: m for m in stack_experts(apart, stacks.values(), READER)}
    for module in stacked:
        assert again[module.name].rank == 2
        assert all(map(torch.equal, values(again[module.name]), values(module)))


def test_ranks_and_scales_of_single_experts() -> None:
    """Experts of other ranks and scales: the largest rank, the delta unchanged."""
    folder = GOLDEN / "peft-per-expert" / "mixtral"
    stacks = stacks_at(folder / "base")
    source = []
    for number, module in enumerate(modules_at(folder)):
        a, b = values(module)
        rank = 1 + number % 2
        parts: dict[str, Expression] = {"a": held(a[:rank]), "b": held(b[:, :rank])}
        source.append(AdapterModule("", module.name, "lora", parts, 3.0 + number % 3, rank))
    expected = {m.name: delta(m) for m in source}
    stacked = stack_experts(source, stacks.values(), READER)
    for stack in stacks.values():
        module = next(m for m in stacked if m.name == stack.name)
        whole = delta(module)
        for piece in stack.pieces:
            own = whole[piece.expert, piece.rows.start : piece.rows.stop]
            torch.testing.assert_close(own, expected[piece.module])


def test_missing_experts_are_zeros() -> None:
    folder = GOLDEN / "peft-per-expert" / "qwen3_moe"
    stacks = stacks_at(folder / "base")
    source = [m for m in modules_at(folder) if ".1." not in m.name and "up_proj" not in m.name]
    stacked = stack_experts(source, stacks.values(), READER)
    down, gate = (
        next(m for m in stacked if m.name.endswith(end)) for end in ("down_proj", "up_proj")
    )
    assert not delta(down)[1].any() and delta(down)[0].any()
    assert not delta(gate)[:, 6:].any() and delta(gate)[0, :6].any()
    assert gate.rank == 2
    whole = split_experts(stacked, stacks, READER, complete=True)
    names = {p.module for stack in stacks.values() for p in stack.pieces}
    assert {m.name for m in whole if ".experts." in m.name} == names
    assert math.isclose(
        sum(float(delta(m).square().sum()) for m in whole),
        sum(float(delta(m).square().sum()) for m in source),
    )


def test_unsupported_experts_are_refused() -> None:
    """More than factors on an expert, and stacks that the base's file has as stacks."""
    folder = GOLDEN / "peft-per-expert" / "mixtral"
    stacks = stacks_at(folder / "base")
    source = modules_at(folder)
    for number in (0, 1):
        module = source[number]
        source[number] = AdapterModule(
            "", module.name, "lora", {**module.parts, "magnitude": held(torch.ones(8))}, 3.0, 2
        )
    with pytest.raises(Refused) as refused:
        stack_experts(source, stacks.values(), READER)
    assert "magnitude" in str(refused.value) and source[1].name in str(refused.value)
    oss = stacks_at(GOLDEN / "peft" / "gpt_oss" / "base")
    assert all(stack.transposed and not stack.pieces for stack in oss.values())
    parts: dict[str, Expression] = {"a": held(torch.ones(3, 2, 8)), "b": held(torch.ones(3, 24, 2))}
    module = AdapterModule("", "model.layers.0.mlp.experts.gate_up_proj", EXPERTS, parts, 3.0, 2)
    with pytest.raises(Refused, match="one stack in the base's file"):
        split_experts([module], oss, READER)


# -- files -----------------------------------------------------------------------------------------

SINGLE = ("mixtral", "qwen2_moe", "qwen3_moe")  # whose files keep each expert by itself


def case_of(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=case_of)
def test_golden_experts_are_detected_as_their_format(folder: Path) -> None:
    assert detect(LocalFolder(folder)).format.name == folder.parent.name


@pytest.mark.parametrize("folder", FOLDERS, ids=case_of)
def test_peft_multiplies_as_the_source(folder: Path, tmp_path: Path) -> None:
    """PEFT 0.21 on the converted file gives the logits that the source's own versions gave."""
    convert(folder, to="peft", out=tmp_path / "out", base=folder / "base")
    expected = load_file(folder / "logits.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", experts_implementation="eager", attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*(missing|unexpected)")
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    with torch.no_grad():
        logits = loaded(expected["tokens"][None]).logits[0]
    torch.testing.assert_close(logits, expected["adapted"], rtol=0, atol=2e-7)
    assert not torch.allclose(logits, expected["base"], atol=1e-3)


@pytest.mark.parametrize("folder", FOLDERS, ids=case_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_survive_the_round_trip(folder: Path, layout: str, tmp_path: Path) -> None:
    """Through every layout that the base has, and back: the same bytes, so no rank has grown."""
    if layout == "peft-per-expert" and not folder.name.startswith(SINGLE):
        with pytest.raises(Refused, match="one stack in the base's file"):
            convert(folder, to=layout, out=tmp_path / "there", base=folder / "base")
        return
    convert(folder, to=layout, out=tmp_path / "there", base=folder / "base")
    assert detect(LocalFolder(tmp_path / "there")).format.name == layout
    own = folder.parent.name
    convert(tmp_path / "there", to=own, out=tmp_path / "back", base=folder / "base")
    expected, actual = tensors_of(folder), tensors_of(tmp_path / "back")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    one, other = settings_of(folder), settings_of(tmp_path / "back")
    names = {key.rpartition(".lora_")[0] for key in expected}
    for name in names:
        scales = [scale_of(settings, name) for settings in (one, other)]
        assert math.isclose(*scales, rel_tol=1e-12), name


def scale_of(settings: dict[str, Any], key: str) -> float:
    """The scale of factors by PEFT's own rule for patterns."""
    name = key.removeprefix("base_model.model.")
    if name.endswith("experts.base_layer"):
        name = name.removesuffix("base_layer") + "gate_up_proj"
    elif name.endswith("experts"):
        name += ".down_proj"
    pattern = get_pattern_key
    rank = settings["rank_pattern"]
    alpha = settings["alpha_pattern"]
    r = rank.get(pattern(rank.keys(), name), settings["r"])
    a = alpha.get(pattern(alpha.keys(), name), settings["lora_alpha"])
    return a / (math.sqrt(r) if settings["use_rslora"] else r)


def test_without_a_base(tmp_path: Path) -> None:
    """What only the model can tell is refused; what the file tells is not."""
    stacks, old, each = (GOLDEN / name / "mixtral" for name in LAYOUTS)
    for folder, to in ((each, "peft"), (stacks, "peft-per-expert"), (stacks, "peft-0.18")):
        with pytest.raises(Refused, match="give --base"):
            convert(folder, to=to, out=tmp_path / "refused")
    convert(old, to="peft", out=tmp_path / "new")  # its shapes tell
    convert(tmp_path / "new", to="peft-0.18", out=tmp_path / "old", base=old / "base")
    assert all(
        torch.equal(tensor, tensors_of(tmp_path / "old")[key])
        for key, tensor in tensors_of(old).items()
    )


def test_a_square_stack_alone(tmp_path: Path) -> None:
    """Shapes do not tell: the version does, with the model; without both it is refused."""
    torch.manual_seed(0)
    folder = tmp_path / "square"
    folder.mkdir()
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    a, b = torch.randn(6, 8), torch.randn(8, 6)
    save_file({key.format("A"): a, key.format("B"): b}, folder / "adapter_model.safetensors")
    settings = settings_of(GOLDEN / "peft-0.18" / "qwen3_moe") | {
        "target_modules": [], "target_parameters": ["experts.gate_up_proj"],
    }  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(GOLDEN / "peft" / "qwen3_moe" / "base")
    config.moe_intermediate_size = 4
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def converted(version: str | None, base: Path | None, **options: Any) -> dict[str, Tensor]:
        (folder / "adapter_config.json").write_text(
            json.dumps(settings | {"peft_version": version})
        )
        out = tmp_path / f"{version}-{base is None}-{len(options)}"
        convert(folder, to="peft-per-expert" if base else "peft", out=out, base=base, **options)
        return tensors_of(out)

    new, old = converted("0.21.0", tmp_path / "base"), converted("0.18.1", tmp_path / "base")
    name = "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_{}.weight"
    assert torch.equal(new[name.format("A")], a[2:4])
    assert torch.equal(old[name.format("A")], b.view(8, 2, 3)[:, :, 1].T)
    assert torch.equal(old[name.format("B")], a[2:4].T[:4])
    told = converted(None, tmp_path / "base", expert_layout="peft-0.18")
    assert all(torch.equal(told[key], tensor) for key, tensor in old.items())
    with pytest.raises(Refused, match="leaves open which parameters"):
        converted("0.18.1", None)


def test_many_experts_read_their_stack_once(tmp_path: Path) -> None:
    """A stack of 12 as 12 modules, and back."""
    config = transformers.AutoConfig.from_pretrained(GOLDEN / "peft" / "qwen3_moe" / "base")
    config.num_experts = 12
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    oracle.train(
        model, tmp_path / "in", target_modules=[], target_parameters=["gate_up_proj", "down_proj"]
    )
    plan = convert(
        tmp_path / "in", to="peft-per-expert", out=tmp_path / "out", base=tmp_path / "base",
        dry_run=True,
    )  # fmt: skip
    assert isinstance(plan, Plan)
    tasks = [task for shard in plan.shards for task in shard.tasks]
    reads = Counter(spec for task in tasks for spec in task.reads)
    assert max(reads.values()) == 2  # gate and up share their a
    sizes = sum(spec.nbytes for spec in reads.elements())
    assert sizes <= 2 * (tmp_path / "in" / "adapter_model.safetensors").stat().st_size
    convert(tmp_path / "in", to="peft-per-expert", out=tmp_path / "out", base=tmp_path / "base")
    convert(tmp_path / "out", to="peft", out=tmp_path / "back", base=tmp_path / "base")
    expected, actual = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "back")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


# -- Megatron-Bridge -------------------------------------------------------------------------------


def test_stacks_of_megatron_bridge(tmp_path: Path) -> None:
    """a and b are in each other's place, and the columns of an expert are together: PEFT, which
    takes them otherwise, would mix the experts."""
    source = GOLDEN / "megatron-bridge" / "stacked"
    convert(source, to="peft", out=tmp_path / "out")
    truth = load_file(source / "truth.safetensors")
    tensors, settings = tensors_of(tmp_path / "out"), settings_of(tmp_path / "out")
    home = "model.language_model.layers.0.mlp.experts"
    for leaf, key in (("gate_up_proj", f"{home}.base_layer"), ("down_proj", home)):
        a, b = (truth[f"{home}.{leaf}.lora_{letter}.weight"] for letter in "AB")
        stored = (tensors[f"base_model.model.{key}.lora_{letter}.weight"] for letter in "AB")
        own_a, own_b = stored
        product = torch.einsum(
            "ore,eri->eoi", own_b.view(len(own_b), -1, 3), own_a.view(3, -1, a.shape[2])
        )
        torch.testing.assert_close(product, b @ a)
        assert scale_of(settings, f"base_model.model.{key}") == 1.5
    plain = "base_model.model.model.language_model.layers.0.self_attn.o_proj.lora_A.weight"
    assert torch.equal(tensors[plain], tensors_of(source)[plain])


def test_one_stack_of_megatron_bridge(tmp_path: Path) -> None:
    """No shapes of a pair tell, and none have to: of one parameter there is one order."""
    source, alone = GOLDEN / "megatron-bridge" / "stacked", tmp_path / "alone"
    alone.mkdir()
    tensors = {k: v for k, v in tensors_of(source).items() if "base_layer" not in k}
    save_file(tensors, alone / "adapter_model.safetensors")
    settings = settings_of(source)
    settings["target_parameters"] = settings["target_parameters"][:1]
    (alone / "adapter_config.json").write_text(json.dumps(settings))
    for folder in (source, alone):
        convert(folder, to="peft", out=tmp_path / f"{folder.name}-out")
    expected = tensors_of(tmp_path / "stacked-out")
    written = tensors_of(tmp_path / "alone-out")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in written.items())


def test_other_verbs_read_megatron_bridge_correctly(tmp_path: Path) -> None:
    """Without a conversion: the same factors as with one."""
    source = GOLDEN / "megatron-bridge" / "stacked"
    convert(source, to="peft", out=tmp_path / "peft")
    for name, adapter in (("one", source), ("two", tmp_path / "peft")):
        combine([adapter, adapter], out=tmp_path / name, method="linear")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["peft", "peft-per-expert"])
def test_other_exports_of_megatron_bridge_are_pefts(name: str) -> None:
    folder = GOLDEN / name / "megatron-bridge"
    truth = load_file(folder / "truth.safetensors")
    for key, tensor in tensors_of(folder).items():
        assert torch.equal(tensor, truth[key.removeprefix("base_model.model.")])
