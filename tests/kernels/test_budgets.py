"""What kernels cost the host on a GPU: launches and waits are budgets, counted on a pretended card.

A GPU works on pieces of eight million elements: what a smaller weight costs, each of them costs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.registry import members
from adapterkit.core.tasks.metrics import ChangeMetrics
from adapterkit.core.tasks.quantize import relative_error
from adapterkit.core.weights.codec import PlainWeight, QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels import block_sizes as pieces
from adapterkit.kernels import sums
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.quant import compensated, grid
from adapterkit.kernels.quant.stochastic import Draws, round_to
from adapterkit.verbs.init.methods.eva import Eva
from tests.support.card import DEVICE, Card, installed
from tests.support.quantized_llama import FORMS, few
from tests.support.usual import usual

pytestmark = pytest.mark.quick

KEY = "model.layers.0.mlp.up_proj"
SHAPE = 640, 3072  # two million elements
SOME = 320  # rows: a million elements, more than pieces of a CPU
MILLIONS = pieces.GPU / 1e6
# launches a million elements, and waits of a weight; to keep scales two encodings are compared
BUDGETS = {"decode": (5, 2), "encode": (5, 3), "keep": (12, 5), "sample": (23, 6)}
SEARCHED = BUDGETS | {"keep": (33, 4), "sample": (43, 6)}  # where several scales are tried


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02


def spent(work: Callable[[], object], card: Card) -> tuple[int, int]:
    """Launches and waits, once tables are there."""
    work()
    launches, waits = card.launches, card.waits
    work()
    assert not card.races
    return card.launches - launches, card.waits - waits


def written(codec: str, to: str, shape: tuple[int, ...]) -> QuantizedWeight:
    plain = PlainWeight(f"{KEY}.weight", shape, "BF16")
    return members("codecs")[codec].for_encoding(to, plain, {})


def stored_in(form: str, weight: Tensor, folder: Path) -> tuple[QuantizedWeight, dict[str, Tensor]]:
    chosen = FORMS[form]
    made = chosen.make(weight)
    parts = {KEY + ending: part.contiguous() for ending, part in made.items()}
    told = chosen.metadata(f"{KEY}.weight", made) if chosen.metadata else {}
    save_file(parts, folder / "model.safetensors", {"format": "pt"} | told)
    settings = {"quantization_config": chosen.settings} if chosen.settings else {}
    config = (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | settings | chosen.config
    )
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name, content in chosen.files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    (found,) = quantized_weights(decoded_view(open_checkpoint(LocalFolder(folder))).tensors)
    return found, parts


def over_budget(record: QuantizedWeight, weight: Tensor, stored: dict[str, Tensor]) -> list[str]:
    """Of decoding, and where it can be written of encoding, to nearest and sampled."""
    with installed(Card()) as card, torch.inference_mode():
        parts, w = {key: part.to(DEVICE) for key, part in stored.items()}, weight.to(DEVICE)
        draws = Draws.of(0, KEY)
        work: dict[str, Callable[[], object]] = {"decode": lambda: record.decode(parts)}
        if not record.read_only:
            work["keep"] = lambda: record.encode_keeping_scales(parts, w)
            if not (record.searches_scales or getattr(record, "indexed", False)):
                work["encode"] = lambda: record.encode(w)
        if record.rows_per_block and not record.read_only:
            few_rows, some = record.rows(parts, 0, SOME)
            changed = w.view(-1, w.shape[-1])[:SOME] * 1.001
            work["sample"] = lambda: few_rows.encode_keeping_scales(some, changed, draws)
        found, budgets = [], SEARCHED if record.searches_scales else BUDGETS
        for name, does in work.items():
            launches, waits = spent(does, card)
            if launches > budgets[name][0] * MILLIONS or waits > budgets[name][1]:
                found.append(f"{name}: {launches} launches, {waits} waits")
        return found


@pytest.mark.parametrize("form", few(FORMS))
def test_decoding_stays_within_the_claimed_memory(form: str, weight: Tensor, tmp_path: Path):
    record, stored = stored_in(form, weight, tmp_path)
    assert not over_budget(record, weight, stored)


TARGETS = [
    (name, to)
    for name, one in members("codecs").items()
    for to in (*one.targets, *one.image_targets)
]


# with the kernels of nf4, of w4a16 and of fp8
ALIKE = [("bnb4", "fp4"), ("compressed-tensors", "w8a16"), ("comfyui", "comfy-fp8")]


@pytest.mark.parametrize(("codec", "to"), usual(TARGETS, lambda one: one not in ALIKE))
def test_formats_that_are_written(codec: str, to: str, weight: Tensor):
    value = weight.view(2, SOME, 3072) if codec == "mxfp4" else weight  # of experts
    record = written(codec, to, tuple(value.shape))
    assert not over_budget(record, value, record.encode(value))


def test_a_budget_fails_where_pieces_are_those_of_a_cpu(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
):
    some = weight[:SOME]
    record = written("bnb4", "nf4", tuple(some.shape))
    stored = record.encode(some)
    monkeypatch.setattr(pieces, "GPU", grid.PIECE)
    assert {problem.partition(":")[0] for problem in over_budget(record, some, stored)} >= {
        "encode", "decode", "keep",
    }  # fmt: skip


def measured(weight: Tensor) -> dict[str, Callable[[], object]]:
    """What is asked of a whole weight."""
    other = weight * 1.01
    return {
        "norm": lambda: sums.norm(weight),
        "norm of columns": lambda: sums.norm(weight.T),
        "finite": lambda: sums.all_finite(weight),
        "relative error": lambda: relative_error(weight, other),
        "change": lambda: ChangeMetrics().compare(weight, other, other),
        "output norm": lambda: compensated.output_norm(weight, torch.eye(3072, device=DEVICE)),
    }


def test_a_measure_of_a_weight_waits_once(weight: Tensor, monkeypatch: pytest.MonkeyPatch):
    with installed(Card()) as card, torch.inference_mode():
        for name, does in measured(weight.to(DEVICE)).items():
            launches, waits = spent(does, card)
            assert waits == 1 and launches <= 25, name
        monkeypatch.setattr(pieces, "GPU", sums.PIECE)
        for name, does in measured(weight[:SOME].to(DEVICE)).items():
            assert spent(does, card)[0] > 25 or name == "finite"


class LargestResult(TorchDispatchMode):
    """Elements of the largest new tensor."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.most = max(self.most, result.numel())
        return result


