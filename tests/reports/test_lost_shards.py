"""Adapters that were saved without a process's shard, and those with zeros of their own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from tests.support import oracle
from tests.support.inspections import inspect, problems_of

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATHER = "gather the shards and save it again (FSDP, ZeRO-3, tensor parallelism)"
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    oracle.save_base(oracle.llama(), folder / "base", "fp32")
    oracle.train(oracle.llama(), folder / "adapter", target_modules=LINEAR, r=4)
    return folder


def warned(trained, *adapters):
    """The warnings of a merge."""
    plan = adapterkit.merge(trained / "base", adapters, out="planned", dry_run=True)
    return list(plan.warnings)


def changed(source, out, change):
    """The adapter with what `change` makes of each tensor by its key."""
    out.mkdir()
    tensors = load_file(source / FILE)
    save_file({key: change(key, t.clone()) for key, t in tensors.items()}, out / FILE)
    (out / CONFIG).write_text((source / CONFIG).read_text())
    return out


def lost(t, axis, first, last, of):
    """A tensor without the shares of some processes, as torch.chunk cuts them."""
    for part in torch.chunk(t, of, axis)[first:last]:
        part.zero_()
    return t


SHARES = {
    (1, 2, 2): "half of the rows of every b are zero",
    (0, 1, 2): "half of the rows of every b are zero",
    (1, 2, 4): "a quarter of the rows of every b are zero",
    (1, 4, 4): "three quarters of the rows of every b are zero",
    (2, 3, 3): "10 of 10 trained modules have a block of zeros",
    (1, 8, 8): "10 of 10 trained modules have a block of zeros",
}


@pytest.mark.parametrize("first, last, of", SHARES)
def test_a_share_of_all_b_is_a_problem(tmp_path, trained, first, last, of):
    """One problem with all modules; `diagnose` says it too."""
    lose = lambda key, t: lost(t, 0, first, last, of) if "lora_B" in key else t
    adapter = changed(trained / "adapter", tmp_path / "lost", lose)
    (found,) = problems_of(inspect(adapter))
    assert found.startswith(f"{SHARES[first, last, of]}: model.layers.0")
    assert " rows of b, " in found and found.endswith("and 7 more")
    if of == 2:
        base = trained / "base"
        adapterkit.merge(base, adapter, out=tmp_path / "merged")
        receipt = json.loads((tmp_path / "merged/adapterkit.json").read_text())
        assert receipt["warnings"] == [f"lost: {found}; {GATHER}"]
        assert warned(trained, trained / "adapter", adapter) == receipt["warnings"]
        said = adapterkit.diagnose(tmp_path / "merged", base=base, adapters=[adapter])
        assert [one["problem"] for one in said["findings"]] == [found]


def test_shards_of_rows_and_columns(tmp_path, trained):
    """Tensor parallelism: rows of some, columns of the others; FSDP: of a and b."""

    def parallel(key, t):
        by_rows = not any(name in key for name in ("o_proj", "down_proj"))
        axis = 0 if by_rows else 1
        return lost(t, axis, 1, 2, 2) if ("lora_B" in key) == by_rows else t

    both = lambda key, t: lost(t, 0, 1, 2, 2)
    for name, lose, share in (("tp", parallel, SHARES[2, 3, 3]), ("fsdp", both, SHARES[1, 2, 2])):
        adapter = changed(trained / "adapter", tmp_path / name, lose)
        (found,) = problems_of(inspect(adapter))
        assert found.startswith(share), name
        assert warned(trained, adapter) == [f"{name}: {found}; {GATHER}"]


def test_zeros_that_are_right_are_no_problem(tmp_path, trained):
    """Single rows, one module, small blocks, scattered rows, ranks that are padded, an adapter of
    which half the modules were not trained; converts that fuse modules which were not all
    trained."""
    generator = torch.Generator().manual_seed(0)

    def scattered(t):
        t[torch.rand(len(t), generator=generator) < 0.5] = 0
        return t

    def small(t):
        t[-max(1, len(t) // 16) :] = 0
        return t

    is_b = lambda key: "lora_B" in key
    rights = {
        "row": lambda k, t: lost(t, 0, 3, 4, len(t)) if is_b(k) and len(t) > 8 else t,
        "one": lambda k, t: lost(t, 0, 1, 2, 2) if is_b(k) and "layers.1.self_attn.q" in k else t,
        "small": lambda k, t: small(t) if is_b(k) else t,
        "scattered": lambda k, t: scattered(t) if is_b(k) else t,
        "padded": lambda k, t: lost(t, int(is_b(k)), 1, 2, 2),
        "half": lambda k, t: t * (not is_b(k) or "layers.0" in k),
    }  # fmt: skip
    for name, change in rights.items():
        adapter = changed(trained / "adapter", tmp_path / name, change)
        assert problems_of(inspect(adapter)) == warned(trained, adapter) == [], name
    fused = tmp_path / "fused"
    tensors = {}
    for layer in range(2):
        for name, rows, at in (("qkv_proj", 48, (0, 32)), ("gate_up_proj", 96, (48, 96))):
            stem = f"base_model.model.model.layers.{layer}.mlp.{name}.lora_"
            b = torch.zeros(rows, 4)
            b[at[0] : at[1]] = 1
            tensors |= {f"{stem}A.weight": torch.ones(4, 32), f"{stem}B.weight": b}
    fused.mkdir()
    save_file(tensors, fused / FILE)
    config = json.loads((trained / "adapter" / CONFIG).read_text())
    (fused / CONFIG).write_text(json.dumps(config | {"target_modules": ["qkv_proj"], "r": 4}))
    assert problems_of(inspect(fused)) == []
