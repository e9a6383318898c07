"""What a plain job loads: modules and lines in a table that only falls, and no product that it does
not use.

`python -m tests.test_loaded` writes the table again. A number that rises needs a reason in the
commit.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent
TABLE = Path(__file__).with_name("loaded.json")

PRODUCTS = (
    "bases.gguf", "bases.images", "bases.hub", "bases.quantized",
    "adapters.formats", "adapters.kinds",
    "verbs.combine", "verbs.init", "verbs.stats", "verbs.fit", "verbs.look",
    "many", "runtime", "integrations", "cli",
)  # fmt: skip
CARD = "adapters.formats adapters.kinds"  # how programs load the adapter that is written
# A plain job: its call, and the products that it is of
JOBS = {
    "merge, dry run": ("merge(base, [a], out=out, dry_run=True)", ""),
    "merge": ("merge(base, [a], out=out)", ""),
    "verify": ("verify(merged)", ""),
    "combine, dry run": (
        "combine([a, a], method='linear', out=out, dry_run=True)", f"verbs.combine {CARD}",
    ),
    "resize, dry run": ("resize(a, rank=2, out=out, dry_run=True)", f"verbs.combine {CARD}"),
    "init, dry run": (
        "init(base, method='pissa', rank=4, targets='q_proj', out=out, dry_run=True)",
        f"verbs.init bases.quantized {CARD}",
    ),
    "convert to peft, dry run": ("convert(a, to='peft', out=out, dry_run=True)", CARD),
    "check": ("check(a, base=base, program='vllm')", f"verbs.look {CARD}"),
    "inspect a base": ("inspect(base)", "verbs.look"),
    "inspect an adapter": ("inspect(a)", "verbs.look"),
}  # fmt: skip
# what these print needs the model's code or the factors' norms
COMPUTING = ("merge", "init, dry run", "inspect an adapter")
WATCH = """
import json, sys
import adapterkit
base, a, merged, out = sys.argv[1:]
adapterkit.{call}
own = [m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "adapterkit"]
heavy = [n for n in ("torch", "transformers") if n in sys.modules]
print(json.dumps([sorted(own), heavy]))
"""


@pytest.fixture
def merged(cached_folder: Callable[..., Path], llama: Path, lora: Path) -> Path:
    return cached_folder("merged", lambda folder: adapterkit.merge(llama, [lora], out=folder))


def loaded(job: str, base: Path, adapter: Path, merged: Path, out: Path) -> tuple[list[Path], list]:
    """The files of the package that a job loads, as paths in it, and the heavy packages."""
    script = WATCH.format(call=JOBS[job][0])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, (base, adapter, merged, out))],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    files, heavy = json.loads(done.stdout.splitlines()[-1])
    return [Path(file).relative_to(PACKAGE) for file in files], heavy


def counted(files: list[Path]) -> dict[str, int]:
    lines = sum(len((PACKAGE / file).read_text("utf-8").splitlines()) for file in files)
    return {"modules": len(files), "lines": lines}


@pytest.mark.parametrize("job", JOBS)
def test_a_plain_job_loads_no_more_than_the_table_says(
    job: str, llama: Path, lora: Path, merged: Path, tmp_path: Path
):
    files, heavy = loaded(job, llama, lora, merged, tmp_path / "out")
    now, most = counted(files), json.loads(TABLE.read_text("utf-8"))[job]
    assert now["modules"] <= most["modules"] and now["lines"] <= most["lines"]
    fallen = now["modules"] < most["modules"] - 3 or now["lines"] < most["lines"] - 500
    assert not fallen, "lower the table: python -m tests.test_loaded"
    names = {".".join(file.with_suffix("").parts) for file in files if file.name != "__init__.py"}
    others = [name for name in PRODUCTS if name not in JOBS[job][1].split()]
    assert not sorted(n for n in names if any(n.startswith(f"{other}.") for other in others))
    assert not heavy or job in COMPUTING


if __name__ == "__main__":
    import tempfile

    from tests.support import oracle

    with tempfile.TemporaryDirectory() as home:
        base, adapter, out = Path(home, "base"), Path(home, "adapter"), Path(home, "merged")
        oracle.save_base(oracle.llama(), base, "bf16")
        oracle.train(oracle.load(oracle.llama, base), adapter, target_modules=oracle.LINEAR)
        adapterkit.merge(base, [adapter], out=out)
        table = {job: counted(loaded(job, base, adapter, out, Path(home, job))[0]) for job in JOBS}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
