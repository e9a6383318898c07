"""A job's metrics are summed up on the terminal, not in the receipt alone."""

import json
import re
import shutil

import click.testing
import pytest

import adapterkit
from adapterkit.adapters.formats.engines import engines
from adapterkit.cli import main
from adapterkit.core.options import bytes_text
from adapterkit.verbs.look.overview.advice import loading
from tests.support import oracle
from tests.support.adapter_samples import samples


def stderr_of(*words) -> str:
    result = click.testing.CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stderr


def test_a_merge_prints_counts_and_verification(llama, lora, tmp_path):
    text = stderr_of("merge", llama, lora, "--out", tmp_path / "out", "--verify")
    totals = json.loads((tmp_path / "out/adapterkit.json").read_text())["totals"]
    read, wrote = (bytes_text(totals[name]) for name in ("bytes_read", "bytes_written"))
    assert f"out: 14 of 21 tensors changed; read {read}, wrote {wrote} in " in text
    assert re.search(r"median \S+% of the adapter's change kept .* 14 tensors; worst: ", text)
    assert "verified: 42 rows of 14 tensors" in text
    assert text.endswith(f"next: hf upload ORG/NAME {tmp_path / 'out'}\n")
    text = stderr_of("merge", llama, lora, "--out", tmp_path / "other")
    assert text.endswith(f"next: adapterkit verify {tmp_path / 'other'}\n")


def test_a_conversion_prints_the_next_command(llama, lora, tmp_path):
    """The next command loads it in the program whose format it is."""
    text = stderr_of("convert", lora, "--to", "mlx", "--base", llama, "--out", tmp_path / "mlx")
    assert f"\nnext: mlx_lm.generate --model BASE --adapter-path {tmp_path / 'mlx'} " in text
    text = stderr_of("convert", lora, "--to", "tinker", "--out", tmp_path / "tinker")
    assert text.endswith(f"next: adapterkit report {tmp_path / 'tinker'} --out report.html\n")
    text = stderr_of("edit", lora, "--base-id", "org/base", "--out", tmp_path / "words")
    assert text.endswith(f"next: adapterkit report {tmp_path / 'words'} --out report.html\n")


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("kohya/musubi_wan_t2v", "vLLM-Omni"),
        ("diffusers/flux", "vLLM-Omni"),
        ("tinker/dense", "vLLM"),
    ],
)
def test_a_conversion_for_vllm_prints_the_program_of_its_model(name, program, tmp_path):
    """vLLM-Omni, which reads the same format, is for image models."""
    sample = next(
        one
        for one in samples(name.partition("/")[0])
        if one.id.removesuffix(".safetensors") == name
    )
    out = tmp_path / "made"
    text = stderr_of("convert", sample.path, "--to", "vllm", "--out", out)
    commands = {
        "vLLM": f"vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules name={out}",
        "vLLM-Omni": f"vllm serve BASE --omni --lora-path {out}",
    }
    assert text.endswith(f"next: {commands[program]}\n")


@pytest.mark.parametrize(("format", "models"), [("tinker", "language"), ("diffusers", "image")])
def test_a_report_has_the_programs_for_an_adapters_model(format, models):
    """A format of image models names its components; the one of tinker has no name."""
    rows = loading({"adapters": [{"format": format, "base": None, "rank": 8}]}, "a")
    right = [one.title for one in engines().values() if one.models == models]
    assert [row["engine"] for row in rows] == right


def test_numbers_of_bytes():
    known = {0: "0 bytes", 999: "999 bytes", 1000: "1.00 KB", 178_188_799: "178 MB"}
    known |= {12_345_678: "12.3 MB", 999_999_999: "1000 MB", 2 * 10**12: "2.00 TB"}
    assert {count: bytes_text(count) for count in known} == known


def test_resize_and_combine_print_the_kept_share(lora, other_lora, tmp_path):
    for words in (
        ["resize", lora, "--rank", 1],
        ["combine", lora, other_lora, "--method", "linear", "--rank", 2],
    ):
        out = tmp_path / words[0]
        text = stderr_of(*words, "--out", out)
        metrics = json.loads((out / "adapterkit.json").read_text())["parameters"].values()
        metrics = [metric for metric in metrics if "energy" in metric]
        share = sum(metric["energy"] * metric["norm"] ** 2 for metric in metrics) / sum(
            metric["norm"] ** 2 for metric in metrics
        )
        assert (
            0.1 < share < 1
            and f"kept {share:.1%} of the squared norm of {len(metrics)} modules; worst: " in text
            and f"{len(metrics)} modules written; read " in text
        )


def test_an_extraction_prints_the_kept_share(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "tuned", dtype="fp32")
    assert "truncation kept " in stderr_of(
        "extract", llama, tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "out"
    )


def test_a_quantization_prints_the_relative_error(llama, tmp_path):
    text = stderr_of("quantize", llama, "--to", "nf4", "--out", tmp_path / "out")
    assert (
        "relative error: median 0.0" in text
        and " over 14 weights; worst: " in text
        and " tensors changed; read " in text
    )
    text = stderr_of("loftq", llama, "--rank", 4, "--iterations", 1, "--out", tmp_path / "loftq")
    assert re.search(r"over 14 weights with factors, 0[.]\d+ with the adapter; worst", text)
    words = ["--rank", 4, "--iterations", 1, "--targets", "q_proj", "--out", tmp_path / "some"]
    text = stderr_of("loftq", llama, *words)
    pattern = r"over 2 weights with factors, 0[.]\d+ with the adapter; median .* over 14 .* in all;"
    assert re.search(pattern, text)


def test_an_adapter_that_is_in_the_base_already(llama, lora, other_lora, tmp_path):
    def notes(*words, out):
        data = oracle.merge(*words, out=tmp_path / out).data
        return [*data["warnings"], *data["notes"]]

    assert notes(llama, f"{lora}=0.5", out="once") == []
    (note,) = notes(tmp_path / "once", lora, out="twice")
    assert note == (
        f"{lora.name} is in once already, with weight 0.5, as its receipt says; it is added again"
    )
    assert notes(tmp_path / "once", f"{lora}=-0.5", out="back") == []
    (note,) = notes(tmp_path / "once", f"{other_lora}=-1", out="other")
    assert (
        note
        == f"{other_lora.name} is subtracted, but the receipt of once names {lora.name} instead"
    )
    assert notes(llama, f"{lora}=-1", out="no-receipt") == []
    assert notes(tmp_path / "once", other_lora, out="two-steps") == []
    # of the step before the last
    assert notes(tmp_path / "two-steps", f"{lora}=-0.5", out="one-out") == []
    assert notes(tmp_path / "one-out", f"{other_lora}=-1", out="both-out") == []
    (note,) = notes(tmp_path / "one-out", f"{lora}=-0.5", out="twice-out")
    assert note.startswith(f"{lora.name} is subtracted, but")


def test_a_receipt_that_is_none(llama, lora, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    for text in (
        "{}",
        '{"recipe": 3, "inputs": []}',
        '{"recipe": {"verb": "merge", "inputs": 1, "options": {}}, "inputs": {}}',
    ):
        (base / "adapterkit.json").write_text(text)
        data = adapterkit.merge(base, [lora], out=tmp_path / "out", overwrite=True).data
        assert data["warnings"] == data["notes"] == []
