"""Plans on a quantized base of the Hub ask for a weight of each kind, not for each weight."""

import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import adapterkit
from adapterkit.core.checkpoint.header import FIRST_READ
from tests.support import oracle, quantized_llama
from tests.support.bnb import STATE, text
from tests.support.hub_client import Client
from tests.support.hub_server import Hub
from tests.support.usual import usual

LAYERS, WIDTH, KINDS = 12, 128, 7
SHARDS = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
FORMS = ("nf4", "nf4-double", "int8", "int4-g_idx", "int4-unused", "int4-symmetric")
LAST = f"model.layers.{LAYERS - 1}.mlp.down_proj"  # in the last shard


def in_shards(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The files of a model in three shards, by layers."""
    numbers = {key: int(key.split(".")[2]) if ".layers." in key else 0 for key in tensors}
    where = {key: SHARDS[3 * number // LAYERS] for key, number in numbers.items()}
    files = {
        name: save({key: value for key, value in tensors.items() if where[key] == name})
        for name in SHARDS
    }
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def quantized(form: str, plain: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model in a form; the config is in the folder then."""
    if form in ("nf4", "nf4-double", "int8"):
        adapterkit.quantize(
            plain, to=form.partition("-")[0], double_quant="double" in form, out=folder
        )
        return load_file(folder / "model.safetensors")
    shutil.copytree(plain, folder)
    base = quantized_llama.FORMS["int4" if form == "int4-symmetric" else "int4-g_idx"]
    quantized_llama.quantize(folder, base)
    tensors = load_file(folder / "model.safetensors")
    for key, value in list(tensors.items()):
        if form == "int4-unused" and key.endswith("g_idx"):
            tensors[key] = torch.full_like(value, -1)
        if form == "int4-symmetric" and key.endswith(".weight_scale"):
            tensors[key.replace("weight_scale", "weight_zero_point")] = torch.zeros_like(value)
    return tensors


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A Hub with the model in each form, a client, the folder with the same files, and the forms'
    tensors."""
    folder = tmp_path_factory.mktemp("quantized")
    model = oracle.llama(hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS)
    model.to(torch.bfloat16).save_pretrained(folder / "plain")
    factors = {}
    for i in range(LAYERS):
        prefix = f"base_model.model.model.layers.{i}.mlp.down_proj.lora_"
        factors[f"{prefix}A.weight"] = torch.randn(4, 256)
        factors[f"{prefix}B.weight"] = torch.randn(WIDTH, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]}
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = {form: quantized(form, folder / "plain", folder / form) for form in FORMS}
    with Hub() as hub:
        for form in FORMS:
            (folder / form / "model.safetensors").unlink()
            for name, data in in_shards(tensors[form]).items():
                (folder / form / name).write_bytes(data)
            hub.commit(f"org/{form}", {p.name: p.read_bytes() for p in (folder / form).iterdir()})
        client = Client(os.environ | hub.environment(folder / "home"), folder / "stderr")
        client(f"import adapterkit, os, shutil\nos.chdir({str(folder)!r})")
        # weights of a real checkpoint are larger than what is read along
        client("from adapterkit.core.checkpoint import reader\nreader.FAR = 0")
        yield hub, client, folder, tensors
        client.close()


CALLS = {
    "merge": "adapterkit.merge('{base}', ['adapter'], {more})",
    "init": "adapterkit.init('{base}', method='pissa', rank=2, targets='down_proj', {more})",
    "dequantize": "adapterkit.dequantize('{base}', {more})",
}


@pytest.mark.parametrize(
    ("form", "verb"),
    usual(itertools.product(FORMS, CALLS), lambda row: row[1] == "merge" or row[0] == "nf4-double"),
)
def test_a_plan_asks_for_one_weight_of_each_kind(bench, form, verb):
    hub, client, *_ = bench
    client("shutil.rmtree('home', ignore_errors=True)")
    hub.log.clear()
    call = CALLS[verb].format(base=f"org/{form}", more="out='planned', dry_run=True")
    client(f"{call}\nNone")
    count, sent = Counter(), Counter()
    for asked in hub.asked("GET", "/resolve/"):
        name = asked.path.rpartition("/")[2]
        count[name] += 1
        sent[name] += asked.sent
    first, *others = SHARDS
    assert [(count[name], sent[name]) for name in others] == [(1, FIRST_READ)] * 2
    states = KINDS if form.startswith("nf4") else 0
    assert 1 <= count[first] <= 1 + states and sent[first] <= FIRST_READ + 4096


@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_are_those_of_a_local_base(bench, form):
    _, client, folder, _ = bench
    dequantize = ", dequantize=True" if form == "int4-symmetric" else ""
    for base, out in ((f"org/{form}", f"{form}-hub"), (form, f"{form}-local")):
        more = f"out='{out}', hash='none'{dequantize}"
        client(CALLS["merge"].format(base=base, more=more) + "\nNone")
    outputs = [folder / f"{form}-{side}" for side in ("hub", "local")]
    names = sorted(path.name for path in outputs[1].glob("*.safetensors"))
    assert names
    for name in names:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


STATE_KEY = f"{LAST}.weight{STATE}nf4"
SHAPE = [WIDTH, 256]


def state(**changes) -> torch.Tensor:
    value = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": SHAPE}
    return text(value | changes)


WRONG = {
    "turned": ("nf4", STATE_KEY, state(shape=SHAPE[::-1]), "the state"),
    "block": ("nf4", STATE_KEY, state(blocksize=32), "the state"),
    "no-json": ("nf4", STATE_KEY, torch.zeros_like(state()), "the state"),
    "map": ("nf4", f"{LAST}.weight.quant_map", torch.zeros(16), "another table"),
    "format": ("int8", f"{LAST}.weight_format", torch.tensor(1, dtype=torch.uint8), "format 1"),
    "g_idx": ("int4-g_idx", f"{LAST}.weight_g_idx", torch.full((256,), 8).int(), "out of range"),
    "zero": (
        "int4-symmetric",
        f"{LAST}.weight_zero_point",
        torch.ones(WIDTH, 8, dtype=torch.bfloat16),
        "symmetric, with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_not_read_for_the_plan_are_checked_when_read(bench, case):
    hub, client, folder, tensors = bench
    form, key, value, problem = WRONG[case]
    assert key in tensors[form] and value.shape[1:] == tensors[form][key].shape[1:]
    files = in_shards(tensors[form] | {key: value})
    hub.commit(f"org/{case}", {p.name: p.read_bytes() for p in (folder / form).iterdir()} | files)
    call = CALLS["merge"].format(base=f"org/{case}", more=f"out='{case}', dequantize=True")
    error = client.refusal(call, "Unrecoverable")
    assert problem in error.parts["problem"] and LAST in error.parts["problem"]
    assert not (folder / case).exists()
