"""The strong comparison: every job with two source trees on this machine, all bytes equal.

  python -m tests.golden.compare OLD_TREE NEW_TREE     prints every difference; exit status 1 if
                                                       there is one
  python -m tests.golden.compare --write TREE          writes golden.json, of the package in TREE

Changes of prose (notes, problems, model cards) are printed, and are no difference.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .records import comparable, differences, golden, texts

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden.json"
CHILD = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import adapterkit
from golden import jobs
tree = Path(sys.argv[2]).resolve()
imported = Path(adapterkit.__file__).resolve()
assert tree in imported.parents, f"{imported} is not of {tree}"
records = jobs.run_all(Path(sys.argv[3]))
exact = [job.name for job in (*jobs.WRITING, *jobs.READING) if job.exact]
Path(sys.argv[4]).write_text(json.dumps({"records": records, "exact": exact}))
"""


def run_tree(tree: str) -> dict[str, Any]:
    """{"records", "exact"} of this folder's jobs with the package in `tree`, in a process of its
    own."""
    tree = str(Path(tree).resolve())
    with tempfile.TemporaryDirectory() as folder:
        jobs, result = Path(folder) / "jobs", Path(folder) / "records.json"
        jobs.mkdir()
        words = [sys.executable, "-c", CHILD, str(HERE.parent), tree, str(jobs), str(result)]
        env = os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, env=env, cwd=folder, check=True)
        return json.loads(result.read_bytes())


def write(tree: str) -> None:
    """golden.json of the package in `tree`."""
    document = run_tree(tree)
    kept = {n: golden(r, n in document["exact"]) for n, r in document["records"].items()}
    lines = [f"{json.dumps(n)}:{json.dumps(r, separators=(',', ':'))}" for n, r in kept.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def compare(old_tree: str, new_tree: str) -> list[str]:
    """The differences of all records; prose that differs is printed."""
    old, new = (run_tree(tree)["records"] for tree in (old_tree, new_tree))
    lines = []
    for name in old:
        lines += differences(comparable(old[name]), comparable(new[name]), path=name)
        for line in differences(texts(old[name]), texts(new[name]), path=name):
            print(f"prose: {line}")
    return lines


def main(words: list[str]) -> int:
    """The exit status."""
    if words[:1] == ["--write"] and len(words) == 2:
        write(words[1])
        return 0
    if len(words) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    lines = compare(*words)
    print(*lines, sep="\n")
    print(f"{len(lines)} differences")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
