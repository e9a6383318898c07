"""What `init` leaves behind: implicit residuals, after an interrupt, through the command line."""

import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Interrupted, Refused
from tests.support import initialized, oracle
from tests.support.forks import command
from tests.support.initialized import methods, needs_statistics

CHANGING = [name for name in methods(changes_base=True) if not needs_statistics(name)]
LLAMA = type(oracle.llama())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "base"
    oracle.save_base(oracle.llama(), folder, "bf16", max_shard_size="20KB")
    return folder


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "adapterkit.json"
    }


@pytest.mark.parametrize("residual", ["write", "implicit"])
def test_interrupted_anywhere_and_resumed(residual, base, tmp_path):
    """Between the adapter's file and those of the base too: what was handed on is still there."""
    how = {"method": "pissa", "rank": 4, "targets": "all-linear", "residual": residual}
    calls: list[int] = []
    whole = adapterkit.init(base, out=tmp_path / "whole", progress=calls.append, **how)
    expected = files(tmp_path / "whole")
    assert not any("handoff" in name for name in expected)
    resumed = 0
    for when in range(0, len(calls), 1 if residual == "write" else 3):
        seen: list[int] = []

        def progress(done: int, when: int = when, seen: list[int] = seen) -> None:
            if len(seen) == when:
                raise KeyboardInterrupt
            seen.append(done)

        out = tmp_path / f"out-{when}"
        with pytest.raises(Interrupted):
            adapterkit.init(base, out=out, progress=progress, **how)
        assert not out.exists()
        again: list[int] = []
        receipt = adapterkit.init(base, out=out, resume=True, progress=again.append, **how)
        assert files(out) == expected, when
        assert receipt.data["parameters"] == whole.data["parameters"]
        resumed += len(again) < len(calls)
    assert resumed  # some had files that were done


@pytest.mark.parametrize("method", CHANGING)
def test_an_implicit_residual_is_refused_by_peft(method, base, tmp_path):
    """It would load the factors on the original, as if it had lost their part."""
    out = tmp_path / "out"
    receipt = adapterkit.init(
        base, method=method, rank=4, alpha=6, rslora=True, residual="implicit", out=out
    )
    assert not (out / "base").exists() and receipt.data["modules"] == 4
    config, plain = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (out / "adapter", out / "adapter/initial")
    )
    assert config.pop("init_lora_weights") == f"implicit_{method}"
    assert plain.pop("init_lora_weights") is True and config == plain
    with pytest.raises(ValueError, match=f"implicit_{method}"), oracle.quiet():
        peft.PeftModel.from_pretrained(LLAMA.from_pretrained(base), out / "adapter")
    factors, initial = (oracle.stored(out / name) for name in ("adapter", "adapter/initial"))
    assert all(torch.equal(factors[key], initial[key]) for key in {**factors, **initial})


def test_implicit_leaves_a_method_without_a_part_alone(base, tmp_path):
    adapterkit.init(base, method="default", rank=4, residual="implicit", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not (tmp_path / "out/adapter/initial").exists()


@pytest.mark.parametrize("residual", ["write", "implicit"])
@pytest.mark.parametrize("factors", ["fp32", "bf16"])
def test_an_implicit_residual_is_the_written_one(residual, factors, base, tmp_path):
    """Merging what was not trained gives back the original, bit for bit where it is implicit."""
    out, how = tmp_path / "out", {"method": "olora", "rank": 4, "dtype": factors}
    adapterkit.init(base, out=out, residual=residual, **how)
    on = base if residual == "implicit" else out / "base"
    adapterkit.merge(on, [out / "adapter"], out=tmp_path / "merged")
    actual, expected = oracle.stored(tmp_path / "merged"), oracle.stored(base)
    if residual == "implicit":
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    else:  # rounded to bf16 twice
        initialized.assert_close(actual, expected, 5e-3)


# -- the command -----------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def test_a_dry_run_says_what_would_be_done(base, tmp_path):
    out = tmp_path / "out"
    words = ("init", base, "--method", "pissa", "--rank", 4, "--out", out)
    code, text = run(*words, "--dry-run", "--json")
    assert code == 0 and not out.exists(), text
    plan = json.loads(text)
    assert plan["verb"] == "init" and plan["modules"] == 4
    assert plan["options"] == {
        "method": "pissa", "rank": 4, "residual": "write", "dtype": "fp32",
    }  # fmt: skip
    code, text = run(*words, "--json")
    assert code == 0, text
    receipt = json.loads(text)
    for key in ("bytes_written", "tensors", "memory_peak"):
        assert key in plan["totals"]
    assert receipt["totals"]["tensors_changed"] == plan["totals"]["tensors_changed"] == 12
    assert receipt["parameters"]["model.layers.0.self_attn.q_proj.weight"]["error"] < 4e-3


def test_every_option_reaches_the_verb(base, tmp_path):
    out = tmp_path / "out"
    code, text = run(
        "init", base, "--method", "pissa", "--rank", 4, "--alpha", 6, "--rslora",
        "--rank-for", "layers.1.*=3", "--rank-for", "layers.0.*q_proj=2", "--alpha-for", "v_proj=5",
        "--targets", "all-linear", "--exclude", ".*mlp.*", "--layers", "0-1", "--set", "niter=8",
        "--seed", 7, "--residual", "implicit", "--dtype", "bf16", "--out", out,
    )  # fmt: skip
    assert code == 0, text
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    stored = oracle.stored(out / "adapter")
    ranks = {key.rpartition(".lora_A")[0]: len(a) for key, a in stored.items() if "lora_A" in key}
    assert len(ranks) == 8 and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(
        rank == (3 if "layers.1." in name else 2 if "q_proj" in name else 4)
        for name, rank in ranks.items()
    )
    assert config["use_rslora"] is True and config["init_lora_weights"] == "implicit_pissa"
    assert {config["lora_alpha"], *config["alpha_pattern"].values()} == {6, 5}
    recipe = json.loads((out / "adapterkit.json").read_text())["recipe"]
    assert recipe["options"]["settings"] == {"niter": 8} and recipe["options"]["seed"] == 7


def test_a_refusal_has_all_reasons_and_status_1(base, tmp_path):
    words = ("init", base, "--method", "pissa", "--rank", 4, "--out", tmp_path / "out")
    done = command(*words, "--targets", "q_proj,no,gone")
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert "2 problems found" in done.stderr
    assert all(f"--targets '{name}' matches none" in done.stderr for name in ("no", "gone"))


def test_the_help_of_init_is_readable():
    code, text = run("init", "--help")
    assert code == 0 and max(map(len, text.splitlines())) <= 100
    for name in methods():
        assert f"\n  {name} " in text, name
    for words in ("DIR/adapter", "--rank-for", "--residual", "--set niter"):
        assert words in text


def test_a_quantized_base_keeps_its_own_format(base, tmp_path):
    adapterkit.quantize(base, to="nf4", out=tmp_path / "packed")
    with pytest.raises(Refused, match="remove --quantize"):
        adapterkit.init(
            tmp_path / "packed", method="pissa", rank=2, quantize="nf4", out=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()
