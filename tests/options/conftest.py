"""A right call of every verb."""

import pytest

import adapterkit
from tests.support.texts import write_rows


@pytest.fixture(scope="session")
def calls(cached_folder, tmp_path_factory):
    """For each verb a call that is right."""
    from tests.support import oracle

    base = cached_folder("llama", lambda folder: oracle.save_base(oracle.llama(), folder, "bf16"))
    root = tmp_path_factory.mktemp("calls")
    model = lambda: oracle.load(oracle.llama, base)
    for number in (1, 2):
        oracle.train(
            model(), root / f"a{number}", seed=number, target_modules=["q_proj", "up_proj"]
        )
    one, two = root / "a1", root / "a2"
    adapterkit.quantize(base, to="nf4", out=root / "nf4")
    adapterkit.merge(base, one, out=root / "tuned")
    rows = [{"input_ids": [4, 5, 6]}, {"input_ids": [7]}]
    ids = write_rows(root / "ids.jsonl", *rows, *({"input_ids": [n, 5]} for n in range(4)))
    return {
        "arrow": ([[one, two]], {}),
        "check": ([one], {"program": "vllm"}),
        "combine": ([[one, two]], {"method": "ties", "density": 0.5, "rank": 2}),
        "compare": (["http://localhost:9", base], {"served": "one", "adapter": one}),
        "convert": ([one], {"to": "peft"}),
        "dequantize": ([root / "nf4"], {}),
        "diagnose": ([root / "tuned"], {"base": base, "adapters": [one]}),
        "diff": ([one, two], {}),
        "edit": ([one], {"title": "one"}),
        "extract": ([base, root / "tuned"], {"rank": 2}),
        "fit": (
            [base, [one, two]],
            {"data": ids, "samples": 4, "granularity": "adapter", "ridge": 1},
        ),
        "init": ([base], {"method": "pissa", "rank": 2, "targets": "q_proj"}),
        "inspect": ([one], {}),
        "loftq": ([base], {"rank": 2, "iterations": 1, "targets": "q_proj", "block_size": 64}),
        "merge": ([base, one], {}),
        "quantize": ([base], {"to": "nf4"}),
        "rebase": ([one], {"initial": two}),
        "report": ([[one, two]], {}),
        "rerun": ([root / "tuned"], {"inputs": root}),
        "resize": ([one], {"rank": 2}),
        "score": ([[base]], {"data": ids, "adapters": [one]}),
        "stats": ([base], {"data": ids, "targets": "q_proj"}),
        "subtract": ([one], {"general": two}),
        "verify": ([root / "tuned"], {}),
    }
