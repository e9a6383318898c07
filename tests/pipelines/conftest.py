"""Tiny pipelines of diffusers on disk."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest

from tests.support import pipelines
from tests.support.pipeline_files import quiet


@pytest.fixture(autouse=True)
def released_peft(monkeypatch):
    """transformers 5.24 asks for PEFT 0.22 before it loads an adapter, of which there is none."""
    monkeypatch.setattr(
        "transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__, raising=False
    )


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, made once."""
    home, made = tmp_path_factory.mktemp("pipelines"), {}

    def folder(name: str) -> Path:
        if name not in made:
            with quiet():
                pipelines.ALL[name]().save_pretrained(home / name)
            card = "---\nlicense: mit\npipeline_tag: text-to-image\n---\n# a base\n"
            (home / name / "README.md").write_text(card)
            (home / name / "sample.png").write_bytes(b"\x89PNG picture")
            made[name] = home / name
        return made[name]

    return folder
