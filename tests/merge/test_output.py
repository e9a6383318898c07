"""What a merge leaves: a complete checkpoint in the base's own layout, an index with true totals,
and a receipt."""

import hashlib
import json
import os
import re
import shutil
import stat

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Damaged, Failed, Refused
from adapterkit.core.options import SIZE, checked
from adapterkit.core.verify.row_checks import check_rows
from adapterkit.kernels.quant.stochastic import last_place
from tests.support import oracle
from tests.support.forks import command
from tests.support.oracle import DTYPES, LINEAR, load, stored

EXTRAS = {
    "generation_config.json": '{"do_sample": true}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"chat_template": "x"}',
    "chat_template.jinja": "{{ messages }}",
    "modeling_custom.py": "raise SystemExit('never imported')\n",
    "LICENSE": "text",
    "1_Pooling/config.json": "{}",
}
NOT_TAKEN = {
    "pytorch_model.bin": b"\x80",
    "optimizer.pt": b"\x80",
    "model.gguf": b"GGUF",
    ".gitattributes": b"x",
}


@pytest.fixture
def dressed(llama, tmp_path):
    """The base with all that a real one has beside its weights."""
    folder = shutil.copytree(llama, tmp_path / "dressed")
    for name, text in EXTRAS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, data in NOT_TAKEN.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\n---\n# Base <script>\n"
    )
    return folder


def out_of(tmp_path, base, *adapters, **options):
    oracle.merge(base, *adapters, out=tmp_path / "out", **options)
    return tmp_path / "out"


def test_every_file_besides_the_weights_is_copied(dressed, lora, tmp_path):
    out = out_of(tmp_path, dressed, lora)
    for name in EXTRAS:
        assert (out / name).read_bytes() == (dressed / name).read_bytes(), name
    assert not any((out / name).exists() for name in NOT_TAKEN)
    assert (out / "config.json").read_bytes() == (dressed / "config.json").read_bytes()


def test_the_card_lists_base_and_adapters(dressed, lora, tmp_path):
    card = (out_of(tmp_path, dressed, f"{lora}=0.25") / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model:" not in front and "base_model_relation: merge" in front  # no ids
    assert f"# dressed merged with {lora.name}" in card and "Base: dressed" in card
    assert 'license: "apache-2.0"' in front and 'language: "en"' in front
    assert "0.25" in card and "<script>" not in card


def test_the_output_loads_with_no_key_missing_or_unexpected(llama, lora, tmp_path):
    oracle.load_checked(transformers.LlamaForCausalLM, out_of(tmp_path, llama, lora))


def test_files_have_the_permissions_that_the_umask_gives(llama, lora, tmp_path):
    """safetensors 0.8 writes 0600 whatever the umask says."""
    before = os.umask(0o022)
    try:
        out = out_of(tmp_path, llama, lora)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o644}


@pytest.fixture
def sharded(tmp_path):
    oracle.save_base(oracle.llama(), tmp_path / "sharded", "bf16", max_shard_size="6KB")
    return tmp_path / "sharded"


