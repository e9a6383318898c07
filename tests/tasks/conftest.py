"""Plans of small jobs of every verb, for the tests of what a plan holds."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.adapters.formats import task as tasks
from adapterkit.core.plan import Plan
from tests.golden import inputs, jobs

STATS = "covariances.safetensors"
TIES = {"method": "ties", "density": 0.5}
EXPERTS = str(Path(__file__).parents[1] / "formats/golden/peft/mixtral")
SCALE = 8  # by which layers are wider than those of the golden jobs: their memory is then tensors

COMPENSATED = {"rounding": "compensated", "stats": STATS}
ROUNDED = (
    (("quantize-compensated", "base"), {"to": "w4a16"}),
    (("merge-compensated", "base", "style"), {}),
    (("merge-nf4-compensated", "quantize-nf4-double", "style"), {}),
)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Plan]]:
    """{golden job: its plan}, in a folder with the inputs of all of them, which is the current one
    meanwhile."""
    with _folder(tmp_path_factory):
        inputs.create_inputs(Path())
        yield _plan(jobs.WRITING)


@pytest.fixture(scope="module")
def wide_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Plan]]:
    """The same for wider layers, and with values that were trained whole."""
    with _folder(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "MANY", 2)  # so that tensors of few experts are made together
        for name in ("HIDDEN", "INTERMEDIATE", "KEYS_VALUES"):
            patch.setattr(inputs, name, SCALE * getattr(inputs, name))
        for name in ("ATTENTION", "MLP", "LINEAR", "FEW"):
            shapes = getattr(inputs, name).items()
            wide = {key: (SCALE * out, SCALE * width) for key, (out, width) in shapes}
            patch.setattr(inputs, name, wide)
        sizes = {"hidden_size": inputs.HIDDEN, "intermediate_size": inputs.INTERMEDIATE}
        config = inputs.CONFIG | sizes | {"head_dim": SCALE * inputs.CONFIG["head_dim"]}
        patch.setattr(inputs, "CONFIG", config)
        patch.setitem(inputs._save_adapter.__kwdefaults__, "modules", inputs.LINEAR)
        inputs.create_inputs(Path())
        _save_other_head(Path("head"), Path("other-head"))
        _save_components(Path("pca.safetensors"))
        more = (
            jobs.job("combine-values", "head=0.25", "other-head=0.75", method="linear"),
            jobs.job("resize-values", "head", rank=1),
            jobs.job("resize-by-size", "skill", max_size="64KB"),
            jobs.job("resize-stats", "style", rank=2, stats=STATS),
            jobs.job("resize-dora-stats", "dora", base="base", rank=2, stats=STATS),
            jobs.job("extract-stats", "base32", "tuned", rank=3, exclude="lm_head", stats=STATS),
            jobs.job("combine-stats", "law", "medicine", method="linear", rank=3, stats=STATS),
            jobs.job("combine-dense", "dora", "dora=0.5", method="tsv", rank=3, base="base"),
            jobs.job("combine-ties-stats", "law", "medicine", **TIES, stats=STATS),
            jobs.job(
                "combine-regmean", "law", "medicine", method="regmean", rank=3, stats=[STATS] * 2
            ),
            jobs.job("init-implicit", "base", method="olora", rank=4, residual="implicit"),
            jobs.job("init-drawn", "base", method="default", rank=4, targets="all-linear"),
            jobs.job("init-dense", "base", method="mica", rank=4, rslora=True),
            jobs.job("init-redistributed", "base", method="eva", rank=4, stats="pca.safetensors"),
            jobs.job("convert-transposed", "style", to="mlx"),
            jobs.job("convert-fitted", "dora", to="vllm", base="base", rank=3),
            jobs.job("convert-experts", EXPERTS, to="peft-per-expert", base=f"{EXPERTS}/base"),
            *(jobs.job(*names, **options, **COMPENSATED) for names, options in ROUNDED),
        )
        plans = _plan([*(job for job in jobs.WRITING if job.name != "resize-size"), *more])
        yield plans | _gguf_plans()


def _gguf_plans() -> dict[str, Plan]:
    """Of merges into GGUF files: into another type of blocks, and of a stack of experts whose parts
    are in two files."""
    from peft import LoraConfig, get_peft_model

    from tests.support import gguf_files

    def adapter(model: nn.Module, out: str, **config: Any) -> str:
        config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | config
        get_peft_model(model.float(), LoraConfig(**config)).save_pretrained(out)
        return out

    plans = {}
    model, message, tensors = gguf_files.llama(hidden_size=256, head_dim=64)
    for name in [name for name in tensors if "ffn_down" in name]:
        kind = gguf_files.gguf.GGMLQuantizationType.Q4_0
        tensors[name] = (kind, gguf_files.blocks(kind, tensors[name].shape, 1))
    path = gguf_files.write(Path("model.gguf"), "llama", message, tensors)
    how = {"out": "planned.gguf", "dry_run": True, "changed_type": "q8_0"}
    down = adapter(model, "of-down", target_modules=["down_proj"])
    for name, rounding in (("touched", "nearest"), ("touched-stochastic", "stochastic")):
        plans[name] = adapterkit.merge(path, down, rounding=rounding, **how)
    model, message, tensors = gguf_files.qwen3moe(64)
    path = gguf_files.write(Path("experts.gguf"), "qwen3moe", message, tensors)
    names = [tensor.name for tensor in gguf_files.gguf.GGUFReader(path).tensors]
    cut = names.index("blk.0.ffn_up_exps.weight")
    parts = gguf_files.split(path, Path("parts"), [cut, len(names) - cut])
    stacks = adapter(model, "of-experts", target_parameters=["mlp.experts.gate_up_proj"])
    plans["split"] = adapterkit.merge(parts[0], stacks, out="planned-parts", dry_run=True)
    return plans


def _save_other_head(folder: Path, other: Path) -> None:
    """A copy of an adapter with other values of the head."""
    other.mkdir()
    for path in folder.glob("*.json"):
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight"
    tensors[key] = 2 * tensors[key]
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})


def _save_components(file: Path) -> None:
    """Principal components of the inputs of all linear layers, as many as their rank and more."""
    tensors = {}
    for number, (name, (_, width)) in enumerate(inputs._linear()):
        variances = torch.arange(8, 0, -1) / (number + 1)
        tensors |= {
            f"{name}.components": torch.eye(8, width),
            f"{name}.variances": variances,
            f"{name}.variance": variances.sum().view(1),
        }
    save_file(tensors, file)


class _folder:
    """A new folder as the current one."""

    def __init__(self, factory: pytest.TempPathFactory):
        self.path, self.before = factory.mktemp("jobs"), Path.cwd()

    def __enter__(self) -> Path:
        os.chdir(self.path)
        return self.path

    def __exit__(self, *error: object) -> None:
        os.chdir(self.before)


def _plan(chosen: "list[jobs.Job] | tuple[jobs.Job, ...]") -> dict[str, Plan]:
    sources = {
        source
        for job in chosen
        for source in (*job.sources, *job.options.values())
        if isinstance(source, str)
    }
    plans = {}
    for job in chosen:
        out = jobs.output_of(job)
        plans[job.name] = jobs.call(job, out=f"planned-{out}", dry_run=True)
        if job.name in sources:
            jobs.call(job, out=out)
    return plans
