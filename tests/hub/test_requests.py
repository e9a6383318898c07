"""What is asked of the Hub: headers for a plan, adapters once, of a base no more than is needed."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from adapterkit.core.checkpoint.header import FIRST_READ
from tests.hub.test_merge import LAYERS, SHARDS, WIDTH, base_files
from tests.support import quantized_llama
from tests.support.hub_client import Client
from tests.support.hub_server import Hub

RANK = 32
OF_QUERIES = "model.layers.0.self_attn.q_proj."


def adapter_files(seed: int) -> dict[str, bytes]:
    """An adapter of `base_files` that is several times as large as what a header is read with."""
    generator, factors = np.random.default_rng(seed), {}
    for module in [f"model.layers.{i}.self_attn.{k}_proj" for i in range(LAYERS) for k in "qv"]:
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK))):
            value = generator.standard_normal(shape).astype(np.float32)
            factors[f"base_model.model.{module}.lora_{side}.weight"] = value
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    config["target_modules"] = ["q_proj", "v_proj"]
    return {
        "adapter_model.safetensors": save(factors),
        "adapter_config.json": json.dumps(config).encode(),
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    with Hub() as hub:
        hub.commit("org/base", base_files())
        for seed, name in enumerate(("a", "b", "general")):
            hub.commit(f"org/{name}", adapter_files(seed))
        client = Client(os.environ | hub.environment(folder / "home"), folder / "stderr")
        client(f"import adapterkit, os, shutil\nos.chdir({str(folder)!r})")
        # tensors of a real checkpoint are further from each other than neighbors may be
        client("from adapterkit.core.checkpoint import reader\nreader.FAR = 0")
        yield hub, client
        client.close()


def asked(bench, code: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Of each repository's file of weights how many GETs there were, and their bytes."""
    hub, client = bench
    client("shutil.rmtree('home', ignore_errors=True)")
    hub.log.clear()
    client(f"{code}\nNone")
    count, sent = Counter(), Counter()
    for one in hub.asked("GET", "/resolve/"):
        if one.path.endswith(".safetensors"):
            repo, _, rest = one.path.removeprefix("/org/").partition("/")
            where = repo, rest.rpartition("/")[2]
            count[where] += 1
            sent[where] += one.sent
    return {where: (count[where], sent[where]) for where in count}


ADAPTERS = {
    "combine": "combine(['org/a', 'org/b'], method='ties', density=0.5, rank=8, base='org/base'",
    "subtract": "subtract(['org/a', 'org/b'], general=['org/general'], base='org/base'",
    "arrow": "arrow(['org/a', 'org/b'], general=['org/general']",
    "convert": "convert('org/a', to='mlx'",
    "resize": "resize('org/a', rank=4, base='org/base'",
}


@pytest.mark.parametrize("verb", ADAPTERS)
def test_adapters_are_downloaded_once(bench, verb):
    size = len(adapter_files(0)["adapter_model.safetensors"])
    moved = asked(bench, f"adapterkit.{ADAPTERS[verb]}, out={verb!r})")
    of_base = {where: moved.pop(where) for where in list(moved) if where[0] == "base"}
    assert all(found == (1, FIRST_READ) for found in of_base.values())
    # the header, which the plan is made from, then the file
    assert moved and set(moved.values()) == {(2, FIRST_READ + size)}


@pytest.mark.parametrize("verb", ADAPTERS)
def test_a_plan_reads_headers(bench, verb):
    moved = asked(bench, f"adapterkit.{ADAPTERS[verb]}, out='planned', dry_run=True)")
    assert moved and set(moved.values()) == {(1, FIRST_READ)}


def test_a_fingerprint_takes_no_request(bench, llama):
    """Of a base on the Hub it is that of the headers."""
    bench[0].commit("org/llama", {path.name: path.read_bytes() for path in llama.iterdir()})
    size = min(FIRST_READ, (llama / "model.safetensors").stat().st_size)
    call = "init('org/llama', method='orthogonal', rank=2, targets='q_proj', out='new'"
    moved = asked(bench, f"plan = adapterkit.{call}, dry_run=True)")
    assert moved == {("llama", "model.safetensors"): (1, size)}
    text = bench[1]("plan.shards[0].metadata['adapterkit_base']")
    assert text.startswith("1:") and text.endswith(":----------------")


def test_diff_reads_the_files_that_differ(bench):
    hub, _ = bench
    files = base_files()
    changed = bytearray(files[SHARDS[1]])
    changed[-1] ^= 1
    hub.commit("org/other", files | {SHARDS[1]: bytes(changed)})
    moved = asked(bench, "result = adapterkit.diff('org/base', 'org/other')")
    for repo in ("base", "other"):
        expected = [(1, FIRST_READ), (2, FIRST_READ + len(changed)), (1, FIRST_READ)]
        assert [moved[repo, name] for name in SHARDS] == expected
    totals = bench[1]("result['totals']")
    assert (totals["identical"], totals["changed"]) == (2 * LAYERS + 1, 1)


def quantized(bench, form: str, folder, **changes: torch.Tensor) -> str:
    hub, _ = bench
    quantized_llama.base(quantized_llama.FORMS[form], folder)
    if changes:
        quantized_llama.change(folder, changes)
    name = f"org/{form}{'-changed' * bool(changes)}"
    hub.commit(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    return name


@pytest.mark.parametrize("form", ["fp8", "fp8-block", "nvfp4", "mxfp4", "gptq4", "awq", "int4"])
def test_no_request_for_each_quantized_weight(bench, form, tmp_path):
    name = quantized(bench, form, tmp_path)
    moved = asked(bench, f"adapterkit.dequantize({name!r}, out='planned', dry_run=True)")
    [(count, _)] = moved.values()
    assert count <= 2


def test_unread_indices_are_checked_when_decoded(bench, tmp_path):
    wrong = torch.full((64,), 9).int()
    name = quantized(bench, "gptq4", tmp_path, **{OF_QUERIES + "g_idx": wrong})
    _, client = bench
    error = client.refusal(f"adapterkit.dequantize({name!r}, out='never')", "Unrecoverable")
    assert f"groups out of range in {OF_QUERIES}g_idx" in error.text
