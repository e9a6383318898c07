"""Write the counts of a whole run into docs/tested.md, and the versions of the last that passed.

python docs/tested.py RUN.xml     the report of: .ci/run --junitxml RUN.xml
"""

import re
import sys
import tomllib
from pathlib import Path
from textwrap import fill
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tested.md"
BLOCK = r"(?<=<!-- {}: python docs/tested.py RUN.xml -->\n\n).*?(?=<!-- end)"


def document(report: Path) -> str:
    """The page with the counts of a report; with its versions too if nothing failed."""
    suite, text = next(ElementTree.parse(report).iter("testsuite")), PAGE.read_text("utf-8")
    date = suite.get("timestamp", "")[:10]
    total, failures, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    counts = (
        f"The last whole run was on {date}, on two cores without a GPU:\n"
        f"{total - failed - skipped:,} passed, {skipped} skipped, {failed} failed, "
        f"in {round(float(suite.get('time', 0))):,} s."
    )
    blocks = {"counts": counts}
    if not failed:
        head = f"The last whole run without a failure, on {date}, was in a fresh environment with "
        blocks["versions"] = fill(head + ", ".join(versions(suite)) + ".", 100)
    for name, block in blocks.items():
        text = re.sub(BLOCK.format(name), lambda _, new=block: f"{new}\n\n", text, flags=re.S)
    return text


def versions(suite: ElementTree.Element) -> list[str]:
    """The name and version of Python and of each package that pyproject.toml names."""
    found = {one.get("name"): one.get("value") for one in suite.iter("property")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = sorted({Requirement(text).name.lower().replace("_", "-") for text in texts})
    return [f"{name} {found[name]}" for name in ["python", *names] if name in found]


if __name__ == "__main__":
    PAGE.write_text(document(Path(sys.argv[1])), encoding="utf-8", newline="\n")
