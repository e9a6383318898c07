"""Models that are saved, opened as checkpoints, and what is collected of them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.verbs.stats.collect import CollectedFile, collect
from adapterkit.verbs.stats.verb import StatsOptions


def checkpoint(model: nn.Module, folder: Path, **options) -> Checkpoint:
    model.save_pretrained(folder, **options)
    return open_checkpoint(LocalFolder(folder))


def collect_sums(base: Checkpoint, batches: list, work: Path, memory=10**9, whole=False, **more):
    """Collect what the options say."""
    running = {key: more.pop(key) for key in ("progress", "blocks", "attempt") if key in more}
    device, running = more.pop("device", "cpu"), {"progress": lambda done, total: None} | running
    options = StatsOptions(whole_model=whole, **more)
    work.mkdir(parents=True, exist_ok=True)
    collect(
        base, batches, options, work=work, memory=memory, device=torch.device(device), **running
    )
    return CollectedFile(work, options, len(batches))


def tensors_of(file: CollectedFile) -> dict[str, Tensor]:
    """Those of the file of statistics, with a tensor for each name that shares one."""
    nothing: Any = SimpleNamespace(device=torch.device("cpu"))  # sums are read from their files
    made = [task.compute(nothing).tensors for task in file.tasks]
    tensors = {key: value for each in made for key, value in each.items()}
    for module, owner in file.shared.items():
        for key in [key for key in tensors if key.rpartition(".")[0] == owner]:
            if not key.endswith(".gradient"):
                tensors[f"{module}.{key.rpartition('.')[2]}"] = tensors[key]
    return tensors


def collected(base: Checkpoint, batches: list, tmp_path: Path, **options) -> dict[str, Tensor]:
    """What is collected, by names."""
    work = tmp_path / "work"
    tensors = tensors_of(collect_sums(base, batches, work, **options))
    shutil.rmtree(work)
    return tensors
