"""diff against dense float64 references; what counts as the same and what does not; adapters by
their deltas; memory; statuses."""

import json
import math
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit import diff
from adapterkit.cli import main
from adapterkit.errors import Damaged, MultipleErrors, Refused
from adapterkit.kernels import compare
from adapterkit.reports.differences import table
from tests.support import oracle

ROOT = Path(__file__).parents[2]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pair(tmp_path):
    """Two files of these tensors, and their paths."""

    def save(a, b):
        for name, tensors in (("a", a), ("b", b)):
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors"
            )
        return tmp_path / "a.safetensors", tmp_path / "b.safetensors"

    return save


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def decaying(rows, columns, seed=1):
    """A matrix whose singular values fall by a quarter each."""
    k = min(rows, columns)
    u, v = (
        torch.linalg.qr(normal(rows, k, seed=seed).double()).Q,
        torch.linalg.qr(normal(columns, k, seed=seed + 1).double()).Q,
    )
    return u * 0.75 ** torch.arange(k) @ v.T


def rank_of(d, energy):
    """The smallest rank that holds the share of ‖D‖², from a full decomposition."""
    squares = torch.linalg.svdvals(d.double()).square()
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1


def only(document):
    (row,) = document["changed"]
    return row


def called(*words):
    return click.testing.CliRunner().invoke(main, ["diff", *map(str, words)])


def run(*words):
    """As a process: a refusal ends it."""
    command = [sys.executable, "-m", "adapterkit", "diff", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (700,),
        (300_000,),
        (1, 9),
        (9, 1),
        (130, 40),
        (700, 600),
        (40, 3000),
        (3, 600, 40),
        (20, 6, 3, 3),
        (2, 200_000),
    ],
)
def test_numbers_are_those_of_a_dense_float64_reference(dtype, shape, pair):
    a = normal(*shape, dtype=DTYPES[dtype])
    b = (a.double() + 0.1 * normal(*shape, seed=1).double() * (normal(*shape, seed=2) > 0.5)).to(
        a.dtype
    )
    b = b if shape else a + 1
    row = only(diff(*pair({"w": a}, {"w": b})))
    d, norm = (b.double() - a.double()), float(a.double().norm())
    assert row["relative_error"] == pytest.approx(float(d.norm()) / norm, rel=1e-12)
    assert row["max_abs"] == float(d.abs().max()) and row["norm"] == pytest.approx(norm, rel=1e-12)
    assert row["cosine"] == pytest.approx(
        float((a.double() * b.double()).sum() / (norm * b.double().norm())), rel=1e-12
    )
    assert row["differing"] == float((a != b).double().mean())
    # wider ones get no sketch
    matrix = len(shape) > 1 and shape[0] > 1 and 1 < math.prod(shape[1:]) <= 2**17
    assert (row["rank"] is not None) == matrix


@pytest.mark.parametrize("dtype", ["F64", "F32"])
@pytest.mark.parametrize(
    ("shape", "exact"),
    [((300, 30), True), ((260, 512), True), ((100, 700), True), ((260, 540), False)],
)
def test_the_suggested_rank_is_that_of_a_full_decomposition(shape, exact, dtype, pair):
    a = normal(*shape, dtype=DTYPES[dtype])
    b = (a + decaying(*shape)).to(a.dtype)
    for energy in (0.5, 0.9, 0.999):
        rank = only(diff(*pair({"w": a}, {"w": b}), rank_for_energy=energy))["rank"]
        assert rank == {
            "energy": energy,
            "needed": rank_of(b - a, energy),
            "above": None,
            "estimate": not exact,
        }


def test_an_estimated_rank_is_never_too_small_and_says_when_it_is_above_128(pair):
    a = normal(700, 800)
    flat = normal(700, 100, seed=3) @ normal(100, 800, seed=4) + 0.3 * normal(700, 800, seed=5)
    rank = only(diff(*pair({"w": a}, {"w": a + flat}), rank_for_energy=0.8))["rank"]
    assert rank_of(flat, 0.8) <= rank["needed"] <= 128
    full = diff(*pair({"w": a}, {"w": a + normal(700, 800, seed=6)}))
    assert only(full)["rank"] == {"energy": 0.9, "needed": None, "above": 128, "estimate": True}
    assert (
        table(full)[1].endswith(" >128")
        and only(diff(*pair({"w": a}, {"w": a + flat}), rank_for_energy=0))["rank"] is None
    )


