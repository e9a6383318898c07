"""diff against dense float64 references; what counts as the same and what does not; adapters by
their deltas; memory; statuses."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from adapterkit import diff
from adapterkit.kernels import compare
from adapterkit.verbs.look.tables import diff_table
from tests.support import oracle
from tests.support.differences import DTYPES, decaying, normal, only, rank_of

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_estimated_rank_is_never_too_small_and_marked_above_128(pair):
    a = normal(700, 800)
    flat = normal(700, 100, seed=3) @ normal(100, 800, seed=4) + 0.3 * normal(700, 800, seed=5)
    rank = only(diff(*pair({"w": a}, {"w": a + flat}), rank_for_energy=0.8))["rank"]
    assert rank_of(flat, 0.8) <= rank["needed"] <= 128
    full = diff(*pair({"w": a}, {"w": a + normal(700, 800, seed=6)}))
    assert only(full)["rank"] == {"energy": 0.9, "needed": None, "above": 128, "estimate": True}
    assert (
        diff_table(full)[1].endswith(" >128")
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


def test_the_total_change_is_that_of_all_differing_tensors(pair, llama, lora, tmp_path):
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


def test_equal_values_in_other_bytes_are_distinguished_from_identical_ones(pair):
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
    assert not document["same"] and diff_table(document)[1].split()[-5:] == [
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
        and " inf " in diff_table(document)[1]
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
    assert only(document)["differing"] == pytest.approx(2 / 6) and diff_table(document)[1].split()[
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
    lines = "\n".join(diff_table(document))
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


def test_no_common_key_is_reported(pair):
    document = diff(*pair({"model.w": normal(3)}, {"w": normal(3)}))
    assert not document["same"] and "no key is in both" in document["notes"][0]
