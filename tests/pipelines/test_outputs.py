"""What is written beside the merged weights, and how: killed and resumed, by ranks, on the Hub."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Damaged, Refused
from tests.faults.conftest import digests
from tests.support.forks import Ended, command, forks
from tests.support.hub_client import TOKEN
from tests.support.hub_server import Hub
from tests.support.plain_pipelines import (
    ENCODER,
    MODULES,
    QUERY,
    delta,
    file_of,
    weights,
    write_lora,
    write_peft,
    write_pipeline,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pipeline, an adapter of two of its parts, and what a merge makes of them."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "base")
    write_lora(place / "lora.safetensors", "unet", "text_encoder")
    run(place, "merge", "base", "lora.safetensors=0.5", "--out", "out").succeeded()
    return place


def run(place: Path, *argv: str, **more) -> Ended:
    server = forks()
    return server.wait(server.start(argv=list(argv), cwd=str(place), **more))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_merged_pipeline_has_all_files_and_only_touched_ones_differ(place):
    before, after = files_of(place / "base"), files_of(place / "out")
    assert after.keys() == {*before, "README.md", "adapterkit.json"}
    touched = {f"{part}/{file_of(part)}" for part in ("unet", "text_encoder")}
    assert {name for name in before if after[name] != before[name]} == touched
    receipt = json.loads(after["adapterkit.json"])
    assert receipt["files"].keys() == {*before, "README.md"}
    assert receipt["totals"]["tensors_changed"] == receipt["tensors_changed"] == 3
    assert receipt["recipe"]["options"]["weights"] == [0.5]
    assert "| lora.safetensors (unet) | 0.5 | 2 |" in after["README.md"].decode()
    assert "library_name: diffusers" in after["README.md"].decode()


def test_a_part_is_merged_as_its_folder_alone(place, tmp_path):
    write_peft(tmp_path / "one", ENCODER)
    adapterkit.merge(place / "base", tmp_path / "one", out=tmp_path / "whole")
    adapterkit.merge(place / "base" / "text_encoder", tmp_path / "one", out=tmp_path / "alone")
    whole, alone = files_of(tmp_path / "whole" / "text_encoder"), files_of(tmp_path / "alone")
    assert whole == {name: alone[name] for name in whole}


def test_killed_at_any_moment_it_resumes(place):
    whole = digests(place / "out")
    words = ["merge", "base", "lora.safetensors=0.5", "--out", "again"]
    run(place, *words, "--dry-run").succeeded()
    assert not (place / "again").exists()
    for when in (3, 11, 19, 30, 40, 50):
        ended = run(place, *words, "--resume", fault={"kill": True, "when": when})
        assert ended.status == -9 and not (place / "again").exists()
    run(place, *words, "--resume").succeeded()
    assert digests(place / "again") == whole


def test_ranks_make_the_same(place):
    words = ["merge", "base", "lora.safetensors=0.5", "--out", "ranked", "--plan", "plan.json"]
    for line in (
        words,
        ["run", "plan.json", "--worker", "0/2"],
        ["run", "plan.json", "--worker", "1/2"],
    ):
        run(place, *line).succeeded()
    run(place, "finish", "plan.json").succeeded()
    names = [name for name in files_of(place / "out") if name != "adapterkit.json"]
    ours, theirs = files_of(place / "ranked"), files_of(place / "out")
    assert all(ours[name] == theirs[name] for name in names)


def test_a_plan_file_knows_an_adapter_for_a_part_from_elsewhere(place, tmp_path):
    write_peft(place / "told", QUERY)
    words = ["merge", "base", "unet:told=2", "--out", "told-out", "--plan", "told.json"]
    run(place, *words).succeeded()
    for line in (["run", str(place / "told.json")], ["finish", str(place / "told.json")]):
        run(tmp_path, *line).succeeded()
    added = load_file(place / "told-out" / "unet" / file_of("unet"))[f"{QUERY}.weight"]
    expected = weights("unet")[f"{QUERY}.weight"] + 2 * delta(QUERY, QUERY)
    torch.testing.assert_close(added, expected)


def test_damage_in_any_part_is_found(place, tmp_path):
    adapterkit.merge(place / "base", place / "lora.safetensors", out=tmp_path / "out")
    counts = adapterkit.verify(
        tmp_path / "out", base=place / "base", adapters=place / "lora.safetensors"
    )
    assert counts["tensors"] == 3
    file = tmp_path / "out" / "vae" / file_of("vae")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Damaged, match="vae/diffusion_pytorch_model.safetensors"):
        adapterkit.verify(tmp_path / "out")


def test_weights_that_were_not_written_are_found(place, tmp_path):
    adapterkit.merge(place / "base", place / "lora.safetensors", out=tmp_path / "out")
    save_file(weights("unet"), tmp_path / "out" / "unet" / file_of("unet", ".fp16"))
    with pytest.raises(Damaged, match="unet/diffusion_pytorch_model.fp16"):
        adapterkit.verify(tmp_path / "out")


def test_a_dtype_is_of_the_parts_that_change(place, tmp_path):
    receipt = adapterkit.merge(
        place / "base", place / "lora.safetensors", dtype="bf16", out=tmp_path / "out"
    )
    assert any("--dtype does not apply to" in note for note in receipt.data["notes"])
    dtypes = {
        part: {v.dtype for v in load_file(tmp_path / "out" / part / file_of(part)).values()}
        for part in ("unet", "vae")
    }
    assert dtypes == {"unet": {torch.bfloat16}, "vae": {torch.float32}}


def test_steps_of_a_file_of_steps(place, tmp_path):
    """A pipeline that is planned is the base of the next merge."""
    step = '[[step]]\nverb = "merge"\ninputs = ["{}", "{}"]\nout = "{}"\n'
    lora = place / "lora.safetensors"
    lines = [step.format(place / "base", lora, "first"), step.format("first", lora, "second")]
    (tmp_path / "steps.toml").write_text("\n".join(lines))
    run(tmp_path, "run", "steps.toml").succeeded()
    twice = load_file(tmp_path / "second" / "unet" / file_of("unet"))[f"{QUERY}.weight"]
    added = delta(QUERY, *MODULES["unet"])
    torch.testing.assert_close(twice, weights("unet")[f"{QUERY}.weight"] + 2 * added)


def test_rows_of_another_merge_are_found(place, tmp_path):
    """The same keys in two parts: each is compared with its own."""
    base = write_pipeline(tmp_path / "base", "text_encoder_2")
    parts = "text_encoder", "text_encoder_2"
    for part in parts:
        write_peft(tmp_path / "lora" / part, ENCODER)
    receipt = adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "out", verify=True)
    assert receipt.data["verified"]["tensors"] == 2
    assert set(receipt.data["parameters"]) == {f"{part}.{ENCODER}.weight" for part in parts}


def test_a_second_merge_knows_the_first(place, tmp_path):
    lora = place / "lora.safetensors"
    receipt = adapterkit.merge(place / "out", lora, out=tmp_path / "twice")
    assert any("is in out already, with weight 0.5" in note for note in receipt.data["notes"])
    assert [one["weight"] for one in receipt.data["held"]] == [0.5, 0.5]
    receipt = adapterkit.merge(place / "out", {lora: -0.5}, out=tmp_path / "back")
    assert not any("already" in note for note in receipt.data["notes"])
    for part in ("unet", "text_encoder"):
        back = load_file(tmp_path / "back" / part / file_of(part))
        for key, value in weights(part).items():
            torch.testing.assert_close(back[key], value)


@pytest.mark.parametrize("variants", [("", ".fp16"), (".fp16",)], ids=["both", "one"])
def test_the_unnamed_or_only_variant_is_merged(variants, place, tmp_path):
    """The one without a name, or the only one; others would be the unmerged model."""
    base = write_pipeline(tmp_path / "base", variants=variants)
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "model.ckpt").write_bytes(b"all in one")
    receipt = adapterkit.merge(base, place / "lora.safetensors", out=tmp_path / "out")
    written = {name for name in files_of(tmp_path / "out") if name.endswith("safetensors")}
    assert written == {f"{p}/{file_of(p, variants[0])}" for p in ("unet", "text_encoder", "vae")}
    note = next(note for note in receipt.data["notes"] if note.startswith("not copied"))
    assert "model.ckpt" in note or "more" in note
    merged = load_file(tmp_path / "out" / "unet" / file_of("unet", variants[0]))
    assert merged[f"{QUERY}.weight"].dtype == (torch.float16, torch.float32)[variants[0] == ""]


def test_a_chosen_variant_is_merged(place, tmp_path):
    base, lora = (
        write_pipeline(tmp_path / "base", variants=("", ".fp16")),
        place / "lora.safetensors",
    )
    (base / "vae" / file_of("vae", ".fp16")).unlink()
    receipt = adapterkit.merge(base, lora, variant="fp16", out=tmp_path / "out", verify=True)
    written = {name for name in files_of(tmp_path / "out") if name.endswith("safetensors")}
    halves = {f"{part}/{file_of(part, '.fp16')}" for part in ("unet", "text_encoder")}
    assert written == halves | {f"vae/{file_of('vae')}"}
    assert any("unet/diffusion_pytorch_model.safetensors" in note for note in receipt.data["notes"])
    assert adapterkit.verify(tmp_path / "out", base=base, adapters=lora)["tensors"] == 3
    one = write_peft(tmp_path / "one", QUERY)
    for wrong, words in ((base, "no part has"), (base / "unet", "--variant with this base")):
        with pytest.raises(Refused, match=words):
            adapterkit.merge(wrong, one, variant="bf8", out=tmp_path / "none")


def test_shards_of_a_variant(place, tmp_path):
    base, unet = write_pipeline(tmp_path / "base"), tmp_path / "base" / "unet"
    (unet / file_of("unet")).unlink()
    names = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    tensors, places = weights("unet", torch.float16), {}
    for number, name in enumerate(names):
        own = dict(list(tensors.items())[2 * number : 2 * number + 2])
        save_file(own, unet / name, {"format": "pt"})
        places |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 288}, "weight_map": places}
    index_file = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (unet / index_file).write_text(json.dumps(index))
    receipt = adapterkit.merge(base, place / "lora.safetensors", out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "unet" / index_file).read_text())
    assert written["weight_map"] == places
    assert {*names, index_file} <= {*os.listdir(tmp_path / "out" / "unet")}
    assert not any("not copied" in note for note in receipt.data["notes"])


def test_from_the_hub_to_the_hub(place, tmp_path):
    with Hub(token=TOKEN) as hub:
        hub.commit("org/pipeline", files_of(place / "base"))
        hub.commit("org/lora", {"lora.safetensors": (place / "lora.safetensors").read_bytes()})
        variables = os.environ | hub.environment(tmp_path) | {"HF_TOKEN": TOKEN}
        words = "merge", "org/pipeline", "org/lora:lora.safetensors=0.5", "--out"
        for out in ("hf://org/merged", tmp_path / "here"):
            done = command(*words, out, env=variables, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        there, own = hub.files("org/merged"), ("adapterkit.json", ".gitattributes", "README.md")
    here, expected = files_of(tmp_path / "here"), files_of(place / "out")
    for name in {*expected} - {*own}:
        assert there[name] == here[name] == expected[name], name
