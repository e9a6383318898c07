"""The local engine's arithmetic: float64 bases, and CUDA where there is a card."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.engine import buffers, file_threads, local
from adapterkit.core.errors import Failed, Refused
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.tasks import rows


def job(folder, dtype, rows=700, columns=513):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    a, b = torch.randn(8, columns) * 0.1, torch.randn(rows, 8) * 0.1
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file(
        {"x.weight": weight, "y.weight": weight.clone()}, folder / "base" / "model.safetensors"
    )
    factors = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 12})
    )
    return weight.double() + 1.5 * b.double() @ a.double()


def merged(folder, out="out", **options):
    adapterkit.merge(
        folder / "base", [folder / "adapter"], out=folder / out, verify=True, **options
    )
    return load_file(folder / out / "model.safetensors")


def test_a_float64_base_is_merged_in_float64(tmp_path):
    exact = job(tmp_path, torch.float64)
    actual = merged(tmp_path)
    assert actual["x.weight"].dtype == torch.float64
    assert (actual["x.weight"] - exact).abs().max() < 1e-13


def test_a_device_that_is_not_there_is_refused(tmp_path):
    job(tmp_path, torch.bfloat16)
    for device in (f"cuda:{torch.cuda.device_count()}", "tpu", "cuda:x"):
        with pytest.raises(Refused, match="device"):
            merged(tmp_path, device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_gives_the_rounded_value_and_the_same_bytes_every_time(dtype, tmp_path):
    exact = job(tmp_path, dtype, 3000, 4096)
    first, second = merged(tmp_path, device="cuda"), merged(tmp_path, "again", device="cuda")
    assert torch.equal(first["x.weight"], second["x.weight"])
    assert torch.equal(first["y.weight"], second["y.weight"])
    wrong = first["x.weight"] != exact.to(dtype)
    assert wrong.float().mean() < 1e-4
    assert torch.allclose(
        first["x.weight"].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_memory_that_runs_out_at_any_allocation_ends_cleanly_and_resumes(tmp_path, monkeypatch):
    job(tmp_path, torch.bfloat16)
    merged(tmp_path, "undisturbed")
    empty, failed = torch.empty, 0
    while True:
        left = failed + 1

        def allocate(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise MemoryError
            return empty(*args, **options)

        monkeypatch.setattr(torch, "empty", allocate)
        try:
            adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], out=tmp_path / "out")
        except Failed as error:
            failed += 1
            assert "out of memory" in str(error) and "--resume" in str(error)
            assert not (tmp_path / "out").exists()
            monkeypatch.undo()
            adapterkit.merge(
                tmp_path / "base", [tmp_path / "adapter"], out=tmp_path / "out", resume=True
            )
        else:
            break
        finally:
            monkeypatch.undo()
        ours, right = (tmp_path / name / "model.safetensors" for name in ("out", "undisturbed"))
        assert ours.read_bytes() == right.read_bytes()
        shutil.rmtree(tmp_path / "out")
    assert failed >= 2


def test_a_large_embedding_is_merged_under_a_cap_below_its_size(tmp_path):
    """50,000 rows: 410 MB as stored, 820 MB in float32, with 400 MB of memory to spare."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file(
        {"embed.weight": torch.ones(50_000, 4096, dtype=torch.bfloat16)},
        tmp_path / "base" / "model.safetensors",
    )
    factors = {
        "lora_embedding_A": torch.full((4, 50_000), 0.5),
        "lora_embedding_B": torch.full((4096, 4), 0.25),
    }
    factors = {f"base_model.model.embed.{key}": tensor for key, tensor in factors.items()}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    )
    script = """
import resource, sys, torch, adapterkit.core.merge.verb, adapterkit.core.engine.local
used = sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 400_000_000,) * 2)
adapterkit.core.merge.verb.merge(sys.argv[1], [sys.argv[2]], out=sys.argv[3])
"""
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert bool((load_file(tmp_path / "out" / "model.safetensors")["embed.weight"] == 1.5).all())


def test_a_worker_is_done_when_it_holds_no_tensor(tmp_path, monkeypatch):
    """The process may end then: a thread that still freed one would abort it."""
    held, alive, caller = {}, [], threading.get_ident()

    class Watched(buffers.StagingBuffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if threading.get_ident() != caller:
                held.setdefault(threading.get_ident(), []).append(weakref.ref(self))

    def finish(running):
        if threading.get_ident() in held:
            alive.extend(rooms() is not None for rooms in held[threading.get_ident()])
        real(running)

    real = file_threads.Running.finish
    monkeypatch.setattr(buffers, "StagingBuffers", Watched)
    monkeypatch.setattr(file_threads.Running, "finish", finish)
    job(tmp_path, torch.bfloat16)
    merged(tmp_path)
    assert alive and not any(alive)


def test_files_are_written_in_turn(tmp_path, monkeypatch):
    """Each file's hash is one core's work: there are as many files in the making as workers, so as
    many hashes."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    names = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    for name in names:
        save_file({f"{name[6]}.weight": torch.ones(2048, 1024)}, tmp_path / "base" / name)
    index = {"metadata": {}, "weight_map": {f"{name[6]}.weight": name for name in names}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    factors = {f"base_model.model.{i}.lora_A.weight": torch.ones(4, 1024) for i in (1, 2, 3)}
    factors |= {f"base_model.model.{i}.lora_B.weight": torch.ones(2048, 4) for i in (1, 2, 3)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    )
    monkeypatch.setattr(rows, "ELEMENTS", 1 << 14)  # 32 pieces of each
    order, real = [], local._ShardRun._do
    monkeypatch.setattr(
        local._ShardRun,
        "_do",
        lambda job, piece, *rest: (order.append(piece.shard.shard.file), real(job, piece, *rest)),
    )
    for workers in (1, 2):
        order.clear()
        out = tmp_path / str(workers)
        run(
            adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], out=out, dry_run=True),
            Stage(FolderOutput(out)),
            local.local(workers=workers),
        )
        first = order[: len(order) // 2]
        assert set(order) == set(names)
        assert (
            sum(a != b for a, b in itertools.pairwise(first)) >= 2
            if workers == 2
            else order == sorted(order)
        )
    assert all(
        (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        for name in names
    )