def test_a_sketch_finds_the_singular_values_of_a_low_rank_matrix():
    d = decaying(300, 600) @ decaying(600, 20, seed=5) @ normal(20, 700, dtype=torch.float64)
    sketch = compare.Sketch(700, torch.float64)
    for first in range(0, 300, 90):
        sketch.add(d[first : first + 90], first)
    gram = compare.Gram(700, sketch.basis())
    for first in range(0, 300, 70):
        gram.add(d[first : first + 70])
    torch.testing.assert_close(
        gram.values()[:20], torch.linalg.svdvals(d)[:20], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("columns", [60, 600])
def test_a_stack_of_experts_gets_one_rank_for_all(columns, pair):
    """The smallest r for which the best rank-r matrix of each expert together hold the energy."""
    a = normal(3, 200, columns)
    b = a.clone()
    b[0] += normal(200, 5, seed=1) @ normal(5, columns, seed=2)
    b[2] += 0.2 * normal(200, 30, seed=3) @ normal(30, columns, seed=4)
    squares = sum(
        torch.linalg.svdvals((y - x).double()).square() for x, y in zip(a, b, strict=True)
    )
    needed = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    assert (
        only(diff(*pair({"mlp.experts.up": a}, {"mlp.experts.up": b})))["rank"]["needed"] == needed
    )
    assert only(diff(*pair({"conv": a}, {"conv": b})))["rank"]["needed"] == rank_of(
        (b - a).flatten(1), 0.9
    )


def test_the_whole_change_is_that_of_all_that_differs(pair, llama, lora, tmp_path):
    """Tensors within the tolerance and changed ones, equal ones left out."""
    a = {name: normal(20, 30, seed=i) for i, name in enumerate("xyz")}
    b = {"x": a["x"] + 0.01, "y": a["y"] * 3, "z": a["z"]}
    before, after = (torch.cat([side[name].double().flatten() for name in "xy"]) for side in (a, b))
    for document in (diff(*pair(a, b)), diff(*pair(a, b), tolerance=0.5)):
        assert document["change"]["norm"] == pytest.approx(float((after - before).norm()), rel=1e-6)
        assert document["change"]["relative"] == pytest.approx(
            float((after - before).norm() / before.norm()), rel=1e-6
        )
    assert diff(*pair(a, a))["change"] == {"norm": None, "relative": None}
    assert diff(*pair({"x": torch.zeros(3)}, {"x": torch.ones(3)}))["change"] == {
        "norm": pytest.approx(3**0.5),
        "relative": None,
    }
    doubled = oracle.edit_config(
        lora,
        tmp_path / "doubled",
        lora_alpha=2 * json.loads((lora / "adapter_config.json").read_text())["lora_alpha"],
    )
    assert diff(lora, doubled)["change"]["relative"] == pytest.approx(1.0, rel=1e-6)


# -- what is the same ------------------------------------------------------------------------------


def test_resharded_copies_are_the_same(llama, tmp_path):
    oracle.save_base(oracle.load(oracle.llama, llama), tmp_path, "bf16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    document = diff(llama, tmp_path)
    keys = len(load_file(llama / "model.safetensors"))
    assert (
        document["same"]
        and document["totals"]["identical"] == document["totals"]["compared"] == keys
    )


@pytest.mark.parametrize(
    ("wide", "narrow"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32"), ("F16", "BF16")]
)
def test_a_rounded_copy_is_the_same_both_ways(wide, narrow, pair):
    a = normal(600, 700, dtype=DTYPES[wide])
    b = a.to(DTYPES[narrow])
    for one, other in ((a, b), (b, a)):
        document = diff(*pair({"w": one}, {"w": other}))
        assert document["same"] and document["totals"]["rounded"] == 1


def test_a_copy_that_is_not_the_rounded_one_is_changed(pair):
    a = normal(600, 700)
    cut = a.view(torch.int32).bitwise_and(-65536).view(torch.float32).bfloat16()  # towards zero
    assert not torch.equal(cut, a.bfloat16())
    row = only(diff(*pair({"w": a}, {"w": cut})))
    assert row["why"] == "values" and (row["a"]["dtype"], row["b"]["dtype"]) == ("F32", "BF16")
    assert row["relative_error"] == pytest.approx(
        float((cut.double() - a.double()).norm() / a.double().norm())
    )
    late = a.bfloat16()
    late[-1, -1] *= 1.01
    assert not diff(*pair({"w": a}, {"w": late}))["same"]


def test_a_value_that_overflowed_was_not_rounded(pair):
    a = torch.tensor([1.0, 1e6, math.inf])
    assert not diff(*pair({"w": a}, {"w": a.half()}))["same"]
    a[1] = 1e4
    assert diff(*pair({"w": a}, {"w": a.half()}))["same"]


@pytest.mark.parametrize(
    "dtype", [*DTYPES.values(), torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint8]
)
def test_one_flipped_bit_is_found(dtype, pair):
    a = {"v": normal(50).float(), "w": (10 * normal(300, 1100)).to(dtype), "x": normal(50).float()}
    files = pair(a, a)
    assert diff(*files)["totals"]["identical"] == 3
    data = files[1].read_bytes()
    where = data.index(a["w"].view(torch.uint8).numpy().tobytes())
    size = a["w"].numel() * dtype.itemsize
    for byte, bit in ((0, 0), (size // 2, 3), (size - dtype.itemsize, 0)):
        flipped = bytearray(data)
        flipped[where + byte] ^= 1 << bit
        files[1].write_bytes(flipped)
        row = only(diff(*files))
        assert (row["name"], row["why"], row["differing"]) == ("w", "values", 1 / a["w"].numel())
        assert (row["relative_error"] is None) == (dtype not in DTYPES.values())


def test_equal_values_in_other_bytes_are_told_from_identical_ones(pair):
    """-0 and 0, and NaNs of two kinds."""
    a = torch.tensor([0.0, math.nan, 2.0])
    b = torch.tensor([-0.0, 0.0, 2.0])
    b.view(torch.int32)[1] = 0x7FC00001
    assert math.isnan(b[1])
    document = diff(*pair({"w": a}, {"w": b}))
    assert document["same"] and document["totals"]["equal"] == 1


def test_nan_on_one_side_is_a_change_without_a_number(pair):
    a, b = normal(40, 30), normal(40, 30)
    a[0, 0] = b[0, 0] = math.nan
    a[1, 1] = b[1, 1] = math.inf
    assert diff(*pair({"w": a}, {"w": b}))["totals"]["identical"] == 1
    b[2, 2] += 1
    row = only(diff(*pair({"w": a}, {"w": b})))
    assert (
        row["max_abs"] == pytest.approx(1)
        and row["differing"] == 1 / 1200
        and row["rank"]["needed"] == 1
    )
    rest = a.masked_fill(~a.isfinite(), 0)
    assert row["relative_error"] == pytest.approx(1 / float(rest.norm()), rel=1e-6)
    b[3, 3] = math.nan
    document = diff(*pair({"w": a}, {"w": b}), tolerance=1e9)
    row = only(document)
    assert (
        row["relative_error"] is row["max_abs"] is row["cosine"] is row["rank"] is None
        and row["differing"] == 2 / 1200
    )
    assert not document["same"] and table(document)[1].split()[-5:] == [
        "nan",
        "-",
        "-",
        "0.17%",
        "-",
    ]
    json.dumps(document, allow_nan=False)


def test_from_zero_the_error_is_infinite(pair):
    document = diff(*pair({"w": torch.zeros(3, 3)}, {"w": torch.eye(3)}))
    assert (
        only(document)["relative_error"] is None
        and only(document)["norm"] == 0
        and " inf " in table(document)[1]
    )


def test_tolerance_is_a_relative_error_per_tensor(pair):
    a = {"u": normal(30, 30), "w": normal(30, 30)}
    files = pair(a, {"u": a["u"] * 1.001, "w": a["w"] * 1.1})
    assert only(diff(*files, tolerance=0.01))["name"] == "w"
    document = diff(*files, tolerance=0.2)
    assert document["same"] and document["totals"]["within"] == 2 and document["changed"] == []
    assert len(diff(*files)["changed"]) == 2


def test_integers_differ_whatever_the_tolerance(pair):
    a = torch.arange(6)
    # every byte of two elements
    document = diff(*pair({"w": a}, {"w": a.where(a < 4, -1)}), tolerance=1e9)
    assert only(document)["differing"] == pytest.approx(2 / 6) and table(document)[1].split()[
        -5:
    ] == ["-", "-", "-", "33.33%", "-"]


def test_other_shapes_dtypes_and_keys_are_shown_as_such(pair):
    a = {
        "a": normal(4, 3),
        "b": normal(4, 3),
        "c": normal(2),
        "gone": normal(2),
        "e": torch.empty(0, 3),
    }
    b = {
        "a": normal(3, 4),
        "b": normal(4, 3).to(torch.float8_e4m3fn),
        "c": normal(2),
        "new": normal(5),
        "e": torch.empty(0, 3),
    }
    document = diff(*pair(a, b), tolerance=1e9)
    assert [(row["name"], row["why"], row["relative_error"]) for row in document["changed"]] == [
        ("a", "shape", None),
        ("b", "dtype", None),
    ]
    assert document["removed"] == [{"name": "gone", "kind": "tensor", "dtype": "F32", "shape": [2]}]
    assert document["added"] == [{"name": "new", "kind": "tensor", "dtype": "F32", "shape": [5]}]
    assert not document["same"] and document["totals"]["identical"] == 2
    lines = "\n".join(table(document))
    assert (
        "F32 4x3 -> F32 3x4" in lines
        and "F32 4x3 -> F8_E4M3" in lines
        and "- gone  F32 2" in lines
        and "+ new  F32 5" in lines
    )


def test_a_tensor_more_on_one_side_alone_is_a_difference(pair):
    a = {"a": normal(3)}
    assert (
        not diff(*pair(a, a | {"b": normal(3)}))["same"]
        and not diff(*pair(a | {"b": normal(3)}, a))["same"]
    )


def test_rows_come_in_file_order(pair):
    """The writer puts wide dtypes first; threads finish in any order."""
    a = {
        f"w{i}": normal(600 if i % 2 else 6, 600, dtype=torch.float16 if i < 4 else torch.float32)
        for i in range(8)
    }
    document = diff(*pair(a, {k: v * 2 for k, v in a.items()}))
    assert [row["name"] for row in document["changed"]] == [
        "w4",
        "w5",
        "w6",
        "w7",
        "w0",
        "w1",
        "w2",
        "w3",
    ]


def test_no_common_key_is_said(pair):
    document = diff(*pair({"model.w": normal(3)}, {"w": normal(3)}))
    assert not document["same"] and "no key is in both" in document["notes"][0]


# -- adapters --------------------------------------------------------------------------------------


def write_lora(folder, factors, alpha=8.0, extra=None, **config):
    """An adapter of (a, b) by module, as PEFT writes it."""
    folder.mkdir()
    rank = config.pop("r", None) or next(iter(factors.values()))[0].shape[0]
    tensors = dict(extra or {})
    for module, (a, b) in factors.items():
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(rank, seed=0, out=90, inputs=70, dtype=torch.float32):
    return normal(rank, inputs, seed=seed, dtype=dtype), normal(
        out, rank, seed=seed + 1, dtype=dtype
    )


def test_deltas_are_compared_as_a_dense_float64_reference_says(tmp_path):
    (a, b), (c, d) = factors(4), factors(7, seed=2)
    document = diff(
        write_lora(tmp_path / "a", {"m.q": (a, b)}, 8),
        write_lora(tmp_path / "b", {"m.q": (c, d)}, 3, use_rslora=True),
    )
    x, y = 2 * b.double() @ a.double(), 3 / math.sqrt(7) * d.double() @ c.double()
    row = only(document)
    assert document["kind"] == "adapters" and (row["name"], row["kind"]) == ("m.q", "delta")
    assert row["relative_error"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-12)
    assert row["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-12)
    assert row["norm"] == pytest.approx(float(x.norm()), rel=1e-12)
    assert row["rank"] == {
        "energy": 0.99,
        "needed": rank_of(x - y, 0.99),
        "above": None,
        "estimate": False,
    }
    assert row["a"] == {"rank": 4, "scale": 2.0, "shape": [90, 70]} and row["b"][
        "scale"
    ] == pytest.approx(3 / math.sqrt(7))
    assert document["config"] == [
        {"name": "r", "change": "changed", "a": 4, "b": 7, "decides": False},
        {"name": "lora_alpha", "change": "changed", "a": 8, "b": 3, "decides": False},
        {"name": "use_rslora", "change": "added", "a": None, "b": True, "decides": False},
    ]


def test_a_small_difference_of_deltas_is_not_lost_to_cancellation(tmp_path):
    a, b = factors(4, dtype=torch.float64)
    c = a.clone()
    c[1, 2] += 1e-9
    row = only(
        diff(write_lora(tmp_path / "a", {"q": (a, b)}), write_lora(tmp_path / "b", {"q": (c, b)}))
    )
    exact = float(b[:, 1].norm() * (c[1, 2] - a[1, 2]).abs() / (b @ a).norm())
    assert row["relative_error"] == pytest.approx(exact, rel=1e-4) and row["rank"]["needed"] == 1


def test_identical_factors_are_identical_and_other_factors_of_one_delta_are_the_same(tmp_path):
    """What float64 arithmetic leaves is no difference; what float32 factors leave is one, within a
    tolerance."""
    a, b = factors(4, dtype=torch.float64)
    first = write_lora(tmp_path / "first", {"q": (a, b)}, 8)
    assert diff(first, write_lora(tmp_path / "copy", {"q": (a, b)}, 8))["totals"]["identical"] == 1
    padded = (
        torch.nn.functional.pad(a, (0, 0, 0, 3)),
        torch.cat([b, normal(90, 3, dtype=torch.float64)], 1),
    )
    turn = torch.linalg.qr(normal(4, 4, dtype=torch.float64)).Q
    same = {
        "padded": write_lora(tmp_path / "padded", {"q": padded}, 14),
        "alpha": write_lora(tmp_path / "alpha", {"q": (a, b / 4)}, 32),
        "turned": write_lora(tmp_path / "turned", {"q": (turn @ a, b @ turn.T)}, 8),
    }
    for name, other in same.items():
        document = diff(first, other)
        assert document["same"] and document["totals"]["rounded"] == 1, name
    rounded = write_lora(tmp_path / "rounded", {"q": ((turn @ a).float(), (b @ turn.T).float())}, 8)
    assert (
        1e-9 < only(diff(first, rounded))["relative_error"] < 1e-6
        and diff(first, rounded, tolerance=1e-6)["same"]
    )
    assert not diff(first, write_lora(tmp_path / "scaled", {"q": (a, b)}, 8.001))["same"]
    cast = write_lora(tmp_path / "cast", {"q": (a.bfloat16(), b.bfloat16())}, 8)
    assert diff(first, cast)["totals"]["rounded"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite(value, tmp_path):
    a, b = factors(4)
    broken = a.clone()
    broken[0, 0] = value
    first, other = (
        write_lora(tmp_path / "a", {"q": (a, b)}),
        write_lora(tmp_path / "b", {"q": (broken, b)}),
    )
    document = diff(first, other, tolerance=1e9)
    assert (
        only(document)["relative_error"] is None
        and only(document)["rank"] is None
        and " nan " in table(document)[1]
    )
    assert diff(other, other)["totals"]["identical"] == 1


def test_zero_deltas_are_equal_whatever_a_holds(tmp_path):
    a, b = factors(4)
    first = write_lora(tmp_path / "a", {"q": (a, b * 0)})
    assert diff(first, write_lora(tmp_path / "b", {"q": (a * 2, b * 0)}))["same"]
    assert only(diff(first, write_lora(tmp_path / "c", {"q": (a, b)})))["relative_error"] is None


def test_stacks_of_experts(tmp_path):
    """a (experts * r, in), the expert slowest; b (out, r * experts), the expert fastest."""
    experts, found = 3, []
    settings = {"target_parameters": ["experts.up_proj"], "target_modules": [], "r": 4}
    for seed, name in ((0, "a"), (2, "b")):
        a, b = normal(12, 20, seed=seed), normal(30, 12, seed=seed + 1)
        write_lora(tmp_path / name, {"mlp.experts": (a, b)}, 8, **settings)
        dense = [
            2 * b.double().view(30, 4, experts)[:, :, e] @ a.double().view(experts, 4, 20)[e]
            for e in range(experts)
        ]
        found.append(torch.stack(dense))
    x, y = found
    row = only(diff(tmp_path / "a", tmp_path / "b"))
    assert row["a"]["experts"] == experts and row["relative_error"] == pytest.approx(
        float((x - y).norm() / x.norm()), rel=1e-12
    )
    assert row["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-12)


def test_what_only_one_adapter_has(lora, other_lora):
    document = diff(lora, other_lora)
    assert {row["name"] for row in document["changed"]} == {
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"
    }
    assert (
        document["totals"] | {"removed": 10, "added": 0, "changed": 4, "compared": 4}
        == document["totals"]
    )
    assert {row["kind"] for row in document["removed"]} == {"delta"}
    assert diff(other_lora, lora)["totals"]["added"] == 10


def trained(base, folder, seed=1, **config):
    folder.mkdir()
    oracle.train(
        oracle.load(oracle.llama, base),
        folder,
        seed=seed,
        **({"target_modules": ["q_proj"]} | config),
    )
    return folder


def test_magnitudes_biases_replaced_parameters_and_rows_are_compared(llama, tmp_path):
    """Of each kind one value is changed in the file, and that one alone is found."""
    parts = {
        "magnitude": (
            {"use_dora": True},
            "lora_magnitude_vector",
            "model.layers.0.self_attn.q_proj",
        ),
        "replaced": ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head.weight"),
        "rows": (
            {"trainable_token_indices": [5, 2, 9]},
            "trainable_tokens_delta",
            "model.embed_tokens",
        ),
    }
    for kind, (config, key, name) in parts.items():
        first = trained(llama, tmp_path / f"{kind}-a", **config)
        other = trained(llama, tmp_path / f"{kind}-b", **config)
        assert diff(first, other)["same"], kind
        path = other / "adapter_model.safetensors"
        tensors = load_file(path)
        full = next(k for k in tensors if key in k)
        before = tensors[full].double()
        tensors[full].view(-1)[0] += 1
        save_file(tensors, path)
        row = only(diff(first, other))
        assert (row["kind"], row["name"]) == (kind, name)
        error = (tensors[full].double() - before).norm() / before.norm()
        assert (
            row["relative_error"] == pytest.approx(float(error), rel=1e-9)
            and row["differing"] == 1 / before.numel()
        )


def test_a_bias_of_b_counts_with_its_scale(tmp_path):
    a, b = factors(4)
    bias = normal(90, seed=9)
    key = "base_model.model.q.lora_B.bias"
    first = write_lora(tmp_path / "a", {"q": (a, b)}, 8, {key: bias}, lora_bias=True)
    same = write_lora(tmp_path / "b", {"q": (a, b / 2)}, 16, {key: bias / 2}, lora_bias=True)
    other = write_lora(tmp_path / "c", {"q": (a, b / 2)}, 16, {key: bias}, lora_bias=True)
    assert diff(first, same)["same"]
    row = only(diff(first, other))
    assert row["kind"] == "bias" and row["relative_error"] == pytest.approx(1)


def test_token_rows_are_matched_by_their_token(tmp_path):
    values, part = normal(3, 6), factors(4)
    key = "base_model.model.embed.token_adapter.trainable_tokens_delta"

    def write(name, tokens, rows):
        return write_lora(
            tmp_path / name, {"q": part}, 8, {key: rows}, trainable_token_indices=tokens
        )

    first = write("a", [5, 2, 9], values)
    assert diff(first, write("turned", [9, 5, 2], values[[2, 0, 1]]))["totals"]["equal"] == 1
    assert not diff(first, write("swapped", [9, 5, 2], values))["same"]
    document = diff(
        first,
        write("more", [5, 7, 9, 2, 8], torch.cat([values[[0, 0, 2, 1]], values[:1]])),
        tolerance=1,
    )
    assert (
        only(document)["why"],
        only(document)["rows_only_a"],
        only(document)["rows_only_b"],
    ) == ("rows", 0, 2)
    assert not document["same"] and "(0 only in A, 2 only in B)" in table(document)[1]


def test_settings_that_differ_are_listed_and_those_that_change_the_arithmetic_decide(tmp_path):
    part = {"q": factors(4)}
    first = write_lora(
        tmp_path / "a",
        part,
        base_model_name_or_path="org/one",
        modules_to_save=[],
        init_lora_weights=True,
    )
    named = write_lora(
        tmp_path / "b", part, base_model_name_or_path="org/two", init_lora_weights="gaussian"
    )
    document = diff(first, named)
    assert document["same"] and [c["name"] for c in document["config"]] == [
        "base_model_name_or_path",
        "init_lora_weights",
    ]
    assert "base_model_name_or_path: 'org/one' -> 'org/two'  (does not count)" in table(document)
    deeper = write_lora(
        tmp_path / "c", part, layer_replication=[[0, 2], [1, 2]], base_model_name_or_path="org/two"
    )
    document = diff(named, deeper, tolerance=1e9)
    assert not document["same"] and diff(deeper, deeper)["same"]
    # what counts comes first
    assert table(document)[0] == "layer_replication: not set -> [[0, 2], [1, 2]]"
    assert not diff(first, write_lora(tmp_path / "tied", part, ensure_weight_tying=True))["same"]
    residual = write_lora(tmp_path / "d", part, init_lora_weights="pissa")
    document = diff(first, residual)
    assert not document["same"] and "had changed the base" in document["notes"][0]


def test_deltas_of_other_shapes_are_shown_as_such(tmp_path):
    first, other = (
        write_lora(tmp_path / "a", {"q": factors(4)}),
        write_lora(tmp_path / "b", {"q": factors(4, out=80)}),
    )
    document = diff(first, other, tolerance=1e9)
    assert (only(document)["why"], only(document)["relative_error"]) == (
        "shape",
        None,
    ) and not document["same"]
    assert "delta r 4 scale 2 90x70 -> r 4 scale 2 80x70" in table(document)[1]


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path):
    wrong = write_lora(tmp_path / "a", {"q": factors(4)}, r=8)
    with pytest.raises(Refused, match="rank 4"):
        diff(wrong, write_lora(tmp_path / "b", {"q": factors(4)}))


def test_a_kernel_is_no_other_kernel_of_its_size(tmp_path):
    """Nor a linear layer of as many inputs, whatever the flattened factors say."""
    a, b = factors(4, inputs=18)
    shapes = {"tall": (6, 3, 1), "wide": (6, 1, 3), "linear": (18,)}
    for name, (channels, *kernel) in shapes.items():
        write_lora(
            tmp_path / name,
            {"conv": (a.reshape(4, channels, *kernel), b.reshape(90, 4, *(1 for _ in kernel)))},
        )
    for other in ("wide", "linear"):
        document = diff(tmp_path / "tall", tmp_path / other, tolerance=1e9)
        assert only(document)["why"] == "shape" and not document["same"]
    assert only(document)["a"]["shape"] == [90, 6, 3, 1] and only(document)["b"]["shape"] == [
        90,
        18,
    ]
    assert diff(tmp_path / "tall", tmp_path / "tall")["same"]


# -- configs of models -----------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
UNKNOWN = {"model_type": "none-of-theirs", "hidden_size": 8}


@pytest.fixture
def models(tmp_path):
    """diff of two models with the same tensor and these configs; None: without."""

    def compare(a, b, **options):
        for name, config in (("a", a), ("b", b)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file({"w": normal(4, 4)}, tmp_path / name / "model.safetensors")
            (tmp_path / name / "config.json").unlink(missing_ok=True)
            if config is not None:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
        return diff(tmp_path / "a", tmp_path / "b", **options)

    return compare


def test_a_setting_that_changes_the_arithmetic_is_a_difference_whatever_the_tolerance(models):
    sub = {"text_config": {"rope_theta": 10000.0, "head_dim": 4}}
    for config in (LLAMA, UNKNOWN):
        document = models(
            config | sub,
            config | {"text_config": {"rope_theta": 500000, "head_dim": 4}},
            tolerance=1e9,
        )
        row = {
            "name": "text_config.rope_theta",
            "change": "changed",
            "a": 10000.0,
            "b": 500000,
            "decides": True,
        }
        assert (
            document["config"] == [row]
            and document["totals"]["identical"] == 1
            and not document["same"]
        )
        assert table(document) == ["text_config.rope_theta: 10000.0 -> 500000"]
    assert models(LLAMA | {"rms_norm_eps": 1}, LLAMA | {"rms_norm_eps": 1.0})["config"] == []


def test_settings_that_change_no_arithmetic_are_told_or_left_out(models):
    one = {
        "transformers_version": "4.40",
        "_name_or_path": "org/one",
        "use_cache": True,
        "torch_dtype": "float32",
    }
    other = {
        "transformers_version": "5.1",
        "use_cache": False,
        "dtype": "bfloat16",
        "attention_dropout": 0.1,
    }
    document = models(LLAMA | one, LLAMA | other)
    rows = [(row["name"], row["change"], row["decides"]) for row in document["config"]]
    assert rows == [
        ("torch_dtype", "removed", False),
        ("dtype", "added", False),
        ("attention_dropout", "added", False),
    ]
    assert document["same"] and "dtype: not set -> 'bfloat16'  (does not count)" in table(document)


def test_what_a_config_leaves_out_is_the_models_default(models):
    """Configs of several ages of transformers: added keys, other names for rope."""
    old = LLAMA | {"rope_theta": 500000.0}
    new = LLAMA | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "head_dim": 4,
    }
    document = models(old, new)
    assert (
        document["same"]
        and document["config"] == []
        and "llama's defaults in transformers" in document["notes"][0]
    )
    document = models(LLAMA, new)
    (row,) = document["config"]
    assert (
        row["name"] == "rope_parameters.rope_theta"
        and (row["a"], row["b"]) == (10000.0, 500000.0)
        and not document["same"]
    )
    mistral = {"model_type": "mistral"}
    assert not models(mistral, mistral | {"sliding_window": None})["same"]  # 4096, and none
    assert models(mistral, mistral | {"sliding_window": 4096})["same"]


def test_settings_of_a_model_that_transformers_does_not_know_or_refuses_are_compared_as_they_stand(
    models,
):
    refused = LLAMA | {"num_attention_heads": "many"}
    for config in (UNKNOWN, {}, refused, {"model_type": "detr", "backbone": "org/somewhere"}):
        document = models(config, config | {"qk_norm": False})
        assert document["config"] == [
            {"name": "qk_norm", "change": "added", "a": None, "b": False, "decides": True}
        ]
        assert not document["same"] and document["notes"] == []
        document = models(config | {"window": None}, config)
        assert table(document) == ["window: None -> not set"]
    other = models({"model_type": "llama"}, {"model_type": "mistral", "sliding_window": 8})
    assert [row["name"] for row in other["config"]] == ["model_type", "sliding_window"]


def test_settings_that_json_or_a_terminal_cannot_hold(models):
    odd = {"model_type": "none", "limits": [0.0, math.inf], "nan": math.nan}
    assert models(odd, odd)["same"]
    document = models(odd, odd | {"limits": [0.0, 1.0], "\u202ename": "\x1b[2J"})
    json.dumps(document, allow_nan=False)
    assert {row["name"]: row["a"] for row in document["config"]} == {
        "limits": [0.0, None],
        "\\u202ename": None,
    }
    for text in (*table(document), json.dumps(document, ensure_ascii=False)):
        assert text.isprintable()


def test_a_side_without_a_config_is_told(models):
    document = models(LLAMA, None)
    assert (
        document["same"]
        and document["config"] == []
        and document["notes"] == ["b has no config.json: settings are not compared"]
    )
    assert models(None, None)["notes"] == []


# -- merges ----------------------------------------------------------------------------------------


def test_a_merge_changes_what_the_adapter_targets_by_its_rank(cached_folder, tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 640}
    base = cached_folder(
        "wide", lambda folder: oracle.save_base(oracle.llama(**sizes), folder, "bf16")
    )
    oracle.train(
        oracle.load(lambda: oracle.llama(**sizes), base),
        tmp_path / "lora",
        r=3,
        target_modules=["q_proj", "down_proj"],
    )
    oracle.merge(base, tmp_path / "lora", out=tmp_path / "out", max_shard_size="500KB")
    document = diff(base, tmp_path / "out")
    ends = ("mlp.down_proj.weight", "self_attn.q_proj.weight")
    assert {row["name"] for row in document["changed"]} == {
        f"model.layers.{i}.{end}" for i in (0, 1) for end in ends
    }
    assert all(1 <= row["rank"]["needed"] <= 3 for row in document["changed"])
    assert document["totals"]["identical"] == document["totals"]["compared"] - 4
    assert document["totals"]["added"] == document["totals"]["removed"] == 0


# -- memory ----------------------------------------------------------------------------------------


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of memory is read from Linux's /proc",
)
def test_memory_does_not_grow_with_a_tensor(tmp_path, pair):
    """One tensor of 300 MB against its copy with a rank-one change, and against its rounded one."""
    diff(*pair({"w": normal(600, 600)}, {"w": normal(600, 600, seed=1)}))
    torch.manual_seed(0)
    w = torch.randn(19_200, 4_096)
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    save_file({"w": w}, files[0])
    save_file({"w": w.bfloat16()}, files[2])
    w += torch.linspace(1, 2, 19_200)[:, None]
    save_file({"w": w}, files[1])
    del w
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    assert (
        only(diff(files[0], files[1]))["rank"]["needed"] == 1 and diff(files[0], files[2])["same"]
    )
    assert peak() - before < 60


# -- the command line ------------------------------------------------------------------------------


def test_exit_statuses_and_streams(llama, lora, pair, tmp_path):
    a = normal(8, 8)
    files = pair({"w": a}, {"w": a + 1})
    done = called(files[0], files[0])
    assert (done.exit_code, done.stdout) == (0, "") and done.stderr.startswith(
        "same: 1 compared, 1 identical"
    )
    done = called(*files)
    assert done.exit_code == 1 and done.stdout.count("\n") == 2
    relative = 8 / float(a.double().norm())
    assert (
        done.stderr
        == f"different: 1 compared, 1 changed; ‖A−B‖/‖A‖ {relative:.3g} over what differs\n"
    )
    done = called(*files, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")
    assert (
        called(*files, "--tolerance", "9").exit_code == 0
        and called(*files, "--tolerance", "x").exit_code == 2
    )
    for words in ((llama, lora), (files[0], tmp_path / "nowhere"), (*files, "--tolerance", "-1")):
        done = run(*words, "--quiet")
        assert (
            (done.returncode, done.stdout) == (2, "")
            and "Error: " in done.stderr
            and "Traceback" not in done.stderr
        ), words
    refused = subprocess.run(
        [sys.executable, "-m", "adapterkit", "verify", str(llama)], capture_output=True, cwd=ROOT
    )
    assert refused.returncode == 1  # the other commands keep theirs


def test_a_bug_is_trouble_with_its_traceback_and_no_difference(pair, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("adapterkit.verbs.diff.diff", broken)
    done = called(*pair({"w": normal(3)}, {"w": normal(3)}))
    assert (
        (done.exit_code, done.stdout) == (2, "")
        and "Traceback" in done.stderr
        and "ZeroDivisionError: a bug" in done.stderr
    )


def test_json_is_the_verbs_document(pair):
    files = pair(
        {"w": normal(8, 8), "n": torch.full((2,), math.nan)},
        {"w": normal(8, 8, seed=1), "n": torch.ones(2)},
    )
    result = called(*files, "--json", "--rank-for-energy", "0.5")

    def refuse(word):
        raise AssertionError(word)  # NaN and Infinity are no JSON

    assert result.exit_code == 1 and json.loads(result.stdout, parse_constant=refuse) == diff(
        *files, rank_for_energy=0.5
    )
    assert json.loads(result.stdout)["diff"] == 1


def test_an_adapter_and_a_model_are_refused_and_their_files_are_not(llama, lora, tmp_path):
    with pytest.raises(Refused, match="lora is an adapter, llama is not"):
        diff(llama, lora)
    document = diff(llama / "model.safetensors", lora / "adapter_model.safetensors")
    assert (
        document["kind"] == "checkpoints"
        and document["totals"]["compared"] == 0
        and document["notes"]
    )
    assert diff(llama, llama / "model.safetensors")["same"]


def test_problems_of_both_sides_are_told(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"no header")
    with pytest.raises(MultipleErrors) as caught:
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(caught.value.errors) == 2 and all(
        isinstance(e, Damaged) for e in caught.value.errors
    )


def test_help_and_import_load_no_torch():
    code = (
        "import sys, click.testing, adapterkit\nfrom adapterkit.cli import main\n"
        "assert click.testing.CliRunner().invoke(main, ['diff', '--help']).exit_code == 0\n"
        "assert 'diff' in dir(adapterkit) and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
