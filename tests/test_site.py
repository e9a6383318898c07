"""The documents as a site: it builds without a warning, every page has its place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.documents import DOCUMENTS, ROOT

pytest.importorskip("mkdocs", reason="needs mkdocs")
HOME = "index.md"


def test_the_site_builds(tmp_path: Path):
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in DOCUMENTS[1:]} - {"index"}
    for name in pages:
        assert (tmp_path / "site" / name / "index.html").exists(), name
    home = (tmp_path / "site" / HOME.replace(".md", ".html")).read_text()
    for target in re.findall(r'href="([\w./-]+/)(?:#[^"]*)?"', home):
        assert (tmp_path / "site" / target).exists(), target


def test_every_document_has_a_place():
    text = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]

    assert {*leaves(text["nav"])} | {HOME} == {path.name for path in DOCUMENTS[1:]}
