"""Every edit, combination method, init, format and type of adapter stays on a pretended card, and
gives there what it gives on the CPU."""

import math
from collections.abc import Callable
from dataclasses import replace
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numpy import array
from safetensors.torch import save_file
from torch import Tensor

import adapterkit
from adapterkit.adapters.formats import merged_deltas
from adapterkit.adapters.formats.merged_deltas import AddDelta
from adapterkit.adapters.formats.modules.deltas import ModuleDelta
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.tensors import from_spec
from adapterkit.adapters.kinds import merging
from adapterkit.adapters.kinds.boft import Boft
from adapterkit.adapters.kinds.hira import Hira
from adapterkit.adapters.kinds.hra import Hra
from adapterkit.adapters.kinds.ia3 import Ia3
from adapterkit.adapters.kinds.merging import ChangeRows
from adapterkit.adapters.kinds.miss import Miss
from adapterkit.adapters.kinds.oft import Oft
from adapterkit.adapters.kinds.rows import RowDelta
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.plan import RowEdit
from adapterkit.core.registry import members
from adapterkit.core.tasks import edits
from adapterkit.core.tasks.edits import (
    AddLikePeft,
    AddLowRank,
    AddVector,
    Assign,
    Band,
    Block,
    Decompose,
    PlacedFactors,
    ReplaceRows,
    RoundTo,
)
from adapterkit.core.weights.parameters import Parameter, StoredParameter, identity_slot
from adapterkit.kernels import dense
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.dare_ties import DareTies
from adapterkit.verbs.combine.methods.mean import Mean
from adapterkit.verbs.combine.tasks import combined_edit
from adapterkit.verbs.combine.tasks.combined_edit import AddCombined, WeightedDelta
from tests.support import kinds, methods, quantized_llama
from tests.support.card import DEVICE, Card, installed
from tests.support.usual import usual

