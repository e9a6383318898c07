"""Plain factors in place of other kinds of deltas: of full rank they are the delta, of a smaller
one the best approximation, with the error in the receipt."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.formats.modules.deltas import Fit, ModuleDelta
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.kernels.lowrank.algebra import Product
from tests.support import adapter_samples
from tests.support.adapter_samples import GOLDEN, contents_of
from tests.support.kinds import CASES, FULL, SIMPLE, Net, deltas, trained

FLUX2 = GOLDEN / "ai-toolkit" / "flux2_lokr.safetensors"


@pytest.fixture(autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def convert(source: Path, out: Path, **options) -> dict:
    """The metrics of a conversion."""
    return adapterkit.convert(source, out=out, hash="none", **options).data["parameters"]


def dense(module) -> torch.Tensor:
    """The delta of a module of stored tensors, float64."""
    value = ModuleDelta(module).value(_Tensors())
    return value.dense() if isinstance(value, Product) else value


class _Tensors:
    """Reads tensors of golden files."""

    def tensor(self, spec):
        return load_file(next(GOLDEN.rglob(spec.file)))[spec.key]


@pytest.mark.parametrize("case", [c for c in CASES if c.kind != "dora"], ids=str)
def test_at_full_rank_the_factors_are_the_adapter(case, base, tmp_path):
    """As PEFT merges both, with the head that was trained beside."""
    adapter = trained(case, base, tmp_path / "adapter")
    options = {"base": base} if case.base else {}
    metrics = convert(adapter, tmp_path / "out", to="peft", rank=FULL, **options)
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert {name for name, delta in want.items() if delta.any()} == set(actual)
    for name, delta in actual.items():
        assert torch.linalg.norm(delta - want[name]) <= 3e-6 * torch.linalg.norm(want[name]), name
    errors = [metric["error"] for metric in metrics.values() if "error" in metric]
    assert len(errors) == len(actual) and max(errors) < 1e-6
    old, new = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out")
    )
    heads = [key for key in old if ".head." in key]
    assert len(heads) == 2 and all(torch.equal(old[key], new[key]) for key in heads)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_larger_factors_shrink_to_the_rank(to, tmp_path):
    """By their singular values, as `resize` does; smaller ones stay as they are."""
    torch.manual_seed(0)
    factors = {}
    for name, rank in (("large", 4), ("small", 2)):
        key = f"base_model.model.transformer_blocks.0.{name}"
        factors[f"{key}.lora_A.weight"] = torch.randn(rank, 12)
        factors[f"{key}.lora_B.weight"] = torch.randn(10, rank)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(factors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"small": 2}}
    (source / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["large", "small"]})
    )
    options = {"component": "transformer"} if to == "diffusers" else {}
    receipt = adapterkit.convert(source, to=to, out=out, rank=2, hash="none", **options)
    assert any("rank 2 at most" in note for note in receipt.data["notes"])
    written, want = (adapter_samples.deltas(contents_of(one)) for one in (out, source))
    for name in ("large", "small"):
        (old,) = (value for key, value in want.items() if name in key)
        (new,) = (value for key, value in written.items() if name in key)
        assert old.a is not None and old.b is not None and new.a is not None and new.b is not None
        assert len(new.a) == 2
        u, s, vh = torch.linalg.svd(old.b @ old.a)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert torch.linalg.norm(new.b @ new.a - best) < 1e-5 * torch.linalg.norm(best)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "dora"], ids=str)
def test_dora_becomes_plain_where_the_format_has_none(case, base, tmp_path):
    """What servers load of it is its delta."""
    adapter = trained(case, base, tmp_path / "adapter", modules_to_save=None)
    with pytest.raises(AdapterkitError, match="magnitude of (lora|embedding), in"):
        convert(adapter, tmp_path / "out", to="vllm")
    with pytest.raises(AdapterkitError, match="--base BASE"):
        convert(adapter, tmp_path / "out", to="vllm", rank=FULL)
    convert(adapter, tmp_path / "out", to="vllm", rank=FULL, base=base)
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert set(want) == set(actual)
    for name, delta in actual.items():
        assert torch.linalg.norm(delta - want[name]) <= 3e-6 * torch.linalg.norm(want[name]), name


def test_a_type_that_no_format_holds_needs_a_rank(base, tmp_path):
    adapter = trained(SIMPLE["oft"], base, tmp_path / "adapter")
    with pytest.raises(Refused, match="an adapter of type OFT"):
        convert(adapter, tmp_path / "out", to="peft", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, how", [("oft", {"rank": 2}), ("vera", {"rank": 2}), ("vera", {})])
def test_a_type_that_depends_on_the_base_needs_it(kind, how, base, tmp_path):
    adapter = trained(SIMPLE[kind], base, tmp_path / "adapter")
    with pytest.raises(Refused, match="without its base"):
        convert(adapter, tmp_path / "out", to="peft", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_at_a_smaller_rank_they_are_the_best_and_the_receipt_has_the_error(kind, base, tmp_path):
    adapter = trained(SIMPLE[kind], base, tmp_path / "adapter")
    metrics = convert(adapter, tmp_path / "out", to="peft", rank=2)
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    for name, delta in want.items():
        s = torch.linalg.svdvals(delta)
        best = float(torch.linalg.norm(s[2:]) / torch.linalg.norm(s))
        assert metrics[name]["error"] == pytest.approx(best, abs=2e-6)
        assert metrics[name]["rank"] == min(2, int((s > 1e-9 * s[0]).sum()))
        error = torch.linalg.norm(actual[name] - delta) / torch.linalg.norm(delta)
        assert float(error) == pytest.approx(best, abs=2e-6)


LOKR, VALUES = "ai-toolkit/flux2_lokr", "bfl/control"
FIT, FIT_OR_LEAVE_OUT = (
    "give --rank N to make LoRA factors of them",
    "give --rank N to make LoRA factors of them; give --lossy to leave them out",
)


@pytest.mark.parametrize("source, to, hint", [
    (LOKR, "kohya", FIT),
    (LOKR, "vllm", FIT),
    (VALUES, "ai-toolkit", "choose another format"),
    ("lycoris/oft", "diffusers", "give --base and --rank N to make LoRA factors of them"),
    ("lycoris/full", "diffusers", FIT_OR_LEAVE_OUT),
    ("lycoris/full", "peft", FIT_OR_LEAVE_OUT),
])  # fmt: skip
def test_a_refusal_hints_at_what_helps(source, to, hint, tmp_path):
    with pytest.raises(AdapterkitError) as caught:
        convert(GOLDEN / f"{source}.safetensors", tmp_path / "out", to=to)
    assert hint in re.findall(r"hint: (.*)", str(caught.value))
    assert ("--rank" in str(caught.value)) == ("--rank" in hint)


def test_dora_of_some_modules_becomes_plain_if_a_file_has_one_flag_for_all(tmp_path):
    trained, source = GOLDEN / "peft" / "llama_dora", tmp_path / "source"
    convert(trained, source, to="mlx")
    file = source / "adapters.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if key.endswith(".m")))
    save_file(tensors, file)
    with pytest.raises(AdapterkitError, match="give --base and --rank N"):
        convert(source, tmp_path / "out", to="mlx")
    convert(source, tmp_path / "out", to="mlx", base=trained / "base", rank=FULL)
    assert not [key for key in load_file(tmp_path / "out" / file.name) if key.endswith(".m")]


def test_a_loha_of_rank_2_is_a_lora_of_rank_4(base, tmp_path):
    """Without loss, whatever rank above is asked for."""
    adapter = trained(SIMPLE["loha"], base, tmp_path / "adapter")
    metrics = convert(adapter, tmp_path / "out", to="peft", rank=100)
    assert {metric["rank"] for metric in metrics.values() if "error" in metric} == {4}
    assert all(metric["error"] < 1e-6 for metric in metrics.values() if "error" in metric)


def test_fused_modules_of_fitted_parts(tmp_path):
    """Parts of other kinds are fitted one by one and are blocks of the fused module's b."""
    source = contents_of(FLUX2)
    want = {module.name: dense(module) for module in source.modules}
    out = tmp_path / "out.safetensors"
    convert(FLUX2, out, to="kohya", rank=FULL, architecture="flux2")
    tensors = load_file(out)
    assert any("qkv" in key for key in tensors)
    actual = contents_of(out, architecture="flux2")
    assert {module.name for module in actual.modules} == set(want)
    for module in actual.modules:
        parts = {role: part.value(_Stored(tensors)).double() for role, part in module.parts.items()}
        delta = module.scale * parts["b"] @ parts["a"]
        far = torch.linalg.norm(delta - want[module.name]) / torch.linalg.norm(want[module.name])
        assert far < 1e-6, module.name


class _Stored:
    def __init__(self, tensors):
        self.tensors = tensors

    def tensor(self, spec):
        return self.tensors[spec.key]


def test_each_fit_is_computed_once(tmp_path, monkeypatch):
    names = []
    factors = Fit.factors
    monkeypatch.setattr(
        Fit, "factors", lambda fit, reader: names.append(fit.name) or factors(fit, reader)
    )
    convert(FLUX2, tmp_path / "out.safetensors", to="kohya", rank=1, architecture="flux2")
    assert sorted(names) == sorted(module.path for module in contents_of(FLUX2).modules)