def test_the_bases_files_and_headers_are_kept(sharded, lora, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = 12345  # wrong, as some tools write it
    index["metadata"]["note"] = "kept"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    out = out_of(tmp_path, sharded, lora)
    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(names) > 3 and names == sorted(p.name for p in out.glob("*.safetensors"))
    untouched = 0
    for name in names:
        old, new = (sharded / name).read_bytes(), (out / name).read_bytes()
        length = 8 + int.from_bytes(old[:8], "little")
        assert old[:length] == new[:length], "the very header bytes"
        untouched += old == new
    assert 0 < untouched < len(names)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == index["weight_map"]
    assert written["metadata"]["note"] == "kept"
    assert written["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in stored(out).values()
    )


def test_stale_shards_are_left_out(sharded, lora, tmp_path):
    save_file({"old.weight": torch.ones(2)}, sharded / "model-00099-of-00099.safetensors")
    out = out_of(tmp_path, sharded, lora)
    assert not (out / "model-00099-of-00099.safetensors").exists()
    assert "old.weight" not in stored(out)


@pytest.mark.parametrize("limit, single", [("1GB", True), ("20KB", False), ("1KB", False)])
def test_resharding_moves_tensors_not_values(limit, single, sharded, llama, lora, tmp_path):
    out = out_of(tmp_path, sharded, lora, max_shard_size=limit)
    oracle.merge(llama, lora, out=tmp_path / "whole")
    first, second = stored(out), stored(tmp_path / "whole")
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    files = list(out.glob("*.safetensors"))
    assert (len(files) == 1) == single == (not (out / "model.safetensors.index.json").exists())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(
            t.numel() * t.element_size() for t in tensors.values()
        ) <= checked("max_shard_size", SIZE, limit)
    oracle.load_checked(transformers.LlamaForCausalLM, out)


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("20kb", 20_000),
        ("700", 700),
        (5_000_000_000, 5 * 10**9),
    ],
)
def test_sizes_are_powers_of_a_thousand(text, size):
    assert checked("max_shard_size", SIZE, text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "five", "1e999GB", "nan", 0, 1.5, None, True, b"5GB"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(Refused, match="max-shard-size"):
        checked("max_shard_size", SIZE, text)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_casts_every_tensor_and_the_config(dtype, llama, lora, tmp_path):
    out = out_of(tmp_path, llama, lora, dtype=dtype, verify=True)
    tensors = stored(out)
    assert {t.dtype for t in tensors.values()} == {DTYPES[dtype]}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(
        DTYPES[dtype]
    ).removeprefix("torch.")
    before = stored(llama)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], before[name].to(DTYPES[dtype]))
    with oracle.quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == DTYPES[dtype]


