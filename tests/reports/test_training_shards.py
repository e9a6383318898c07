"""Folders that have the shards of a training: messages name the command that joins them, and the
programs' own commands do."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

import adapterkit
from adapterkit.core.errors import Refused
from tests.support.inspections import inspect

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DO = f"join them, then convert the result with its {CONFIG}"
# the folder of the shards -> their program, and its command
COMMANDS = {
    "pytorch_model_fsdp_0": (
        "shards of FSDP",
        "accelerate merge-weights run/pytorch_model_fsdp_0 joined",
    ),
    "step-10": (
        "shards of torch.distributed.checkpoint",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch run/step-10 joined.pt",
    ),
    "global_step10": (
        "shards of ZeRO",
        "python -m deepspeed.utils.zero_to_fp32 run joined --exclude_frozen_parameters",
    ),
}


# one process saves here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(params=COMMANDS)
def shards(request, lora, tmp_path, monkeypatch):
    """An adapter in the folder `run`, with the shards of two steps of a training."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lora, "run")
    if request.param == "global_step10":
        for step in (9, 10):
            folder = Path(f"run/global_step{step}")
            folder.mkdir()
            for rank in range(2):
                name = f"zero_pp_rank_{rank}_mp_rank_00"
                (folder / f"{name}_model_states.pt").write_bytes(b"not read")
                (folder / f"bf16_{name}_optim_states.pt").write_bytes(b"not read")
        return request.param
    # as a module saves them: with the adapter's name in the keys
    tensors = load_file(lora / FILE)
    state = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    state = {"model": state} if "fsdp" in request.param else state
    save_shards(state, checkpoint_id=f"run/{request.param}", no_dist=True)
    optimizer = {"optimizer": {"step": torch.ones(1)}}
    save_shards(optimizer, checkpoint_id="run/optimizer_0", no_dist=True)
    return request.param


def change(edit):
    tensors = load_file(f"run/{FILE}")
    save_file({key: edit(key, t.clone()) for key, t in tensors.items()}, f"run/{FILE}")


def half(key, t):
    if "lora_B" in key:
        t[len(t) // 2 :] = 0
    return t


def test_lost_rows_next_to_shards(shards, llama):
    """`inspect` prints the command; the warning of a merge goes into the receipt, and names no
    path."""
    what, command = COMMANDS[shards]
    change(half)
    (problem,) = inspect("run")["problems"]
    assert problem["problem"].startswith("half of the rows of every b are zero: ")
    assert (problem["hint"], problem["command"]) == (f"the folder has {what}: {DO}", command)
    (warning,) = adapterkit.merge(llama, "run", out="out", dry_run=True).warnings
    assert warning == f"run: {problem['problem']}; the folder has {what}: {DO}"


def test_empty_factors_next_to_shards(shards, llama):
    """ZeRO-3 leaves parameters without elements."""
    change(lambda key, t: t[:0] if "lora_B" in key else t)
    with pytest.raises(Refused) as error:
        adapterkit.merge(llama, "run", out="out")
    what, command = COMMANDS[shards]
    assert f"hint: the folder has {what}: {DO}\n  {command}" in str(error.value)
    assert {one["command"] for one in inspect("run")["problems"]} >= {command}


@pytest.mark.parametrize("missing", [[FILE], [FILE, CONFIG]])
@pytest.mark.parametrize("verb", ["merge", "convert", "inspect"])
def test_shards_without_the_weights_of_an_adapter(shards, llama, verb, missing):
    for name in missing:
        os.remove(f"run/{name}")
    call = {
        "merge": lambda folder: adapterkit.merge(llama, folder, out="out"),
        "convert": lambda folder: adapterkit.convert(folder, to="peft", out="out"),
        "inspect": lambda folder: adapterkit.inspect(folder, headers=True),
    }[verb]
    what, command = COMMANDS[shards]
    for folder in ("run", f"run/{shards}"):
        if folder == "run" and verb == "inspect" and CONFIG not in missing:
            (found,) = inspect("run")["problems"]
            assert (found["hint"], found["command"], found["code"]) == (DO, command, "AK206")
            continue
        with pytest.raises(Refused, match=f"no weights of an adapter, but {what}") as error:
            call(folder)
        assert error.value.code == "AK206"
        assert str(error.value).endswith(f"hint: {DO}\n  {command}")


def test_shards_of_an_optimizer_are_no_weights(shards, llama):
    shutil.rmtree(f"run/{shards}")
    shutil.rmtree("run/global_step9", ignore_errors=True)
    os.remove(f"run/{FILE}")
    with pytest.raises(Refused, match=f"no {FILE}"):
        adapterkit.merge(llama, "run", out="out")


@pytest.mark.parametrize("shards", ["pytorch_model_fsdp_0", "step-10"], indirect=True)
def test_the_command_joins_them_and_convert_reads_the_result(shards, lora):
    """DeepSpeed does not run here: its module and options are those of its source."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = shlex.split(COMMANDS[shards][1])
    subprocess.run(words, check=True, env=os.environ | {"PATH": path}, capture_output=True)
    is_file = os.path.isfile("joined.pt")
    shutil.copy(lora / CONFIG, "." if is_file else "joined")
    adapterkit.convert(words[-1], to="peft", allow_pickle=is_file, out="whole")
    whole, original = load_file(f"whole/{FILE}"), load_file(lora / FILE)
    assert whole.keys() == original.keys()
    assert all(torch.equal(whole[key], original[key]) for key in whole)
