"""What the suites of diff share: weights of known changes, adapters written by hand, the
command."""

import json
from pathlib import Path

import click.testing
import torch
from safetensors.torch import save_file

from adapterkit.cli import main
from tests.support import oracle
from tests.support.forks import command

ROOT = Path(__file__).parents[2]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def decaying(rows, columns, seed=1):
    """A matrix whose singular values fall by a quarter each."""
    k = min(rows, columns)
    u, v = (
        torch.linalg.qr(normal(rows, k, seed=seed).double()).Q,
        torch.linalg.qr(normal(columns, k, seed=seed + 1).double()).Q,
    )
    return u * 0.75 ** torch.arange(k) @ v.T


def rank_of(d, energy):
    """The smallest rank that holds the share of ‖D‖², from a full decomposition."""
    squares = torch.linalg.svdvals(d.double()).square()
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1


def only(document):
    (row,) = document["changed"]
    return row


def called(*words):
    return click.testing.CliRunner().invoke(main, ["diff", *map(str, words)])


def run(*words):
    """As a process: a refusal ends it."""
    return command("diff", *words)


def write_lora(folder, factors, alpha=8.0, extra=None, **config):
    """An adapter of (a, b) by module, as PEFT writes it."""
    folder.mkdir()
    rank = config.pop("r", None) or next(iter(factors.values()))[0].shape[0]
    tensors = dict(extra or {})
    for module, (a, b) in factors.items():
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(rank, seed=0, out=90, inputs=70, dtype=torch.float32):
    return normal(rank, inputs, seed=seed, dtype=dtype), normal(
        out, rank, seed=seed + 1, dtype=dtype
    )


def trained(base, folder, seed=1, **config):
    folder.mkdir()
    oracle.train(
        oracle.load(oracle.llama, base),
        folder,
        seed=seed,
        **({"target_modules": ["q_proj"]} | config),
    )
    return folder
