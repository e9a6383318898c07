"""Inits from statistics through `adapterkit init`: trained and back on the original, seeds,
refusals."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused, Unrecoverable
from adapterkit.core.registry import members
from tests.support import oracle
from tests.support.input_statistics import linear_modules, save_statistics
from tests.support.usual import usual

IDS = torch.arange(80).view(4, 20)
BATCH = {"input_ids": IDS, "labels": IDS}
FROM_STATISTICS = [n for n, init in members("inits").items() if set(init.needs) - {"weight"}]
CHANGING = [name for name in FROM_STATISTICS if members("inits")[name].changes_base]
MODELS = {
    "llama": (oracle.llama, "q_proj,k_proj,v_proj,down_proj"),
    "gpt2": (oracle.gpt2, "c_attn,c_proj,c_fc"),
}
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", params=MODELS)
def start(request, tmp_path_factory) -> tuple:
    """The model's builder, its folder, its statistics, the targets."""
    build, targets = MODELS[request.param]
    folder, model = tmp_path_factory.mktemp("base"), build()
    modules = linear_modules(model, targets.split(","))
    stats = save_statistics(model, modules, [BATCH], folder / "stats.safetensors")
    oracle.save_base(model, folder / "base", "fp32")
    return build, folder / "base", stats, targets


