"""Write docs/errors.md from adapterkit/core/errors.toml.

python docs/errors.py
"""

from pathlib import Path
from textwrap import wrap

from adapterkit.core.errors import codes

TARGET = Path(__file__).with_name("errors.md")
HEAD = """
You got an error and want to know its cause and fix. Every error ends its first line with a code for
its kind of problem, for example `[AK401]`. With `--json` you find it under `code`, and in Python as
`error.code`. A code never changes its meaning. Wrong use of the command line (exit status 2) has no
code, and its message names the option. `adapterkit explain` prints the entries of this page:

```sh
adapterkit explain AK401
```
"""
PARTS = {  # by the first digit
    "1": "What was asked for", "2": "Files that are read", "3": "Adapters",
    "4": "An adapter, or a job, and its base", "5": "Formats of adapters", "6": "Outputs",
    "7": "The Hub", "8": "Adapters on live models", "9": "Statistics",
}  # fmt: skip


def document() -> str:
    """The whole page: each code with an anchor of its name."""
    lines, part = ["# Errors", *HEAD.rstrip().splitlines()], ""
    for code, entry in codes().items():
        if code[2] != part:
            part = code[2]
            lines += ["", f"## {PARTS[part]}"]
        texts = (f"**{entry['title']}**", entry["cause"], f"To do: {entry['do']}")
        lines += ["", f"### {code}"]
        for text in texts:
            lines += ["", *wrap(text, 98, break_long_words=False, break_on_hyphens=False)]
        command = [f"$ adapterkit {entry['command']}"] if "command" in entry else []
        lines += ["", "```console", *command, *entry["example"].splitlines(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8", newline="\n")