CPU = torch.device("cpu")
OUT, IN, RANK, EXPERTS = 12, 10, 3, 2
STORED = {
    "w": (OUT, IN), "a": (RANK, IN), "b": (OUT, RANK), "vector": (OUT,), "magnitude": (OUT,),
    "columns": (IN,), "rows": (2, IN), "tokens": (2, OUT), "stack_a": (EXPERTS * RANK, IN),
    "stack_b": (OUT, RANK * EXPERTS), "oft": (IN // 2, 1), "boft": (1, IN // 2, 2, 2),
    "outputs": (OUT, 1), "inputs": (1, IN), "hra": (IN, RANK), "miss": (RANK, OUT),
    "bat": (OUT // 2, 2, 2),
}  # fmt: skip
INIT_STATISTICS = {"covariance", "gradient", "components", "variances", "variance"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    path = tmp_path_factory.mktemp("members")
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape).bfloat16() for key, shape in STORED.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return LocalFolder(path)


def specs_of(folder: LocalFolder) -> dict[str, TensorSpec]:
    return dict(open_checkpoint(folder).tensors)


def edits_of(s: dict[str, TensorSpec]) -> list[RowEdit]:
    """Each kind, and each of its ways to be stored."""
    columns, scattered = Band(0, IN), Band(0, OUT, range(OUT - 1, -1, -1))
    whole = Block(Band(0, OUT), columns)
    turned = Block(Band(2, 8, array([3, 1, 0]), array([3, 5, 6])), columns)
    factors = Factors(module="m", kind="module", a=s["a"], b=s["b"], scale=1.5, rank=RANK)
    term = PlacedFactors(factors, (whole,))
    other = PlacedFactors(replace(factors, scale=1.0), (turned,))
    stack = Factors(
        module="m",
        kind="module",
        a=s["stack_a"],
        b=s["stack_b"],
        scale=0.5,
        rank=RANK,
        experts=EXPERTS,
    )
    one = PlacedFactors(stack, (Block(Band(0, OUT), columns, 1),))
    add = AddLowRank((term,))
    made_of = lambda **keys: {role: from_spec(s[key]) for role, key in keys.items()}
    lora = AdapterModule("", "m", "lora", made_of(a="a", b="b"), alpha=1.0, rank=RANK)
    full = AdapterModule("", "m", "full", made_of(diff="w"), alpha=1.0, rank=1)
    parts = (WeightedDelta(0.7, (term,)), WeightedDelta(-0.4, other=ModuleDelta(full)))
    plain = (WeightedDelta(0.7, (term,)), WeightedDelta(0.4, (term,)))
    combined = lambda method: AddCombined(
        "m", parts if method.name == "dare_ties" else plain, (whole,), False, (OUT, IN), method, 0
    )
    chosen: list[RowEdit] = [
        add,
        AddLowRank((term, other, one)),
        AddLikePeft((term,), "BF16", True),
        AddDelta(ModuleDelta(lora), 0.5, Band(0, OUT)),
        AddDelta(ModuleDelta(full), 0.5, Band(0, OUT)),
        *(ChangeRows(((function, 1.0),), OUT) for function in functions_of(s)),
        ChangeRows(tuple((one, 0.5) for one in functions_of(s) if one.is_linear), OUT),
        AddVector(s["vector"], 0.5, scattered),
        RoundTo("BF16"),
        ReplaceRows(s["rows"], (1, 7)),
        ReplaceRows(s["tokens"], (0, 4), by_columns=True),
        Assign(s["w"], whole, False),
        Assign(s["w"], Block(Band(0, 4, array([5, 2, 9, 0]), array([0, 2, 1, 3])), columns), False),
        Decompose(s["magnitude"], Band(0, OUT), False, (add,)),
        Decompose(s["magnitude"], Band(0, OUT), False, (add,), of_stored=True),
        Decompose(s["columns"], columns, True, (add,)),
        combined(DareTies(0.5)),
        combined(Mean()),
    ]
    return chosen


def functions_of(s: dict[str, TensorSpec]) -> list[RowDelta]:
    """Each type of adapter whose delta is a function of the weight's rows."""
    weight = StoredParameter.of(
        Parameter("w", (OUT, IN), (identity_slot("w", (OUT, IN)),)), {"w": s["w"]}
    )
    chosen: list[RowDelta] = [
        Oft(s["oft"], weight, 2, None, 0.3, False),
        Oft(s["oft"], weight, 2, 5, None, False),
        Boft(s["boft"], s["outputs"], weight),
        Hra(s["hra"], weight, False, "m"),
        Hra(s["hra"], weight, True, "m"),
        Hira(s["a"], s["b"], weight),
        Ia3(s["outputs"], weight, False),
        Ia3(s["inputs"], weight, True),
        Miss(s["miss"], weight, True),
        Miss(s["bat"], weight, "bat"),
    ]
    known = {kind for kind in members("kinds").values() if issubclass(kind, RowDelta)}
    assert {type(one) for one in chosen} == known
    return chosen


def assigned(x: Tensor, at: Any, value: Any) -> None:
    raise AssertionError("an edit writes by indices")


def test_edits_on_a_gpu_need_no_sorting_index(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch):
    """A block is neither waited for nor written by an index for each element, which a GPU sorts in
    deterministic mode."""
    monkeypatch.setattr(Tensor, "__setitem__", assigned)
    specs, w = specs_of(folder), torch.randn(OUT, IN)
    chosen = edits_of(specs)
    known = vars(edits) | vars(combined_edit) | vars(merged_deltas) | vars(merging)
    everything = {c for c in known.values() if isinstance(c, type) and issubclass(c, RowEdit)}
    assert {type(edit) for edit in chosen} == {c for c in everything if not isabstract(c)}
    with Sources((folder,), {}) as sources, installed(Card()) as card, torch.inference_mode():
        for edit in chosen:
            results = []
            for device in (CPU, DEVICE):
                value = w.clone().to(device)
                loaded = edit.load(LocalReader(sources, device), specs["w"], (OUT, IN))
                launches, waits = card.launches, card.waits
                loaded.apply(value[:5], 0)
                loaded.apply(value[5:], 5)
                assert card.waits == waits and card.launches - launches <= 14, edit
                results.append(value.cpu())
            torch.testing.assert_close(results[1], results[0])
    assert not card.races


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_on_a_gpu_equal_the_cpu(name: str):
    torch.manual_seed(0)
    count = 2 if name == "slerp" else 4
    pairs = [(torch.randn(9, 3).double(), torch.randn(3, 14).double()) for _ in range(count)]
    weights, method = [0.4, 0.3, 0.2, 0.1][:count], methods.record(name)
    seen = [methods.covariance_of(b @ a) for b, a in pairs]
    dense = lambda x: (x.dense() if isinstance(x, Product) else x).cpu().float()
    results = []
    with installed(Card()), torch.inference_mode():
        for device in (CPU, DEVICE):
            products = [Product(b.to(device), a.to(device)) for b, a in pairs]
            if method.acts_on == "covariances":
                given = lambda which, device=device: seen[which].to(device)
                found = method.combine_covariances(products, weights, given)[0]
            else:
                found = methods.applied(method, products, weights)[0]
            results.append(dense(found))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", members("inits"))
def test_inits_on_a_gpu_equal_the_cpu(name: str):
    torch.manual_seed(0)
    method, x = members("inits")[name](), torch.randn(80, 30)
    given = {
        "covariance": x.T @ x / 80, "gradient": torch.randn(20, 30), "components": torch.eye(8, 30),
        "variances": torch.arange(8.0, 0, -1), "variance": torch.tensor([36.0]),
    }  # fmt: skip
    if not method.needs:
        pytest.skip("drawn, on the CPU: the same numbers everywhere")
    weight, results = torch.randn(20, 30), []
    with installed(Card()), torch.inference_mode():
        for device in (CPU, DEVICE):
            options: dict[str, Any] = {
                kind: given[kind].to(device) for kind in method.needs if kind in given
            }
            if method.draws:
                options["generator"] = torch.Generator().manual_seed(1)
            a, b = method.factors(weight.to(device), 4, 1.0, **options)
            results.append((b.to(device) @ a).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def same_there(verb: Callable[..., Any], *arguments: Any, out: Path, **options: Any) -> None:
    """The weights of an output made on the card are those made on the CPU."""
    verb(*arguments, out=out / "here", device="cpu", **options)
    with installed(Card()) as card:
        verb(*arguments, out=out / "there", device="cuda", **options)
    assert not card.races, card.races[:3]
    files = sorted((out / "here").glob("*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (out / "there" / path.name).read_bytes()


@pytest.mark.parametrize("name", usual(quantized_llama.FORMS, {"awq", "fp8-block"}))
def test_formats_are_decoded(name: str, tmp_path: Path, one_thread: None):
    quantized_llama.base(quantized_llama.FORMS[name], tmp_path / "base")
    same_there(adapterkit.dequantize, tmp_path / "base", out=tmp_path)


@pytest.mark.parametrize("to", ["fp4", "fp8"])
def test_formats_are_encoded(to: str, tmp_path: Path, one_thread: None):
    """Those of which there is no golden job; fp8 has blocks of 128."""
    sizes: dict[str, Any] = {"vocab_size": 80, "hidden_size": 128, "intermediate_size": 256}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    same_there(adapterkit.quantize, tmp_path / "base", out=tmp_path, to=to)


@pytest.mark.parametrize("kind", kinds.SIMPLE)
def test_types_of_adapters(
    kind: str, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dense, "THIN", math.inf)  # signs depend on the way to a QR
    case, base = kinds.SIMPLE[kind], tmp_path / "base"
    base.mkdir()
    torch.manual_seed(0)
    save_file(kinds.Net().state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapter = kinds.trained(case, base, tmp_path / "adapter")
    options = {"base": base} if case.base else {}
    same_there(adapterkit.resize, adapter, out=tmp_path, rank=2, **options)
