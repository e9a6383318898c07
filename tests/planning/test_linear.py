"""The work of planning grows with the number of tensors, no faster: function calls are counted, as
times would depend on the machine."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from adapterkit import merge
from tests.golden import inputs, jobs
from tests.support import oracle

ONE_OF_EACH_VERB = (
    "quantize-nf4", "dequantize-nf4", "merge-several", "merge-nf4", "convert-same", "combine-ties",
    "subtract-several", "arrow-plain", "init-quantized", "loftq-nf4", "extract-energy",
    "resize-rank", "rebase-rank", "edit-words", "stats-all",
)  # fmt: skip
SIZES = (2, 4, 8)
MOST = 2.3  # of the calls that 4 more add, relative to the first 2 more: 2 if linear, 4 if squared


def calls_in(function: Callable[[], object]) -> int:
    """The calls of Python and C functions that a call makes."""
    count = 0

    def seen(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def growth(counts: list[int]) -> float:
    small, middle, large = counts
    return (large - middle) / (middle - small)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """{golden job: the calls of its plan for models of so many layers}."""
    counts: dict[str, list[int]] = {name: [] for name in ONE_OF_EACH_VERB}
    chosen = [job for job in jobs.WRITING if job.name in ONE_OF_EACH_VERB]
    for layers in SIZES:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("jobs"))
            patch.setattr(inputs, "LAYERS", layers)
            patch.setattr(inputs, "CONFIG", inputs.CONFIG | {"num_hidden_layers": layers})
            inputs.create_inputs(Path())
            for job in chosen:
                plan = lambda job=job: jobs.call(
                    job, out=Path(f"planned-{jobs.output_of(job)}"), dry_run=True
                )
                plan()  # imports, and what is remembered
                counts[job.name].append(calls_in(plan))
                if job.name == "quantize-nf4":  # others read it
                    jobs.call(job, out=jobs.output_of(job))
    return counts


@pytest.mark.parametrize("name", ONE_OF_EACH_VERB)
def test_planning_is_linear_in_layers(name: str, calls: dict[str, list[int]]):
    assert growth(calls[name]) < MOST


def test_every_verb_is_counted():
    verbs = {job.verb for job in jobs.WRITING}
    assert {name.partition("-")[0] for name in ONE_OF_EACH_VERB} == verbs


@pytest.mark.parametrize("stacked", [False, True])
def test_planning_is_linear_in_experts(stacked: bool, tmp_path: Path):
    counts = []
    for experts in SIZES:
        base, adapter = tmp_path / f"base-{experts}", tmp_path / f"adapter-{experts}"
        config = transformers.Qwen3MoeConfig(
            vocab_size=80,
            hidden_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_experts=experts,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
        model.save_pretrained(base)
        chosen = {"target_parameters": ["gate_up_proj", "down_proj"]} if stacked else {}
        oracle.train(model, adapter, target_modules=["q_proj"], **chosen)
        plan = lambda base=base, adapter=adapter: merge(
            base, [adapter], out=tmp_path / "out", dry_run=True
        )
        plan()
        counts.append(calls_in(plan))
    assert growth(counts) < MOST
