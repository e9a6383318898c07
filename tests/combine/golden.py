"""Makes golden.json: what mergekit gives for three small deltas. Run by hand, where mergekit is
installed.

Bases are 0, so that models are deltas. Parameters are mergekit's own; test_methods.py maps them to
ours.
"""

import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from mergekit.merge_methods.api import merge_tensors

CASES = [
    ("ties", {"weight": 1.0, "density": 0.4}),
    ("ties", {"weight": 1.0, "density": 1.0}),
    ("task_arithmetic", {"weight": [0.5, -1.5, 2.0]}),
    ("breadcrumbs", {"weight": [0.5, -1.5, 2.0], "density": 0.4, "gamma": 0.1}),
    ("breadcrumbs", {"weight": 1.0, "density": 0.8, "gamma": 0.5}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 1.0}),
    ("linear", {"weight": [0.5, 1.5, 2.0], "normalize": True}),
    ("karcher", {"max_iter": 100, "tol": 1e-6}),
    ("slerp", {"t": 0.5}),
    ("slerp", {"t": 0.2}),
]


def merged(deltas, method, parameters):
    if method == "slerp":
        return merge_tensors(deltas[:2], method, parameters=parameters, base_index=0)
    if method in ("linear", "karcher"):
        return merge_tensors(deltas, method, parameters=parameters)
    return merge_tensors(
        [torch.zeros_like(deltas[0]), *deltas], method, parameters=parameters, base_index=0
    )


def chances(delta, density, epsilon):
    """The probabilities that della hands to torch.bernoulli."""
    observed = []
    with mock.patch(
        "torch.bernoulli", side_effect=lambda p: observed.append(p.clone()) or torch.ones_like(p)
    ):
        merged([delta], "della", {"weight": 1.0, "density": density, "epsilon": epsilon})
    return observed[0]


def listed(tensor):
    return [[float(f"{x:.8g}") for x in row] for row in tensor.tolist()]


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(9)
    deltas = [torch.randn(5, 7, generator=generator).mul(1000).round().div(1000) for _ in range(3)]
    assert all(len(d.abs().unique()) == d.numel() for d in deltas), (
        "equal magnitudes: which of them stays is not defined"
    )
    cases = [
        {"method": m, "parameters": p, "merged": listed(merged(deltas, m, p))} for m, p in CASES
    ]
    della = {"density": 0.5, "epsilon": 0.2, "chances": listed(chances(deltas[0], 0.5, 0.2))}
    golden = {
        "mergekit": version("mergekit"),
        "deltas": [listed(d) for d in deltas],
        "cases": cases,
        "della": della,
    }
    text = json.dumps(golden)
    Path(__file__).with_name("golden.json").write_text(
        text.replace('{"method"', '\n{"method"') + "\n"
    )
