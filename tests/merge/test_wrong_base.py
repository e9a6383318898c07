"""A base that is another model's: a few lines, not one per module."""

import pytest

from adapterkit import merge
from adapterkit.errors import MultipleErrors
from tests.support import oracle


def test_a_wrong_base_is_a_few_lines(llama, lora, cached_folder, tmp_path):
    other = cached_folder(
        "gpt2-base", lambda folder: oracle.save_base(oracle.gpt2(), folder, "bf16")
    )
    with pytest.raises(MultipleErrors) as caught:
        merge(other, [lora], out=tmp_path / "out")
    modules = len(oracle.LINEAR) * 2
    assert len(caught.value.errors) == modules
    text = str(caught.value)
    assert (
        len(text.splitlines()) <= 7
        and f"{modules} of one kind" in text
        and text.count("the base has no") == 3
    )
