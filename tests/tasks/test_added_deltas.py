"""A delta of any kind that is added to a weight: the claim on memory, and whether it is dense."""

import pytest
import torch
from safetensors.torch import save_file

from adapterkit.adapters.formats.merged_deltas import AddDelta
from adapterkit.adapters.formats.modules.deltas import ModuleDelta
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.tensors import from_spec
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.tasks.edits import Band
from adapterkit.kernels.lowrank.algebra import Product
from tests.tasks.test_laws import peak

OUT, IN = 768, 512
PAIR = {"a": (8, IN), "b": (OUT, 8)}
CASES = {  # kind, parts
    "lora": ("lora", PAIR),
    "lora of full rank": ("lora", {"a": (600, IN), "b": (OUT, 600)}),
    "loha": ("loha", {"w1_a": (OUT, 4), "w1_b": (4, IN), "w2_a": (OUT, 4), "w2_b": (4, IN)}),
    "loha of high rank": (
        "loha", {"w1_a": (OUT, 24), "w1_b": (24, IN), "w2_a": (OUT, 24), "w2_b": (24, IN)},
    ),
    "lokr": ("lokr", {"w1": (4, 4), "w2": (OUT // 4, IN // 4)}),
    "lokr of factors": ("lokr", {"w1": (4, 4), "w2_a": (OUT // 4, 2), "w2_b": (2, IN // 4)}),
    "full": ("full", {"diff": (OUT, IN)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_memory_of_an_added_delta(name, tmp_path, one_thread):
    kind, shapes = CASES[name]
    torch.manual_seed(0)
    save_file(
        {k: torch.randn(v).bfloat16() for k, v in shapes.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    folder = LocalFolder(tmp_path)
    specs = dict(open_checkpoint(folder).tensors)
    parts = {role: from_spec(specs[role]) for role in shapes}
    delta = ModuleDelta(AdapterModule("", "m", kind, parts, alpha=1.0, rank=1))
    edit, grid = AddDelta(delta, 0.5, Band(0, OUT)), (OUT, IN)
    with Sources((folder,), {}) as sources, torch.inference_mode():
        reader = LocalReader(sources, torch.device("cpu"))
        edit.load(reader, specs[next(iter(shapes))], grid)  # what is cached once
        with torch.profiler.profile(profile_memory=True) as profile:
            edit.load(reader, specs[next(iter(shapes))], grid)
        is_product = isinstance(delta.value(reader.view(None)), Product)
    assert edit.is_dense != is_product
    assert peak(profile) <= edit.memory
