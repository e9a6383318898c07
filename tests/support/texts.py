"""A tokenizer for the tiny models, and files of samples."""

import json
from pathlib import Path
from typing import Any

LETTERS = " abcdefghijklmnopqrstuvwxyz.,?!:\n"
WORDS = ["<unk>", "<pad>", "<eos>", *LETTERS, "th", "s ", "A", "B"]  # 41 ids
MERGES = [("t", "h"), ("s", " ")]
TEMPLATE = (
    "{% for message in messages %}{{ 'A' if message.role == 'user' else 'B' }}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}B{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'user' %}A{{ message.content }}"
    "{% else %}B{% generation %}{{ message.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE, pad: str | None = None) -> Path:
    """Letters as tokens, `th` and `s ` as one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token=pad,
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def ids(text: str) -> tuple[int, ...]:
    """The tokens of a text without `th` and `s `."""
    return tuple(map(WORDS.index, text))


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
