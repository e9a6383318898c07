"""Two processes that train together: DDP, FSDP and a Trainer give what one process gives."""

import gc
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterkit import LoraConfig
from adapterkit.core.errors import Refused
from adapterkit.runtime import LoraFA, Riemannian, attach
from tests.support.forks import forks
from tests.support.live import llama, on_meta, tokens

WORLD, STEPS = 2, 3
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(4, 8, TARGETS, init=False),
    "dora": LoraConfig(4, 8, TARGETS, init=False, dora=True),
}
OPTIMIZERS = {
    "adamw": lambda h: torch.optim.AdamW(h.parameters(), lr=1e-2),
    "lora-fa": lambda h: LoraFA(h, lr=1e-2),
    "riemannian": lambda h: Riemannian(h, torch.optim.SGD, lr=1e-1),
}
PAIRS = [("lora", "adamw"), ("dora", "adamw"), ("lora", "lora-fa"), ("lora", "riemannian")]
CASES = [(kind, *pair) for kind in ("ddp", "fsdp2") for pair in PAIRS]
CASES += [("fsdp1", "lora", "adamw"), ("from meta", "lora", "adamw")]


def make(config):
    return attach(llama(), CONFIGS[config], seed=1)


def batch(step, rank=None):
    """Rows of a step: all of them, or a process's share."""
    rows = tokens(4, 8, seed=step)
    return rows if rank is None else rows.chunk(WORLD)[rank]


def steps(model, optimizer, rank=None):
    """Losses; of several processes their mean."""
    values = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step, rank)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if rank is not None:
            torch.distributed.all_reduce(loss)
            loss /= WORLD
        values.append(loss.item())
    return values


def ddp(h):
    return torch.nn.parallel.DistributedDataParallel(h.model)


def fsdp2(h):
    from torch.distributed.fsdp import fully_shard

    for layer in h.model.model.layers:
        fully_shard(layer)
    return fully_shard(h.model)


def fsdp1(h):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    with warnings.catch_warnings():  # that frozen and trained parameters share a wrapper
        warnings.simplefilter("ignore", UserWarning)
        return FullyShardedDataParallel(
            h.model,
            auto_wrap_policy=ModuleWrapPolicy({type(h.model.model.layers[0])}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )


def from_meta(h):
    """Sharded before the base has values: an adapter on a model of the meta device."""
    from torch.distributed.tensor import distribute_tensor

    model = fsdp2(h).to_empty(device="cpu")
    shards = {
        key: distribute_tensor(value, own.device_mesh, own.placements)
        for (key, value), own in zip(
            llama().state_dict().items(), model.state_dict().values(), strict=True
        )
    }
    model.load_state_dict(shards, assign=True)
    model.model.rotary_emb = llama().model.rotary_emb  # has buffers that no state dict has
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1, "from meta": from_meta}


def save(h, model, kind, folder):
    """h.save on all processes; FSDP1's parameters are whole only where it says so."""
    if kind != "fsdp1":
        h.save(folder)
        return
    with pytest.raises(Refused, match="summon_full_params"):
        h.save(folder)
    with model.summon_full_params(model):
        h.save(folder)


def work(rank, folder):
    """What each process does: all cases, one after the other."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",  # accelerate wants to see it
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)  # a free port may be taken
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for kind, config, optimizer in CASES:
        name = f"{kind}-{config}-{optimizer}"
        h = attach(on_meta(), CONFIGS[config], seed=1) if kind == "from meta" else make(config)
        if kind == "ddp":  # which counts what is trained when it is made; LoRA-FA freezes a
            update = OPTIMIZERS[optimizer](h)
            model = ddp(h)
        else:
            model = WRAPPERS[kind](h)
            update = OPTIMIZERS[optimizer](h)
        sharded = {type(p).__name__ for p in h.parameters()}
        losses = steps(model, update, rank)
        save(h, model, kind, folder / name)
        results[name] = {"losses": losses, "sharded": sorted(sharded)}
    results["restored"] = restored(folder, rank)
    results["trainer"] = trained(folder)
    results["reference"] = referenced(rank)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def restored(folder, rank):
    """Losses with sharded parameters that took a checkpoint's values."""
    from adapterkit.runtime.training.trainer import restore

    h = make("lora")
    model = fsdp2(h)
    torch.distributed.barrier()
    restore(h.state, folder / "fsdp2-lora-adamw")
    return steps(model, OPTIMIZERS["adamw"](h), rank)


