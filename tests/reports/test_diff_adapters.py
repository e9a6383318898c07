"""diff of adapters: by their deltas, against dense float64; settings that change the arithmetic."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit import diff
from adapterkit.core.errors import Refused
from adapterkit.verbs.look.tables import diff_table
from tests.support.differences import factors, normal, only, rank_of, trained, write_lora

pytestmark = pytest.mark.usefixtures("one_thread")


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
        and " nan " in diff_table(document)[1]
    )
    assert diff(other, other)["totals"]["identical"] == 1


def test_zero_deltas_are_equal_whatever_a_holds(tmp_path):
    a, b = factors(4)
    first = write_lora(tmp_path / "a", {"q": (a, b * 0)})
    assert diff(first, write_lora(tmp_path / "b", {"q": (a * 2, b * 0)}))["same"]
    assert only(diff(first, write_lora(tmp_path / "c", {"q": (a, b)})))["relative_error"] is None


def test_stacks_of_experts(tmp_path):
    """a (experts * r, in), the expert slowest; b (out, r * experts), the expert fastest."""
    experts, actual = 3, []
    settings = {"target_parameters": ["experts.up_proj"], "target_modules": [], "r": 4}
    for seed, name in ((0, "a"), (2, "b")):
        a, b = normal(12, 20, seed=seed), normal(30, 12, seed=seed + 1)
        write_lora(tmp_path / name, {"mlp.experts": (a, b)}, 8, **settings)
        dense = [
            2 * b.double().view(30, 4, experts)[:, :, e] @ a.double().view(experts, 4, 20)[e]
            for e in range(experts)
        ]
        actual.append(torch.stack(dense))
    x, y = actual
    row = only(diff(tmp_path / "a", tmp_path / "b"))
    assert row["a"]["experts"] == experts and row["relative_error"] == pytest.approx(
        float((x - y).norm() / x.norm()), rel=1e-12
    )
    assert row["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-12)


def test_modules_of_one_adapter_alone_are_listed(lora, other_lora):
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
    assert not document["same"] and "(0 only in A, 2 only in B)" in diff_table(document)[1]


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
    assert "base_model_name_or_path: 'org/one' -> 'org/two'  (does not count)" in diff_table(
        document
    )
    deeper = write_lora(
        tmp_path / "c", part, layer_replication=[[0, 2], [1, 2]], base_model_name_or_path="org/two"
    )
    document = diff(named, deeper, tolerance=1e9)
    assert not document["same"] and diff(deeper, deeper)["same"]
    # what counts comes first
    assert diff_table(document)[0] == "layer_replication: not set -> [[0, 2], [1, 2]]"
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
    assert "delta r 4 scale 2 90x70 -> r 4 scale 2 80x70" in diff_table(document)[1]


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
