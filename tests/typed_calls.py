# pyright: strict
"""Calls that users write, with the types of what comes back. In `.ci/run`, mypy and pyright read
this file as strictly as they can, away from the sources, against the installed wheel. Nothing here
is run; `tests/test_types.py` checks that every name is in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

import adapterkit
from adapterkit import LoraConfig, Plan, Progress, Receipt, runtime
from adapterkit.runtime import Adapters


def verbs_that_write(flag: bool, names: list[str], weights: dict[str, float]) -> None:
    assert_type(adapterkit.merge("BASE", {"style": 0.7}, out="m"), Receipt)
    assert_type(adapterkit.merge("BASE", ["lora"], out="m", dry_run=True), Plan)
    adapterkit.merge("BASE", "lora=0.5", out=Path("m"), rounding="stochastic", fail_below=0.8)
    adapterkit.merge(Path("BASE"), [("a", 0.5), (Path("b"), 1)], out="m", method="ties", density=1)
    adapterkit.merge("BASE", names, out="m", overwrite=True)
    adapterkit.merge("BASE", weights, out="m", verify=True)
    adapterkit.merge("BASE", {Path("style"): 0.7}, out="m", dtype="bf16", max_shard_size="5GB")
    adapterkit.merge(base="BASE", adapters=["lora"], out="m")
    assert_type(adapterkit.quantize("BASE", out="q", to="nf4", dry_run=False), Receipt)
    assert_type(adapterkit.dequantize("BASE", out="d"), Receipt)
    assert_type(adapterkit.loftq("BASE", out="l", rank=4, dry_run=True), Plan)
    assert_type(adapterkit.init("BASE", method="pissa", rank=8, targets=["q"], out="i"), Receipt)
    assert_type(adapterkit.stats("BASE", data="a.txt", out="s.safetensors"), Receipt)
    assert_type(adapterkit.stats("BASE", data=["a.txt"], out="s", dry_run=True), Plan)
    assert_type(
        adapterkit.combine(["a", "b"], out="c", method="linear", dry_run=flag), Receipt | Plan
    )
    adapterkit.combine(weights, out="c", method="sce", settings={"floor": 1e-6}, rank=16)
    assert_type(adapterkit.convert("a.safetensors", to="peft", out="p"), Receipt)
    assert_type(adapterkit.extract("BASE", "TUNED", rank=16, out="e"), Receipt)
    assert_type(adapterkit.resize("lora", energy=0.9, out="r"), Receipt)
    assert_type(adapterkit.rebase("lora", initial="init", out="b"), Receipt)
    assert_type(adapterkit.subtract(["a"], general=["g"], out="s"), Receipt)
    assert_type(adapterkit.arrow(["a", "b"], top_k=2, out="w"), Receipt)
    assert_type(adapterkit.edit("lora", out="x", title="Style"), Receipt)
    # an option that there is not, and a source that is none
    adapterkit.merge("BASE", ["lora"], out="m", dtyp="bf16")  # type: ignore[call-overload]
    adapterkit.merge("BASE", 3, out="m")  # type: ignore[call-overload]


def verbs_that_read() -> None:
    print(adapterkit.inspect("lora")["kind"], adapterkit.inspect(["a", "b"], base="BASE"))
    print(adapterkit.diff("a", "b")["same"], adapterkit.verify("m", base="BASE", adapters=["a"]))
    print(adapterkit.check("lora", program="vllm")["takes"])
    print([row["hint"] for row in adapterkit.diagnose("m", base="BASE")["findings"]])
    print(adapterkit.report(["a", "b"], out="page.html")["advice"]["command"])
    print(adapterkit.fit("BASE", ["a", "b"], data="d.jsonl", out="w.json")["written"])
    print(adapterkit.score(["m", "BASE"], adapters="lora", data="d.jsonl")["rows"][0]["loss"])
    print(adapterkit.compare("http://localhost:8000", "BASE", adapter="lora", served="l")["same"])
    print(adapterkit.rerun("m", inputs=["BASE", "lora"])["files"])
    adapterkit.inspect("lora", dtyp="bf16")  # type: ignore[call-arg]


def several_processes(file: Path) -> None:
    assert_type(adapterkit.write_plan(file, "merge", "BASE", ["lora"], out="m"), Plan)
    adapterkit.run(file, worker="0/2")
    assert_type(adapterkit.finish(file), Receipt)


def in_a_notebook(bar: Progress) -> None:
    plan = adapterkit.merge("BASE", ["lora"], out="m", dry_run=True)
    print(plan, plan.totals()["bytes_written"], plan.warnings, plan.notes)
    try:
        receipt = adapterkit.merge("BASE", ["lora"], out="m", progress=bar)
        adapterkit.merge("BASE", ["lora"], out="m", progress=print)
    except adapterkit.Refused as error:
        print(error.problem, error.hint, error.code)
    else:
        print(receipt.out, receipt.data["warnings"])


def refusals(base: str) -> int:
    try:
        adapterkit.combine(["a", "b"], out="c", method="ties", settings={"density": 0.2})
        adapterkit.resize(Path(base), energy=0.95, out=Path("smaller"))
    except adapterkit.MultipleErrors as several:
        for one in several.errors:
            print(one.problem, one.expected, one.where, one.hint, one.code)
        return 2 if several.is_usage else 1
    except (adapterkit.Failed, adapterkit.Damaged) as error:
        print(error.text(), error.row()["hint"].upper())
    return 0


def training(model: nn.Module, trainer: type, accelerator: object, run: Callable[[], Any]) -> None:
    config = LoraConfig(rank=8, alpha=16, targets=["q_proj", "v_proj"], dora=True)
    adapters = runtime.attach(model, config, seed=0, stats=runtime.collect(model, run))
    assert_type(adapters, Adapters)
    runtime.attach(runtime.prepare_for_kbit_training(model), {"r": 8}, name="other")
    runtime.register_quantized("MyLinear", lambda module: module.weight)
    optimizer = runtime.loraplus(adapters, torch.optim.AdamW, lr=1e-4, ratio=16)
    assert_type(optimizer, torch.optim.Optimizer)
    runtime.LoraFA(adapters, lr=1e-4)
    runtime.Riemannian(adapters, torch.optim.AdamW, lr=1e-3)
    adapters.trainer(trainer)
    adapters.accelerate(accelerator)
    torch.optim.AdamW(adapters.parameters())
    print(adapters.report(), adapters.report().share)
    adapters.save("out")
    adapters.attach({"r": 4}, name="second")
    runtime.attach(model, config, nam="x")  # type: ignore[call-arg]


def serving(model: nn.Module, weights: dict[str, float]) -> None:
    adapters = runtime.load(model, "lora", name="style", pad_rank=64)
    runtime.load(model, weights="weights.json")
    adapters.load("other", name="other")
    adapters.activate({"style": 0.5, "other": 1})
    adapters.activate(weights)
    adapters.activate(["style"])
    adapters.activate(None)
    with adapters.disabled():
        model(torch.zeros(1))
    with adapters.rows(["style", None]):
        model(torch.zeros(2))
    adapters.store("adapters", max_loaded=8)
    adapters.swap("style", Path("newer"))
    adapters.merge({"style": 0.5})
    adapters.unmerge()
    adapters.combine({"style": 0.5, "other": 0.5}, name="both", method="ties", density=0.5)
    adapters.rescale(0.5, name="both")
    adapters.delete("both")
    adapters.detach()
    print(adapters.names, adapters.active["style"], adapters.merged)
    print(adapters.missed_invocations["style"] + 1)


def routing(model: nn.Module) -> None:
    adapters = runtime.create_arrow_model(model, ["a", "b"], general="g", top_k=2)
    adapters.add_expert("c", name="c")
    adapters.remove_expert("a")
    print(adapters.experts())
    assert_type(runtime.load_arrow(model, "router"), Adapters)