def test_a_change_is_measured_without_copies_of_a_chunk(weight: Tensor):
    before, exact = weight[:SOME], weight[:SOME] * 1.01
    written = exact.bfloat16()
    with LargestResult() as results:
        ChangeMetrics().compare(before, exact, written)
    assert 0 < results.most <= 1 << 15  # what a core's cache keeps


COLUMNS = 128


@pytest.mark.parametrize(
    ("codec", "to"),
    usual([one for one in TARGETS if one[0] != "mxfp4"], lambda one: one not in ALIKE),
)
def test_a_column_with_compensation_has_few_launches_and_no_wait(
    codec: str, to: str, weight: Tensor
):
    value = weight[:COLUMNS, :COLUMNS].contiguous()
    record = written(codec, to, tuple(value.shape))
    stored = record.encode(value)
    with installed(Card()) as card, torch.inference_mode():
        parts = {key: part.to(DEVICE) for key, part in stored.items()}
        factor = compensated.factorize(torch.eye(COLUMNS, device=DEVICE))
        rounder, w = record.column_rounder(parts), value.to(DEVICE)
        launches, waits = card.launches, card.waits
        compensated.round_weight(w, factor, rounder)
    assert card.launches - launches <= 16 * COLUMNS
    assert card.waits - waits <= 4  # for the order of the columns, and tables


def test_numbers_of_many_values_wait_once():
    pairs = [(torch.randn(40, 2).double(), torch.randn(2, 30).double()) for _ in range(8)]
    with installed(Card()) as card, torch.inference_mode():
        products = [Product(left.to(DEVICE), right.to(DEVICE)) for left, right in pairs]
        s = torch.linspace(1, 0, 200).to(DEVICE)
        assert spent(lambda: algebra.gram(products), card)[1] == 1
        assert spent(lambda: algebra.rank_for_energy(s, 0.9), card)[1] == 1
        assert spent(lambda: Eva().ratios(8, s, s[:1]), card)[1] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_does_not_wait(dtype: torch.dtype, weight: Tensor):
    with installed(Card()) as card, torch.inference_mode():
        w = weight.to(DEVICE)
        launches, waits = spent(lambda: round_to(w, dtype, Draws(1)), card)
        assert not waits and launches <= 5 * MILLIONS
