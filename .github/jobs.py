"""Small jobs by the installed command, each read back: does it work on this system?"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the golden jobs' inputs

from tests.golden.inputs import create_inputs

JOBS = (
    "merge base style=0.75 rslora --out merged --verify",
    "quantize base --to nf4 --out small",
    "merge small style --out small-merged",
    "combine law medicine=0.5 --method ties --set density=0.5 --out combined",
    "init base32 --method pissa --rank 4 --targets all-linear --out start",
    "extract base32 tuned --rank 3 --out extracted",
    "convert skill --to mlx --out for-mlx",
    "stats base32 --data ids.jsonl --targets q_proj --out statistics.safetensors",
    "verify merged",
    "inspect merged",
)


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        create_inputs(Path())
        for job in JOBS:
            print("$ adapterkit", job, flush=True)
            subprocess.run([sys.executable, "-m", "adapterkit", *job.split()], check=True)
        os.chdir("..")


main()
