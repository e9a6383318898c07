"""A notebook's code cells run in one namespace, as in Jupyter, which the tests do not need.

    python -m tests.support.notebooks examples/quickstart.ipynb FOLDER

runs the cells in FOLDER, where `python quickstart.py` ran, and writes what they print into the
notebook. What a cell draws in HTML is not stored: it is ten times the notebook, other machines have
other last digits, and GitHub shows none of it.
"""

import ast
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Outputs = list[dict[str, Any]]  # of a cell, as a notebook has them


def read(notebook: Path) -> dict[str, Any]:
    return json.loads(notebook.read_text("utf-8"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(notebook)["cells"] if cell["cell_type"] == "code"]


def run(notebook: Path, folder: Path) -> list[Outputs]:
    """The outputs of each code cell, in a process of its own in `folder`."""
    result = folder / "outputs.json"
    words = [sys.executable, __file__, str(notebook.absolute()), str(result.absolute())]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text("utf-8"))


def stored(outputs: Outputs) -> Outputs:
    """Those that a notebook is committed with."""
    return [one for one in outputs if "text/html" not in one.get("data", {})]


def write(notebook: Path, folder: Path) -> None:
    """Write what the cells print in `folder` into the notebook."""
    content = read(notebook)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for cell, outputs in zip(cells, run(notebook, folder), strict=True):
        cell |= {"execution_count": None, "outputs": stored(outputs)}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    notebook.write_text(text + "\n", "utf-8")


def outputs_of(source: str, namespace: dict[str, Any]) -> Outputs:
    """What a cell prints, then the value of its last line, if that is an expression."""
    body, printed, value = ast.parse(source).body, io.StringIO(), None
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    lines = printed.getvalue().splitlines(keepends=True)
    found: Outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    if value is None:
        return found
    drawn = getattr(value, "_repr_html_", lambda: None)()
    data = {"text/plain": [repr(value)]} | ({"text/html": [drawn]} if drawn else {})
    result = {"data": data, "execution_count": None, "metadata": {}}
    return [*found, result | {"output_type": "execute_result"}]


def main(notebook: Path, result: Path) -> None:
    """Run the cells here, and write the outputs of each to `result`."""
    sys.path[0] = ""  # as in a kernel, which starts in the notebook's folder
    namespace: dict[str, Any] = {"__name__": "__main__"}
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    found = [outputs_of(source, namespace) for source in sources]
    result.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    do = main if sys.argv[2].endswith(".json") else write
    do(Path(sys.argv[1]), Path(sys.argv[2]))
