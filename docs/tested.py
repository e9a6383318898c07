"""Write the counts of a whole run into docs/tested.md.

python docs/tested.py RUN.xml     the report of: .ci/run --junitxml RUN.xml
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).with_name("tested.md")
COUNTS = re.compile(
    r"(?<=<!-- counts: python docs/tested.py RUN.xml -->\n\n).*?(?=\n\n<!-- end)", re.S
)


def counts(report: Path) -> str:
    """One sentence: the date, and how many tests passed, were skipped and failed."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (["tests"], ["failures", "errors"], ["skipped"])
    )
    seconds = round(sum(float(suite.get("time", 0)) for suite in suites))
    date = suites[0].get("timestamp", "")[:10]
    passed = total - failed - skipped
    return (
        f"The last whole run was on {date}, on two cores without a GPU:\n"
        f"{passed:,} passed, {skipped} skipped, {failed} failed, in {seconds:,} s."
    )


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(COUNTS.sub(counts(Path(sys.argv[1])), text), encoding="utf-8", newline="\n")
