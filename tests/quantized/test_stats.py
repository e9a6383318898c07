"""LoftQ by what layers see: the best factors in ‖(W - Q - scale·b@a) C^½‖, by float64 from the
files and from a model's outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.errors import AdapterkitError, Damaged, Refused, Unrecoverable
from adapterkit.kernels.lowrank.weighted import project, root
from tests.support import oracle
from tests.support.loftq import MODELS, originals, products, values

RANK = 4
NAMES = ("llama", "gpt2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda name: cached_folder(
        f"stats-{name}", lambda folder: oracle.save_base(MODELS[name](), folder, "fp32")
    )


def inputs_of(name: str, base: Path) -> dict[str, Tensor]:
    """What each linear layer sees of some random texts, (tokens, in) float64."""
    model, actual = oracle.load(MODELS[name], base).float(), {}

    def watch(module: str) -> Callable:
        def hook(_, args: tuple) -> None:
            actual[module] = args[0].detach().double().flatten(0, -2)

        return hook

    for module, layer in model.named_modules():
        if type(layer).__name__ in ("Linear", "Conv1D") and not module.endswith("lm_head"):
            layer.register_forward_pre_hook(watch(module))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model(torch.randint(60, (24, 32), generator=generator))
    return actual


@pytest.fixture
def observed(base) -> Callable[[str], tuple[dict[str, Tensor], Path]]:
    """Inputs, and the file of their covariances."""

    def make(name: str) -> tuple[dict[str, Tensor], Path]:
        actual, path = inputs_of(name, base(name)), base(name).parent / f"{name}-stats.safetensors"
        if not path.exists():
            save_file(
                {
                    f"{module}.covariance": (x.T @ x / len(x)).float()
                    for module, x in actual.items()
                },
                path,
            )
        return actual, path

    return make


def outputs_lost(
    name: str, base: Path, quantized: Path, adapter: Path | None, xs: dict[str, Tensor]
) -> dict[str, float]:
    """‖(W - Q - scale·b@a) xᵀ‖ / ‖W xᵀ‖ of each module, (out, in)."""
    weights, packed = originals(base), values(quantized)
    deltas = products(name, adapter) if adapter else {}
    actual = {}
    for key, q in packed.items():
        w, rest = weights[key], weights[key] - q - deltas.get(key, 0)
        w, rest = (w.T, rest.T) if name == "gpt2" else (w, rest)
        x = xs[key.removesuffix(".weight")]
        actual[key] = float((rest @ x.T).norm() / (w @ x.T).norm())
    return actual


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_outputs(
    base, observed, name: str, iterations: int, tmp_path: Path
) -> None:
    xs, path = observed(name)
    how: dict[str, Any] = {"rank": RANK, "iterations": iterations}
    receipt: Any = adapterkit.loftq(base(name), out=tmp_path / "out", stats=path, **how)
    metrics = {
        key: metric for key, metric in receipt.data["parameters"].items() if "error_after" in metric
    }
    lost = outputs_lost(
        name, base(name), tmp_path / "out" / "base", tmp_path / "out" / "adapter", xs
    )
    adapterkit.loftq(base(name), out=tmp_path / "plain", **how)
    plain = outputs_lost(
        name, base(name), tmp_path / "plain" / "base", tmp_path / "plain" / "adapter", xs
    )
    assert metrics.keys() == lost.keys()
    for key, metric in metrics.items():
        assert metric["damping"] <= 1e-4
        assert metric["error_after"] == pytest.approx(lost[key], rel=5e-3), key
        assert metric["error_after"] < metric["error"] and lost[key] < plain[key], key
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_no_factors_of_that_rank_are_better(base, observed, name: str, tmp_path: Path) -> None:
    xs, path = observed(name)
    adapterkit.loftq(base(name), out=tmp_path / "out", stats=path, rank=RANK, iterations=1)
    packed, weights = values(tmp_path / "out" / "base"), originals(base(name))
    lost = outputs_lost(
        name, base(name), tmp_path / "out" / "base", tmp_path / "out" / "adapter", xs
    )
    for key, q in packed.items():
        x, w = xs[key.removesuffix(".weight")], weights[key]
        rest, w = ((weights[key] - q).T, w.T) if name == "gpt2" else (weights[key] - q, w)
        best = float(torch.linalg.svdvals(rest @ x.T)[RANK:].norm() / (w @ x.T).norm())
        assert best * (1 - 1e-6) <= lost[key] <= best * (1 + 1e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_for_a_base_that_stays(base, observed, name: str, tmp_path: Path) -> None:
    xs, path = observed(name)
    adapterkit.quantize(base(name), to="nf4", out=tmp_path / "nf4")
    receipt: Any = adapterkit.loftq(
        base(name), quantized_base=tmp_path / "nf4", stats=path, rank=RANK, out=tmp_path / "out"
    )
    lost = outputs_lost(name, base(name), tmp_path / "nf4", tmp_path / "out", xs)
    before = outputs_lost(name, base(name), tmp_path / "nf4", None, xs)
    metrics = {
        f"{module}.weight": metric
        for module, metric in receipt.data["parameters"].items()
        if "error_after" in metric
    }
    assert metrics.keys() == lost.keys()
    for key, metric in metrics.items():
        assert metric["error"] == pytest.approx(before[key], rel=5e-3)
        assert (
            metric["error_after"] == pytest.approx(lost[key], rel=5e-3) and lost[key] < before[key]
        )


def test_a_covariance_of_ones_is_no_change(base, tmp_path: Path) -> None:
    widths = {module: x.shape[1] for module, x in inputs_of("llama", base("llama")).items()}
    save_file(
        {f"{module}.covariance": 3 * torch.eye(width) for module, width in widths.items()},
        tmp_path / "one.safetensors",
    )
    actual = []
    for name, how in {"with": {"stats": tmp_path / "one.safetensors"}, "without": {}}.items():
        receipt: Any = adapterkit.loftq(
            base("llama"), out=tmp_path / name, rank=RANK, iterations=2, **how
        )
        actual.append(
            {
                key: metric["error_after"]
                for key, metric in receipt.data["parameters"].items()
                if "error_after" in metric
            }
        )
    assert actual[0] == pytest.approx(actual[1], rel=2e-4)


def test_roots_and_projections_of_covariances_are_accurate() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=generator, dtype=torch.float64) * torch.logspace(
        -2, 2, 40, dtype=torch.float64
    )
    c = x.T @ x / len(x)
    s, damping = root(c.float())
    mean = float(c.diagonal().mean())
    assert torch.equal(s, s.tril())
    assert torch.allclose(
        mean * (s.double() @ s.T.double()),
        c + damping * mean * torch.eye(40),
        atol=2e-6 * float(c.abs().max()),
    )
    for scale in (1e-20, 1e20):  # as with the next scale of the inputs
        assert torch.allclose(root((c * scale).float())[0], s, rtol=1e-4, atol=1e-5)
    few, more = root((x[:5].T @ x[:5]).float())  # singular
    assert bool(few.isfinite().all()) and more <= 1e-2
    w = torch.randn(30, 40, generator=generator)
    u = torch.linalg.qr(torch.randn(30, 3, generator=generator)).Q
    svd = project(u, w)
    assert torch.allclose((svd.u * svd.s) @ svd.vh, u @ (u.T @ w), atol=1e-4)
    assert torch.allclose(svd.u.T @ svd.u, torch.eye(3), atol=1e-5)


def changed(path: Path, out: Path, **tensors: Tensor | None) -> Path:
    stored = {**load_file(path), **tensors}
    save_file(
        {key: tensor.contiguous() for key, tensor in stored.items() if tensor is not None}, out
    )
    return out


QUERY = "model.layers.0.self_attn.q_proj.covariance"
BAD: dict[str, tuple[Callable[[Tensor], Tensor | None], type[AdapterkitError], str]] = {
    "missing": (lambda c: None, Refused, "no model.layers.0.self_attn.q_proj.covariance"),
    "of another width": (lambda c: c[:-1, :-1], Damaged, "127, 127"),
    "a vector": (lambda c: c[0], Damaged, "128, 128"),
    "integers": (lambda c: c.int(), Damaged, "I32"),
    "zeros": (torch.zeros_like, Unrecoverable, "zeros"),
    "not symmetric": (lambda c: c.triu() * 2, Unrecoverable, "not symmetric"),
    "negative": (lambda c: -c, Unrecoverable, "not positive"),
    "not finite": (
        lambda c: c.index_fill(0, torch.tensor([3]), torch.nan),
        Unrecoverable,
        "finite",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_invalid_covariances_are_refused(base, observed, what: str, tmp_path: Path) -> None:
    change, error, text = BAD[what]
    _, path = observed("llama")
    bad = changed(path, tmp_path / "bad.safetensors", **{QUERY: change(load_file(path)[QUERY])})
    with pytest.raises(error, match=text):
        adapterkit.loftq(base("llama"), out=tmp_path / "no", stats=bad, rank=RANK)
    assert not (tmp_path / "no").exists()


def test_modules_without_factors_need_none(base, observed, tmp_path: Path) -> None:
    _, path = observed("llama")
    some = changed(path, tmp_path / "some.safetensors", **{QUERY: None})
    adapterkit.loftq(
        base("llama"), out=tmp_path / "out", stats=some, rank=RANK, targets="v_proj", iterations=1
    )


def test_the_loftq_command_with_statistics(base, observed, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from adapterkit.cli import main

    words = [
        "loftq",
        str(base("llama")),
        "--rank",
        "4",
        "--stats",
        str(observed("llama")[1]),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
