"""A Modelfile of Ollama for a GGUF file.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Ollama's templates are Go's,
and the one in a GGUF file is Jinja's: `ollama create` finds its own for that.
"""

from adapterkit.bases.gguf.header import GgufHeader

# metadata of `general.sampling.`, and the parameters that they are
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}


def modelfile(header: GgufHeader, name: str) -> bytes:
    """The text that makes a model of the file in the same folder, with what its metadata say of
    sampling."""
    lines = [f"FROM ./{name}"]
    if "tokenizer.chat_template" in header.metadata:
        lines.append("# the chat template is in the file")
    for key, parameter in SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {parameter} {float(f'{value:.6g}'):g}")
    return ("\n".join(lines) + "\n").encode()
