"""The grammar of Hub ids."""

import subprocess
import sys

import pytest

from adapterkit.core.checkpoint.hub_ids import HubId, parse
from tests.support.hub_client import ROOT


@pytest.mark.parametrize(
    "source, expected",
    [
        ("org/name", HubId("org/name")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("org/name@pkg@1.0", HubId("org/name", "pkg@1.0")),
        ("org/name:sub/folder", HubId("org/name", None, "sub/folder")),
        ("org/name:sub/", HubId("org/name", None, "sub")),
        ("org/name@v1.0:a b", HubId("org/name", "v1.0", "a b")),
        ("Org-1/na.me_2", HubId("Org-1/na.me_2")),
    ],
)
def test_valid_ids_are_parsed_and_printed_back(source, expected):
    assert parse(source) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "source",
    [
        *(
            "",
            "name",
            "a/b/c",
            "/org/name",
            "./name",
            "../name",
            "~/name",
            "org/",
            "/name",
            "C:\\x/y",
        ),
        *(
            "org/name@",
            "org/name:",
            "org/name:..",
            "org/name:a/../b",
            "org/name:/a",
            "org/name:a/./b",
            "org/name:a ",
        ),
        *(
            "org/name@a..",
            "org/name@../x",
            "org/name@a:b:c",
            "org/name@a b",
            "org/name@a//b",
            "org/name@a\u202eb",
        ),
        *(
            "org/na me",
            "org/na--me",
            "org/na..me",
            "org/name.git",
            "-org/name",
            "org/name-",
            "órg/name",
            "org/name\n",
        ),
        *("hf://org/name", "https://huggingface.co/org/name", "o" * 97 + "/n"),
    ],
)
def test_invalid_ids_are_not_parsed(source):
    assert parse(source) is None


def test_import_is_cheap():
    code = (
        "import sys, adapterkit.bases.hub.folder, adapterkit.bases.hub.push; "
        "print({'huggingface_hub', 'torch', 'httpx', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