def referenced(rank):
    """How far the reference of sharded parameters is from the model as it was, and what is trained
    from what it was before the call."""
    from adapterkit.runtime.training.trainer import Reference, current_values

    h = make("lora")
    parts = [part for _, part in h.state.adapters["default"].patches()]
    reference = Reference(h.model, current_values(parts))
    x = batch(9)
    before = h.model(x).logits.detach()
    model = fsdp2(h)
    steps(model, OPTIMIZERS["adamw"](h), rank)
    with torch.no_grad():
        trained = model(x).logits
        distances = [(reference(x).logits - before).abs().max().item()]
        distances += [(model(x).logits - trained).abs().max().item()]
    return [*distances, (trained - before).abs().max().item()]


def trained(folder):
    """Losses of a Trainer, and of one that resumes."""
    from transformers import Trainer, TrainingArguments

    table = []
    for out, resume in (("whole", None), ("again", "whole/checkpoint-2")):
        h = make("lora")
        arguments = TrainingArguments(
            output_dir=str(folder / out), per_device_train_batch_size=2, max_steps=4, save_steps=2,
            logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
        )  # fmt: skip
        rows = tokens(16, 8)
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = h.trainer(Trainer)(model=h.model, args=arguments, train_dataset=data)
        assert trainer.args.world_size == WORLD
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
        table.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        torch.distributed.barrier()
    return table


def start(folder):
    """Two forks of a process that has imported what they need: transformers takes longer than they
    do."""
    import transformers

    make("lora").trainer(transformers.Trainer)
    gc.freeze()
    torch.multiprocessing.start_processes(work, (Path(folder),), nprocs=WORLD, start_method="fork")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two processes, and the folder with what they saved."""
    folder = tmp_path_factory.mktemp("two")
    server = forks()
    program = f"from tests.runtime import test_distributed as t; t.start({str(folder)!r})"
    ended = server.wait(server.start(program=program), 300)
    assert ended.status == 0, ended.stderr
    return json.loads((folder / "results.json").read_text()), folder


@pytest.mark.parametrize("kind, config, optimizer", CASES)
def test_as_one_process(kind, config, optimizer, two, tmp_path):
    """Losses and the saved adapter, to rounding."""
    results, folder = two
    name = f"{kind}-{config}-{optimizer}"
    h = make(config)
    expected = steps(h.model, OPTIMIZERS[optimizer](h))
    assert results[name]["losses"] == pytest.approx(expected, rel=1e-6)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3)
    plain = kind in ("ddp", "fsdp1")
    assert results[name]["sharded"] == ["Parameter" if plain else "DTensor"]
    h.save(tmp_path / "one")
    ours = load_file(folder / name / "adapter_model.safetensors")
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert ours.keys() == one.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, one[key], rtol=1e-4, atol=2e-5)


def test_sharded_parameters_take_a_checkpoint(two):
    results, folder = two
    from adapterkit.runtime import load

    h = load(llama(), folder / "fsdp2-lora-adamw", trainable=True)
    assert results["restored"] == pytest.approx(steps(h.model, OPTIMIZERS["adamw"](h)), rel=1e-6)


def test_trainer_of_two_processes_resumes(two):
    results, folder = two
    whole, again = results["trainer"]
    assert len(whole) == 4 and whole == again
    names = {path.name for path in Path(folder, "whole", "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert "model.safetensors" not in names


def test_a_reference_of_sharded_parameters(two):
    was, present, moved = two[0]["reference"]
    assert was < 1e-5 and present == 0 and moved > 1e-2