def test_casting_leaves_integers_alone(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    ids = torch.arange(5)
    save_file(
        {"x.weight": torch.ones(4, 4), "ids": ids, "flag": torch.tensor([True])},
        base / "model.safetensors",
    )
    save_file(
        {"x.lora_A.weight": torch.ones(1, 4), "x.lora_B.weight": torch.ones(4, 1)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    actual = stored(out_of(tmp_path, base, adapter, dtype="bf16"))
    assert actual["x.weight"].dtype == torch.bfloat16 and bool((actual["x.weight"] == 2).all())
    assert torch.equal(actual["ids"], ids) and actual["flag"].dtype == torch.bool


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("where", ["touched", "untouched"])
def test_an_overflow_is_an_error_that_names_the_tensor(dtype, where, lora, tmp_path):
    model = oracle.llama()
    name = "model.layers.0.mlp.up_proj.weight" if where == "touched" else "model.norm.weight"
    model.get_parameter(name).data[...] = 65504 if dtype is None else 1e6
    oracle.save_base(model, tmp_path / "base", "fp16" if dtype is None else "bf16")
    if dtype is None and where == "touched":
        big = load_file(lora / "adapter_model.safetensors")
        big = {k: v * (1000 if ".0.mlp.up_proj" in k else 1) for k, v in big.items()}
        shutil.copytree(lora, tmp_path / "adapter")
        save_file(big, tmp_path / "adapter" / "adapter_model.safetensors")
        lora = tmp_path / "adapter"
    elif dtype is None:
        return  # 65504 copied as it is
    with pytest.raises(Failed, match=f"{name}: the merged value overflows in F16"):
        out_of(tmp_path, tmp_path / "base", lora, dtype=dtype)
    assert not (tmp_path / "out").exists()
    # as the message advises: nothing of the failed run is in the way
    out_of(tmp_path, tmp_path / "base", lora, dtype="fp32")


def test_the_receipt_has_hashes_and_metrics_of_the_output(llama, lora, tmp_path):
    out = out_of(tmp_path, llama, f"{lora}=0.5", exclude="o_proj")
    receipt = json.loads((out / "adapterkit.json").read_text())
    for name, metrics in receipt["files"].items():
        data = (out / name).read_bytes()
        assert metrics == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(receipt["files"]) | {"adapterkit.json"} == {p.name for p in out.iterdir()}
    assert receipt["recipe"]["options"]["weights"] == [0.5]
    assert len(receipt["left_out"]) == 2 and all("o_proj" in name for name in receipt["left_out"])
    before, after = stored(llama), stored(out)
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert set(receipt["parameters"]) == changed and receipt["tensors_changed"] == len(changed)
    for key, metrics in receipt["parameters"].items():
        delta = (after[key].double() - before[key].double()).norm() / after[key].double().norm()
        assert metrics["delta"] == pytest.approx(float(delta), rel=0.05)
        share = float((after[key] != before[key]).double().mean())
        assert metrics["changed"] == pytest.approx(share, abs=0.02)
        assert 0 <= metrics["rounding"] < 1
    adapter = hashlib.sha256((lora / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert receipt["inputs"][f"1 {lora.name}"]["adapter_model.safetensors"] == adapter
    assert str(tmp_path) not in json.dumps(receipt) and str(llama.parent) not in json.dumps(receipt)


def test_a_delta_below_the_dtypes_resolution_is_reported(llama, lora, tmp_path):
    receipt = oracle.merge(llama, f"{lora}=1e-7", out=tmp_path / "out").data
    assert all(
        metrics["changed"] < 0.01 and metrics["rounding"] > 0.9
        for metrics in receipt["parameters"].values()
    )
    (warning,) = receipt["warnings"]
    assert (
        "in 14 of 14 tensors less than 80 % of the change survived rounding to their dtype "
        "(median: 100% lost"
    ) in warning
    assert "--rounding stochastic" in warning and "--dtype fp32" in warning


def deltas(folder, dtype, size):
    """A weight of the usual spread, and a delta of normal values, `size` times the weight's median
    step in bf16."""
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(512, 512, generator=generator) * 0.02).to(dtype)
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True)
    save_file({"x.weight": w}, folder / "base/model.safetensors")
    step = float(last_place(w.float().abs(), torch.bfloat16).median()) * size / 16
    prefix = "base_model.model.x.lora_"
    a, b = (torch.randn(*shape, generator=generator) for shape in [(256, 512), (512, 256)])
    save_file(
        {prefix + "A.weight": a * step, prefix + "B.weight": b},
        folder / "adapter/adapter_model.safetensors",
    )
    (folder / "adapter/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 256, "lora_alpha": 256}'
    )
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize(
    "size, survived", [(2, 1.0), (1, 0.93), (1 / 2, 0.70), (1 / 8, 0.22), (1 / 32, 0.06)]
)
def test_the_share_of_the_delta_that_survives_16_bits(size, survived, tmp_path):
    base, adapter = deltas(tmp_path, torch.bfloat16, size)
    receipt = oracle.merge(base, adapter, out=tmp_path / "out").data
    metrics = receipt["parameters"]["x.weight"]
    before, after = (stored(tmp_path / name)["x.weight"].double() for name in ("base", "out"))
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.x.lora_{side}.weight"].double() for side in "AB")
    left = float(((after - before) * (b @ a)).sum() / (b @ a).square().sum())
    assert metrics["survived"] == pytest.approx(left, abs=1e-3) == pytest.approx(survived, abs=0.02)
    assert bool(receipt["warnings"]) == (survived < 0.8)
    for name, options in [("drawn", {"rounding": "stochastic"}), ("wide", {"dtype": "fp32"})]:
        assert oracle.merge(base, adapter, out=tmp_path / name, **options).data["warnings"] == []


@pytest.mark.parametrize("options, least, kept", [
    ({}, 0.3, False),
    ({}, 0.1, True),
    ({"compat": "peft"}, 0.3, False),
    ({"rounding": "stochastic"}, 0.9, True),
    ({"dtype": "fp32"}, 1.0, True),
    ({"dtype": "fp16"}, 0.3, True),
])  # fmt: skip
def test_a_merge_that_keeps_less_than_it_should_is_not_published(options, least, kept, tmp_path):
    """A bfloat16 base, and a delta of an eighth of its step, of which 22 % are kept."""
    base, adapter = deltas(tmp_path, torch.bfloat16, 1 / 8)
    out = tmp_path / "out"
    asked = {"fail_below": least, **options}
    if kept:
        receipt = adapterkit.merge(base, adapter, out=out, **asked)
        plain = adapterkit.merge(base, adapter, out=tmp_path / "plain", **options)
        assert receipt.data["fingerprint"] == plain.data["fingerprint"]
        return
    with pytest.raises(Failed) as caught:
        adapterkit.merge(base, adapter, out=out, **asked)
    said = r"rounding keeps 2[12]\.\d\d% of the change, the median of 1 tensors"
    assert re.fullmatch(said, caught.value.problem)
    assert caught.value.where == "--fail-below" and "--rounding stochastic" in caught.value.hint
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["adapter", "base"]
    # nothing of it is in the way of the job that the hint asks for
    adapterkit.merge(base, adapter, out=out, fail_below=0.9, rounding="stochastic")


def test_fail_below_with_compensated_rounding_is_refused(tmp_path):
    """It keeps the change in the outputs, whatever is left of each element."""
    base, adapter = deltas(tmp_path, torch.bfloat16, 1 / 8)
    with pytest.raises(Refused, match="--fail-below and --rounding compensated are given"):
        how = {"rounding": "compensated", "stats": tmp_path / "stats.safetensors"}
        adapterkit.merge(base, adapter, out=tmp_path / "out", fail_below=0.5, **how)


def test_a_warning_is_the_first_line_and_no_note(tmp_path):
    deltas(tmp_path, torch.bfloat16, 1 / 8)
    words = ["merge", "base", "adapter", "--out"]
    printed = command(*words, "out", cwd=tmp_path)
    first, *rest = printed.stderr.splitlines()
    assert printed.returncode == 0 and first.startswith("warning: in 1 of 1 tensors less than 80 %")
    assert not re.search("warning", "\n".join(rest), re.IGNORECASE)
    document = json.loads(command(*words, "json", "--json", cwd=tmp_path).stdout)
    assert [f"warning: {text}" for text in document["warnings"]] == [first]
    assert list(document).index("warnings") + 1 == list(document).index("notes")
    failed = command(*words, "none", "--fail-below", "0.5", cwd=tmp_path)
    assert failed.returncode == 1 and "rounding keeps 21" in failed.stderr
    assert not (tmp_path / "none").exists()


def test_ranks_publish_no_merge_that_keeps_less(tmp_path):
    deltas(tmp_path, torch.bfloat16, 1 / 8)
    for words, status in [
        (
            ["merge", "base", "adapter", "--out", "out", "--fail-below", "0.5", "--plan", "p.json"],
            0,
        ),
        (["run", "p.json"], 0),
        (["finish", "p.json"], 1),
    ]:
        done = command(*words, cwd=tmp_path)
        assert done.returncode == status, done.stderr
    assert "--fail-below: rounding keeps 21" in done.stderr and not (tmp_path / "out").exists()


def test_a_delta_in_unsampled_rows_is_not_reported_as_kept(tmp_path, monkeypatch):
    base, adapter = deltas(tmp_path, torch.bfloat16, 1 / 8)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.x.lora_B.weight"][:64] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    monkeypatch.setattr("adapterkit.core.tasks.rows.ELEMENTS", 1 << 14)
    metrics = oracle.merge(base, adapter, out=tmp_path / "out").data["parameters"]["x.weight"]
    assert (
        metrics["changed"] == 0
        and metrics["delta"] > 0
        and not {"survived", "rounding"} & set(metrics)
    )


def test_a_base_of_more_digits_swallows_nothing(tmp_path):
    base, adapter = deltas(tmp_path, torch.float32, 1 / 8)
    receipt = oracle.merge(base, adapter, out=tmp_path / "out", dtype="bf16").data
    assert receipt["parameters"]["x.weight"]["rounding"] > 1
    assert receipt["warnings"] == []


def test_hash_none_hashes_nothing_and_verify_still_checks_keys(llama, lora, tmp_path):
    out = out_of(tmp_path, llama, lora, hash="none")
    receipt = json.loads((out / "adapterkit.json").read_text())
    assert all(metrics["sha256"] is None for metrics in receipt["files"].values())
    adapterkit.verify(out, base=llama, adapters=[lora])
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(Damaged):
        adapterkit.verify(out)


def test_verify_recomputes_rows_from_the_inputs(llama, lora, other_lora, tmp_path):
    out = out_of(tmp_path, llama, lora)
    assert adapterkit.verify(out, base=llama, adapters=[lora])["rows"] > 0
    with pytest.raises(Refused, match="is not what was merged: "):
        adapterkit.verify(out, base=llama, adapters=[other_lora])
    with pytest.raises(Refused, match="both"):
        adapterkit.verify(out, base=llama)


def test_verify_with_the_inputs_of_another_verb_is_refused(llama, lora, other_lora, tmp_path):
    adapterkit.combine([lora, other_lora], method="linear", out=tmp_path / "out")
    assert adapterkit.verify(tmp_path / "out")["rows"] == 0
    with pytest.raises(Refused, match="an output of combine"):
        adapterkit.verify(tmp_path / "out", base=llama, adapters=[lora])


def test_modules_that_are_replaced_and_cast_are_recomputed_too(llama, tmp_path):
    adapter = tmp_path / "adapter"
    oracle.train(
        oracle.load(oracle.llama, llama),
        adapter,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    assert (
        oracle.merge(llama, adapter, out=tmp_path / "out", verify=True).data["verified"]["tensors"]
        == 3
    )
    cast = oracle.merge(llama, adapter, out=tmp_path / "cast", verify=True, dtype="fp32").data[
        "verified"
    ]
    assert cast["tensors"] == 21  # all of them
    data = bytearray((tmp_path / "out/model.safetensors").read_bytes())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
    start = 8 + int.from_bytes(data[:8], "little")
    at = json.loads(data[8:start])["lm_head.weight"]["data_offsets"][0] + start
    data[at + 1] ^= 0x80  # the sign of its first value
    (tmp_path / "out/model.safetensors").write_bytes(data)
    plan = adapterkit.merge(llama, [adapter], out=tmp_path / "dry", dry_run=True)
    with pytest.raises(Damaged, match="lm_head.weight: row 0, column 0"):
        check_rows(LocalFolder(tmp_path / "out"), plan)


@pytest.mark.parametrize("length", [244, 300, 5000])
def test_names_that_no_file_system_takes_are_refused(length, llama, lora, tmp_path):
    for out in (tmp_path / ("x" * length), tmp_path / ("y" * length) / "out"):
        if length > 244 or out.name != "out":
            with pytest.raises(Refused, match="names of at most 243 bytes"):
                oracle.merge(llama, lora, out=out)
    with pytest.raises(Refused, match="paths that the system takes"):
        oracle.merge(llama, lora, out=tmp_path.joinpath(*["z" * 200] * 21))
    oracle.merge(llama, lora, out=tmp_path / ("x" * 243))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 243]


def test_verify_finds_arithmetic_that_is_wrong(llama, lora, tmp_path, monkeypatch):
    """A merge whose arithmetic is off by one part in a thousand: every hash agrees, the rows do
    not."""
    from adapterkit.kernels import rows

    right = rows.add_low_rank
    monkeypatch.setattr(rows, "add_low_rank", lambda w, left, right_: right(w, left * 1.01, right_))
    out = out_of(tmp_path, llama, lora)
    monkeypatch.undo()
    adapterkit.verify(out)
    with pytest.raises(Damaged, match=r"(?s)14 of 14 tensors .*row 0, column") as caught:
        adapterkit.verify(out, base=llama, adapters=[lora])
    assert len(str(caught.value).splitlines()) <= 4


def test_verify_of_a_model_merged_twice_hints_at_it(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "once")
    oracle.merge(tmp_path / "once", lora, out=tmp_path / "twice")
    with pytest.raises(Damaged, match=r"(?s)14 of 14 tensors.*merged twice.*lora") as caught:
        adapterkit.verify(tmp_path / "twice", base=llama, adapters=[lora])
    assert len(str(caught.value).splitlines()) <= 4
    adapterkit.verify(tmp_path / "twice", base=tmp_path / "once", adapters=[lora])


@pytest.mark.parametrize("choice", [None, "adapter", "base"])
def test_the_tokenizer_next_to_the_adapter_is_used(choice, dressed, lora, tmp_path):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text('{"version": "2.0"}')
    (adapter / "training_args.bin").write_bytes(b"\x80")
    (adapter / "evil.py").write_text("boom")
    out = out_of(tmp_path, dressed, adapter, tokenizer=choice)
    assert json.loads((out / "tokenizer.json").read_text())["version"] == (
        "1.0" if choice == "base" else "2.0"
    )
    assert not (out / "evil.py").exists() and not (out / "training_args.bin").exists()


def test_two_different_tokenizers_are_refused(dressed, lora, other_lora, tmp_path):
    for name, source in [("a", lora), ("b", other_lora)]:
        (shutil.copytree(source, tmp_path / name) / "tokenizer.json").write_text(
            f'{{"version": "{name}"}}'
        )
    with pytest.raises(Refused, match="different tokenizers"):
        out_of(tmp_path, dressed, tmp_path / "a", tmp_path / "b")


def test_mixed_dtypes_stay_mixed(lora, tmp_path):
    model = oracle.llama().to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.model.layers[0].mlp.up_proj.to(torch.float16)
    base = tmp_path / "base"
    model.save_pretrained(base)
    before, after = stored(base), stored(out_of(tmp_path, base, lora))
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert len({v.dtype for v in after.values()}) == 3


def test_a_base_that_is_one_file(llama, lora, tmp_path):
    out = out_of(tmp_path, llama / "model.safetensors", lora)
    oracle.merge(llama, lora, out=tmp_path / "folder")
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "folder" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("layers", [LINEAR])
def test_the_result_computes_what_the_adapter_computes(layers, llama, lora, tmp_path):
    out = out_of(tmp_path, llama, lora, dtype="fp32")
    ids = torch.arange(20)[None] % 80
    with torch.no_grad():
        expected = oracle.peft_model(load(oracle.llama, llama).float(), lora)(ids).logits
        actual = oracle.load_checked(transformers.LlamaForCausalLM, out)(ids).logits
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_every_verb_that_writes_a_model_keeps_its_other_files(sharded, llama, lora, tmp_path):
    """Those in subfolders too; and none writes an index where there is one file that is not of
    it."""
    base = tmp_path / "base"
    if sharded:
        oracle.save_base(oracle.llama(), base, "bf16", max_shard_size="6KB")
    else:
        oracle.edit_config(llama, base)
    for name, text in EXTRAS.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    layers = [{"idx": 0, "name": "0", "path": ""}, {"idx": 2, "name": "2", "path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(layers))
    dense = {"linear.weight": torch.ones(2, 3)}
    for folder in ("2_Dense", "onnx"):  # only the first is a layer of the model
        (base / folder).mkdir()
        save_file(dense, base / folder / "model.safetensors")
    adapterkit.quantize(base, to="nf4", out=tmp_path / "quantize")
    adapterkit.dequantize(tmp_path / "quantize", out=tmp_path / "dequantize")
    adapterkit.dequantize(tmp_path / "quantize", max_shard_size="1GB", out=tmp_path / "joined")
    adapterkit.init(base, method="pissa", rank=1, out=tmp_path / "init")
    adapterkit.loftq(base, rank=1, iterations=1, out=tmp_path / "loftq")
    oracle.merge(base, lora, out=tmp_path / "merge")
    adapterkit.verify(tmp_path / "merge")
    outputs = {name: tmp_path / name for name in ("merge", "quantize", "dequantize", "joined")}
    outputs |= {name: tmp_path / name / "base" for name in ("init", "loftq")}
    listings = {}
    for verb, out in outputs.items():
        listings[verb] = {
            p.relative_to(out).as_posix()
            for p in out.rglob("*")
            if p.is_file() and p.suffix != ".safetensors"
        }
        assert torch.equal(
            load_file(out / "2_Dense/model.safetensors")["linear.weight"], dense["linear.weight"]
        )
        assert not (out / "onnx").exists()
        for name in listings[verb] & set(EXTRAS):
            assert (out / name).read_text() == EXTRAS[name], (verb, name)
    whole = listings["merge"] - {"adapterkit.json"}
    assert "1_Pooling/config.json" in whole and ("model.safetensors.index.json" in whole) == sharded
    assert listings.pop("joined") - {"adapterkit.json"} == whole - {"model.safetensors.index.json"}
    for verb, listing in listings.items():
        assert listing - {"adapterkit.json"} == whole, verb
