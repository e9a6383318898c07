"""The page on how it is tested: that of the last whole run, and of what the tests import."""

import json
from pathlib import Path

from tests.support.documents import ROOT
from tests.test_docs import script

REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4"
  time="12.6" timestamp="2026-11-29T18:48:55.7+00:00">
<testcase classname="tests.cli.test_a" name="one" time="0.25"/>
<testcase classname="tests.cli.test_a" name="two" time="0.5"><skipped type="pytest.skip"
  message="could not import 'hqq': No module named 'hqq'"/></testcase>
<testcase classname="tests.merge.deep.test_b.TestIt" name="three" time="3"><failure/></testcase>
<testcase classname="tests.test_c" name="four" time="2"><error/></testcase>
</testsuite></testsuites>"""


def test_the_page_is_current():
    page, run = script("tested"), json.loads((ROOT / "docs" / "tested.json").read_text("utf-8"))
    assert (ROOT / "docs" / "tested.md").read_text("utf-8") == page.document(run)
    assert page.imported() == set(page.ORACLES)
    folders = {path.parent.relative_to(page.TESTS) for path in page.TESTS.rglob("test_*.py")}
    assert set(run["cases"]) <= {name.parts[0] if name.parts else "" for name in folders}
    # a run that lacks more than a fifth of the tests is too old: take the figures of another
    assert 0.8 < run["functions"] / page.functions() < 1.25
    assert not run["failed"]


def test_figures_are_those_of_the_report(tmp_path: Path):
    (tmp_path / "run.xml").write_text(REPORT)
    figures = script("tested").figures(tmp_path / "run.xml")
    assert figures["cases"] == {"": 1, "cli": 2, "merge": 1}
    assert figures["processor_seconds"] == {"": 2, "cli": 1, "merge": 3}
    assert figures["skipped"] == {"could not import 'hqq'": 1} and figures["failed"] == 2
    assert (figures["date"], figures["seconds"]) == ("2026-11-29", 13)
