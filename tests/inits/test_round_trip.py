"""Trained from an init that changes the base, and back on the original."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit.runtime import load
from tests.support import initialized, oracle
from tests.support.initialized import methods, needs_statistics
from tests.support.input_statistics import linear_modules, save_statistics
from tests.support.usual import usual

IDS = torch.arange(40).view(4, 10) % 31
LLAMA = type(oracle.llama())
RULES = {
    "alpha": {"alpha": 6},
    "rslora": {"rslora": True, "rank_for": ["v_proj=2"], "alpha_for": ["down_proj=3"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trips") / "base"
    oracle.save_base(oracle.llama(), folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def stats(base) -> Path:
    model, batch = oracle.llama(), {"input_ids": IDS, "labels": IDS}
    file = base.parent / "stats.safetensors"
    return save_statistics(model, linear_modules(model, ("_proj",)), [batch], file)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("method", "rule"),
    usual(
        [*((method, "alpha") for method in methods(changes_base=True)), ("pissa", "rslora")],
        lambda row: row != ("pissa", "alpha"),
    ),
)
def test_trained_and_back(method, rule, base, stats, tmp_path):
    """Five steps on the residual base in PEFT; the logits on the original are the trained ones,
    by `rebase`, and where no base was written by `merge` alone and in the runtime."""
    options = {"method": method, "rank": 4, "targets": "q_proj,v_proj,down_proj"} | RULES[rule]
    if needs_statistics(method):
        options["stats"] = stats
    out, implicit = tmp_path / "out", tmp_path / "implicit"
    adapterkit.init(base, out=out, **options)
    adapterkit.init(base, out=implicit, residual="implicit", **options)

    wrapped = initialized.load(LLAMA, out / "base", out / "adapter")
    trained = [parameter for name, parameter in wrapped.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected, original = logits(wrapped), logits(initialized.load(LLAMA, base))
    moved = float((expected - original).abs().max())
    assert moved > 1e-3

    def check(actual: torch.Tensor) -> None:
        assert float((actual - expected).abs().max()) < 1e-3 * moved + 1e-5

    with oracle.quiet():
        wrapped.save_pretrained(tmp_path / "trained")
    adapterkit.rebase(tmp_path / "trained", initial=out / "adapter", out=tmp_path / "plain")
    check(logits(initialized.load(LLAMA, base, tmp_path / "plain")))
    adapterkit.merge(base, [tmp_path / "plain"], out=tmp_path / "merged")
    check(logits(initialized.load(LLAMA, tmp_path / "merged")))
    # and on the base that is left, the trained adapter itself
    adapterkit.merge(out / "base", [tmp_path / "trained"], out=tmp_path / "residual")
    check(logits(initialized.load(LLAMA, tmp_path / "residual")))

    # without a second base: the same factors beside the same initial ones
    first, same = (load_file(f / "adapter/adapter_model.safetensors") for f in (out, implicit))
    assert all(torch.equal(first[key], same[key]) for key in first)
    shutil.copytree(implicit / "adapter", tmp_path / "kept")
    shutil.copy(tmp_path / "trained/adapter_model.safetensors", tmp_path / "kept")
    adapterkit.merge(base, [tmp_path / "kept"], out=tmp_path / "direct")
    check(logits(initialized.load(LLAMA, tmp_path / "direct")))
    adapterkit.rebase(tmp_path / "kept", out=tmp_path / "converted")
    check(logits(initialized.load(LLAMA, base, tmp_path / "converted")))
    model = initialized.load(LLAMA, base)
    load(model, tmp_path / "kept")
    check(logits(model))