def init(start, out: Path, **options):
    _, base, stats, targets = start
    return adapterkit.init(base, **{"stats": stats, "targets": targets, "out": out} | options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model) -> None:
    """Five steps on the factors, none of whose dropout is on."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(5):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("method", "rslora"),
    usual(
        itertools.product(FROM_STATISTICS, [False, True]), lambda row: not row[1] or row[0] == "eva"
    ),
)
def test_trained_by_peft_and_back_on_the_original(method, rslora, start, tmp_path):
    build, base, _, _ = start
    changes = members("inits")[method].changes_base
    init(start, tmp_path / "out", method=method, rank=6, alpha=9, rslora=rslora)
    assert (tmp_path / "out" / "base").exists() == changes
    original = logits(oracle.load(build, base))
    with oracle.quiet():
        model = oracle.peft_model(
            oracle.load(build, tmp_path / "out" / "base" if changes else base),
            tmp_path / "out" / "adapter",
        )
    torch.testing.assert_close(logits(model), original, rtol=1e-5, atol=1e-5)
    name = next(iter(model.peft_config))
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in key
    train(model)
    trained = logits(model)
    assert (trained - original).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "trained")
    saved = next(f.parent for f in (tmp_path / "trained").rglob("adapter_config.json"))
    if changes:
        adapterkit.rebase(saved, initial=tmp_path / "out" / "adapter", out=tmp_path / "plain")
        saved = tmp_path / "plain"
    adapterkit.merge(base, [saved], out=tmp_path / "merged")
    merged = logits(oracle.load(build, tmp_path / "merged"))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", CHANGING)
def test_trained_here_without_a_second_base(method, start, tmp_path):
    build, base, _, _ = start
    out = tmp_path / "out"
    init(start, out, method=method, rank=6, alpha=9, residual="implicit")
    assert not (out / "base").exists()
    written = init(start, tmp_path / "written", method=method, rank=6, alpha=9)
    assert load_file(out / WEIGHTS).keys() == load_file(tmp_path / "written" / WEIGHTS).keys()
    assert written.data["parameters"]
    adapterkit.merge(base, [out / "adapter"], out=tmp_path / "same")
    for key, value in load_file(tmp_path / "same" / "model.safetensors").items():
        torch.testing.assert_close(value, load_file(base / "model.safetensors")[key])
    file = out / WEIGHTS
    tensors = {key: t + 0.01 * torch.ones_like(t) for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    adapterkit.merge(base, [out / "adapter"], out=tmp_path / "direct")
    save_file(tensors, tmp_path / "written" / WEIGHTS, metadata={"format": "pt"})
    rest, adapter = tmp_path / "written" / "base", tmp_path / "written" / "adapter"
    adapterkit.merge(rest, [adapter], out=tmp_path / "by_rest")
    one, other = (logits(oracle.load(build, tmp_path / n)) for n in ("direct", "by_rest"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_random_triplets_are_a_function_of_seed_and_module(start, tmp_path):
    options = {"method": "lora_ga", "rank": 4, "settings": {"direction": "random"}}
    files = {}
    for name, more in {"one": {}, "same": {}, "other": {"seed": 1}}.items():
        init(start, tmp_path / name, **options, **more)
        files[name] = load_file(tmp_path / name / WEIGHTS)
    last = start[3].split(",")[-1]
    init(start, tmp_path / "alone", **options | {"targets": last})
    files["alone"] = load_file(tmp_path / "alone" / WEIGHTS)
    differing = {
        name: sum(not torch.equal(t, files["one"][key]) for key, t in tensors.items())
        for name, tensors in files.items()
    }
    assert differing["same"] == differing["alone"] == 0 < differing["other"]


@pytest.mark.parametrize("method", FROM_STATISTICS)
def test_in_16_bits(method, start, tmp_path):
    """The factors as they are written define the rest: of a 32-bit base only its rounding is
    lost."""
    init(start, tmp_path / "out", method=method, rank=4, dtype="bf16")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    if not members("inits")[method].changes_base:
        return
    before = load_file(start[1] / "model.safetensors")
    rest = load_file(tmp_path / "out" / "base" / "model.safetensors")
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            part = tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
            part = part.T if start[0] is oracle.gpt2 else part
            error = (rest[name].double() + part - before[name]).norm()
            assert error <= 1e-6 * before[name].norm(), name


# -- statistics that do not fit ------------------------------------------------------------------


def edited(start, folder: Path, change) -> Path:
    tensors = load_file(start[2])
    change(tensors)
    file = folder / "edited.safetensors"
    with safe_open(start[2], "pt") as stats:
        metadata = stats.metadata()
    save_file({key: t.contiguous() for key, t in tensors.items()}, file, metadata)
    return file


@pytest.mark.parametrize("method, kind, problem", [
    ("corda", "covariance", "covariance is F32 "), ("eva", "variances", "variances has shape "),
    ("lora_ga", "gradient", "gradient is F32 "),
])  # fmt: skip
def test_statistics_of_another_model(method, kind, problem, start, tmp_path):
    def halve(tensors):
        for key in [key for key in tensors if key.endswith(kind)]:
            tensors[key] = tensors[key][: len(tensors[key]) // 2 - 1]

    def remove(tensors):
        for key in [key for key in tensors if key.endswith(kind)]:
            del tensors[key]

    for change, message in ((halve, problem), (remove, f"no .*{kind}")):
        stats = edited(start, tmp_path, change)
        with pytest.raises(MultipleErrors, match=message) as refusal:
            init(start, tmp_path / "out", method=method, rank=4, stats=stats)
        assert len(refusal.value.errors) >= 4  # all of them
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", FROM_STATISTICS)
def test_values_that_are_not_finite(method, start, tmp_path):
    def spoil(tensors):
        for tensor in tensors.values():
            tensor.view(-1)[0] = torch.nan

    with pytest.raises(AdapterkitError, match="not finite|NaN"):
        init(start, tmp_path / "out", method=method, rank=4, stats=edited(start, tmp_path, spoil))
    assert not (tmp_path / "out").exists()


def test_invalid_covariances_in_a_file_are_refused(start, tmp_path):
    def clear(tensors):
        for key, tensor in tensors.items():
            if key.endswith("covariance"):
                tensor.zero_()

    stats = edited(start, tmp_path, clear)
    with pytest.raises(Unrecoverable, match="covariance: zeros"):
        init(start, tmp_path / "out", method="corda", rank=4, stats=stats)


def test_inputs_that_never_vary(start, tmp_path):
    def clear(tensors):
        for key, tensor in tensors.items():
            if key.endswith(("variances", "variance")):
                tensor.zero_()

    with pytest.raises(Unrecoverable, match="no variance in any module"):
        init(start, tmp_path / "out", method="eva", rank=4, stats=edited(start, tmp_path, clear))


def test_a_truncated_file(start, tmp_path):
    data = start[2].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterkitError):
        init(start, tmp_path / "out", method="corda", rank=4, stats=tmp_path / "cut.safetensors")
    assert not (tmp_path / "out").exists()


def test_ranks_of_which_there_are_too_few_triplets(start, tmp_path):
    with pytest.raises(Refused, match="at most 16"):
        init(start, tmp_path / "out", method="lora_ga", rank=17)


@pytest.mark.parametrize("method", FROM_STATISTICS)
def test_layers_on_which_it_is_not_defined(method, start, tmp_path):
    name = "wte" if start[0] is oracle.gpt2 else "embed_tokens"
    with pytest.raises(Refused, match=f"{method} on .*{name}, of kind embedding"):
        init(start, tmp_path / "out", method=method, rank=4, targets=f"{name},{start[3]}")


@pytest.mark.parametrize("method", CHANGING)
def test_the_rest_quantized(method, start, tmp_path):
    """The base that is left is quantized; its error stands beside that of plain quantization."""
    receipt = init(start, tmp_path / "out", method=method, rank=4, quantize="int8")
    metrics = [m for m in receipt.data["parameters"].values() if "error_plain" in m]
    assert len(metrics) == 8 and all(0 < m["error"] < 0.02 for m in metrics)
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"]


def test_with_and_without_statistics(start, tmp_path):
    for method in FROM_STATISTICS:
        with pytest.raises(Refused, match=f"{method} without --stats") as refused:
            init(start, tmp_path / "out", method=method, rank=4, stats=None)
        what = refused.value.hint.partition("--what ")[2].split()[0]
        assert what == {"corda": "covariance", "eva": "pca", "lora_ga": "gradient"}[method]
    with pytest.raises(Refused, match="--stats with --method pissa"):
        init(start, tmp_path / "out", method="pissa", rank=4)


def test_from_the_command_line(start, tmp_path):
    _, base, stats, targets = start
    words = ["init", base, "--rank", 4, "--stats", stats, "--targets", targets, "--seed", 3]
    for method, settings in {
        "corda": ["corda_method=kpm"],
        "eva": ["rho=1.5", "whiten=true", "adjust_scaling_factors=false"],
        "lora_ga": ["direction=random", "scale=gd_scale", "stable_gamma=9"],
    }.items():
        more = [word for setting in settings for word in ("--set", setting)]
        out = tmp_path / method
        arguments = [*words, "--method", method, "--out", out, *more]
        result = CliRunner().invoke(main, [str(word) for word in arguments])
        assert result.exit_code == 0, result.output
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert load_file(out / WEIGHTS)
