"""Without the packages that only some jobs need: these are refused with what installs them, before
anything is written, and all others run."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.forks import program

Ended = dict[str, tuple[int, str, list[str]]]  # command -> exit status, message, what it left

REFUSED = {
    "dequantize model.gguf --out out": "gguf pip install gguf",
    "merge base style --engine ray --out out": "ray pip install ray",
    "stats base --data rows.parquet --out s.safetensors": "pyarrow pip install pyarrow, or",
    "stats base --data rows --out s.safetensors": "datasets pip install datasets, or",
}
DONE = (
    "merge base style --engine ray --out out --dry-run",
    "merge base style --out merged --verify",
)
SLOWER = (  # transformers is imported
    "convert style --to gguf --base base --out gguf",
    "quantize base --to nf4 --out nf4",
    "inspect nf4",
    "merge nf4 style --dequantize --out merged --verify",
)
ABSENT = (
    "accelerate bitsandbytes compressed_tensors datasets diffusers gguf lycoris mlx "
    "mlx_lm peft pyarrow ray torchao trl"
).split()
JOBS = f"""
import json, os, shlex, sys, traceback
from pathlib import Path
from unittest import mock
for name in [*{ABSENT}, *(name for name in sys.modules if name.partition(".")[0] in {ABSENT})]:
    sys.modules[name] = None
from click.testing import CliRunner
from adapterkit.cli import main
from tests.support.hub_models import adapter_files, base_files, write
write(Path("base"), base_files(2))
write(Path("style"), adapter_files(layers=range(2)))
Path("model.gguf").write_bytes(b"GGUF")
Path("rows.parquet").write_bytes(b"PAR1")
Path("rows").mkdir()
Path("rows/dataset_info.json").write_text("{{}}")
ended = {{}}
for line in LINES:
    before = set(os.listdir())
    with mock.patch.object(os, "_exit", sys.exit):
        done = CliRunner().invoke(main, shlex.split(line))
    bug = "".join(traceback.format_exception(done.exception)) if done.exception else ""
    text = done.stderr if done.stderr or not done.exit_code else bug
    ended[line] = done.exit_code, text, sorted(set(os.listdir()) - before)
print(json.dumps(ended))
"""


def run(lines: Iterable[str], home: Path) -> Ended:
    done = program(JOBS.replace("LINES", str([*lines])), cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run([*REFUSED, *DONE], tmp_path_factory.mktemp("absent"))


@pytest.mark.parametrize("line", REFUSED)
def test_a_job_that_needs_one_says_how_to_install_it(ended: Ended, line: str):
    status, text, left = ended[line]
    package, _, install = REFUSED[line].partition(" ")
    assert status == 1 and text.count(f"{package} is not installed") == 1, text
    assert f"hint: {install}" in text and len(text.splitlines()) <= 4 and not left


@pytest.mark.parametrize("line", DONE)
def test_jobs_that_need_no_optional_package_run(ended: Ended, line: str):
    assert ended[line][0] == 0, ended[line]


@pytest.mark.slow
def test_models_are_made_without_them(tmp_path: Path):
    ended = run(SLOWER, tmp_path)
    assert not any(status for status, *_ in ended.values()), ended
