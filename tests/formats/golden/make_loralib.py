"""Adapters of loralib, saved as its README says: `python make_loralib.py` fills loralib/.

Made with loralib 0.1.2 and torch 2.13. deltas/ has what its layers add to their weights when they
are merged.
"""

from pathlib import Path

import loralib
import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
R, ALPHA, WIDTH = 3, 6, 8


class Block(nn.Module):
    """A layer of GPT-2 as the examples of loralib adapt it."""

    def __init__(self, enabled: list[bool]):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = loralib.MergedLinear(
            WIDTH, 3 * WIDTH, R, ALPHA, enable_lora=enabled, bias=True
        )
        self.attn.c_proj = loralib.Linear(WIDTH, WIDTH, R, ALPHA)
        self.mlp.c_fc = nn.Linear(WIDTH, 2 * WIDTH)


def gpt2(enabled: list[bool]) -> nn.Module:
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.wte = loralib.Embedding(11, WIDTH, R, lora_alpha=ALPHA)
    model.transformer.h = nn.ModuleList([Block(enabled)])
    return model


def convolutions() -> nn.Module:
    model = nn.Module()
    model.features = nn.ModuleList([
        loralib.Conv2d(4, 6, 3, r=R, lora_alpha=ALPHA),
        loralib.Conv2d(6, 5, 1, r=R, lora_alpha=ALPHA),
    ])  # fmt: skip
    model.head = loralib.Linear(5, 7, R, ALPHA)
    return model


CASES = {
    "gpt2": gpt2([True, True, True]),
    "gpt2_query_value": gpt2([True, False, True]),
    "convolutions": convolutions(),
}
REFUSED = ("gpt2_query_value",)  # the file does not tell which two of three parts it has


def make(name: str, model: nn.Module) -> None:
    torch.manual_seed(7)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    folder = HERE / "loralib" / ("refused" if name in REFUSED else "")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(loralib.lora_state_dict(model), folder / f"{name}.pt")
    layers = {k: m for k, m in model.named_modules() if isinstance(m, loralib.LoRALayer)}
    weights = {k: getattr(m, "conv", m).weight for k, m in layers.items()}
    before = {k: w.detach().clone() for k, w in weights.items()}
    model.eval()  # merges
    deltas = {f"{k}.weight": w.detach() - before[k] for k, w in weights.items()}
    save_file(deltas, HERE.parent / f"deltas/loralib_{name}.safetensors")


if __name__ == "__main__":
    for case, model in CASES.items():
        make(case, model)
