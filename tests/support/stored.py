"""Models that are saved, opened as checkpoints, and what is collected of them."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.statistics.collect import collect_statistics
from adapterkit.statistics.file import write_statistics


def checkpoint(model: nn.Module, folder: Path, **options) -> Checkpoint:
    model.save_pretrained(folder, **options)
    return open_checkpoint(LocalFolder(folder))


def collected(base: Checkpoint, batches: list, tmp_path: Path, **options) -> dict[str, Tensor]:
    """The file of statistics, with a tensor for each name that shares one."""
    path = tmp_path / "stats.safetensors"
    with collect_statistics(base, batches, work=tmp_path / "work", **options) as results:
        write_statistics(path, results)
    assert not (tmp_path / "work").exists()
    tensors = load_file(path)
    for module, owner in results.shared.items():
        for key in [key for key in tensors if key.rpartition(".")[0] == owner]:
            if not key.endswith(".gradient"):
                tensors[f"{module}.{key.rpartition('.')[2]}"] = tensors[key]
    return tensors
