"""The page of a report goes to others: it says nothing of the machine; its commands are inert."""

import html
import json
import re
import shlex

import pytest

import adapterkit
from adapterkit.adapters.formats.engines import engines
from tests.support.raw_files import AdapterFiles, base, plain

USER = "alicejones"
EVIL = 'a"); import os; os.system("x"); (" `id` $(id) \'b'


@pytest.fixture
def home(tmp_path):
    """A home folder with a model, adapters that were trained on it there, and a merge of one."""
    folder = tmp_path / "home" / USER / "my work's"
    on, files = base().write(folder / "base"), plain()
    named = files.config | {"base_model_name_or_path": str(on)}
    for name in ("style", "-skill"):
        AdapterFiles(named, files.tensors).folder().write(folder / name)
    elsewhere = named | {"base_model_name_or_path": f"C:\\Users\\{USER}\\base\\"}
    AdapterFiles(elsewhere, files.tensors).folder().write(folder / "of-windows")
    AdapterFiles(named | {"r": 0}, files.tensors).folder().write(folder / "broken")
    (folder / "style" / "pytorch_model.bin").write_bytes(b"x")
    AdapterFiles(files.config, files.tensors).folder().write(folder / EVIL.replace("/", ""))
    adapterkit.merge(on, [folder / "style"], out=folder / "merged")
    return folder


def text_of(home, *names, ending="", **options) -> str:
    page = home / "page.html"
    adapterkit.report(
        [f"{home}/{name}{ending}" for name in names], out=page, overwrite=True, **options
    )
    return html.unescape(page.read_text("utf-8"))


@pytest.mark.parametrize("names, more", [
    (["style"], ()), (["style", "-skill"], ("base", "merged")), (["broken"], ()),
    (["of-windows"], ("base",)), (["-skill"], ("base",)), (["-skill", "of-windows"], ("base",)),
])  # fmt: skip
def test_a_page_names_no_home(home, names, more):
    options = {"result" if name == "merged" else name: home / name for name in more}
    for ending in ("", "/", "/."):
        text = text_of(home, *names, ending=ending, **options)
        assert USER not in text and str(home.parent.parent) not in text and "/home" not in text
        assert all(name in text for name in names)


def test_names_that_were_given_as_relative_ones_stay(home, monkeypatch):
    monkeypatch.chdir(home.parent)
    page = "page.html"
    adapterkit.report([f"{home.name}/-skill"], base=f"{home.name}/base", out=page)
    lines = re.findall(r"<pre>(.*)", (home.parent / page).read_text("utf-8"))
    words = shlex.split(html.unescape(lines[0]).removesuffix("</pre></div>"))
    assert [*words[2:4]] == [f"{home.name}/base", f"{home.name}/-skill"]


def test_the_document_on_the_terminal_has_paths_that_can_be_used(home):
    document = adapterkit.report([home / "-skill"], out=home / "page.html")
    assert str(home / "-skill") in shlex.split(document["advice"]["command"])
    assert json.dumps(document) and document["adapters"][0]["base"] == str(home / "base")


def test_commands_of_a_page_are_one_word_for_each_name(home, monkeypatch):
    """Also in Python, whose texts end at a quote."""
    monkeypatch.chdir(home)
    name = EVIL.replace("/", "")
    document = adapterkit.report([name, "-skill"], out="page.html")
    words = shlex.split(document["advice"]["command"])
    assert name in words and "./-skill" in words
    seen = 0
    for row in adapterkit.report([name], out="page.html", overwrite=True)["loading"]:
        *_, last = row["command"].splitlines()
        client = next(one for one in engines().values() if one.title == row["engine"])
        if '"{file}"' in client.load and "convert" not in row["command"]:
            (text,) = re.findall(r'"(a(?:[^"\\]|\\.)*)"\)$', last)
            assert json.loads(f'"{text}"') == name
            seen += 1
        elif "convert" in row["command"]:
            assert name in shlex.split(row["command"].splitlines()[0])
            seen += 1
    assert seen > 3
    for row in adapterkit.report(["-skill"], out="page.html", overwrite=True)["loading"]:
        first = row["command"].splitlines()[0]
        assert (
            "from_pretrained" in first or "./-skill" in shlex.split(first)[2:] or "=./-s" in first
        )
