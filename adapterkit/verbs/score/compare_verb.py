"""compare: whether a server serves this model, with this adapter."""

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from adapterkit.core.options import (
    COUNT,
    FILES,
    PROGRESS,
    SOURCE,
    TEXT,
    Progress,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.core.records import Check, Json, invalid_value
from adapterkit.core.verb import Verb, function_of
from adapterkit.verbs.score.options import SampleOptions


def _url(value: object) -> str:
    """The address of a server, without the /v1 and the slash at its end."""
    parts = urlsplit(value) if isinstance(value, str) and value.isprintable() else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        hint = "for example http://localhost:8000"
        raise invalid_value(value, "the address of a server, with http:// or https://", hint)
    if parts.username is not None or parts.query or parts.fragment:
        hint = "put the key into a variable, and give its name with --api-key-env"
        raise invalid_value(f"{parts.scheme}://{parts.hostname}", "an address alone", hint)
    return str(value).rstrip("/").removesuffix("/v1").rstrip("/")


def _variable(value: object) -> str:
    """The name of a variable of the environment that has a value."""
    if not isinstance(value, str) or not os.environ.get(value):
        # a key that was given by mistake is not printed
        shown = value if isinstance(value, str) and value.isupper() else "..."
        raise invalid_value(shown, "a variable that is set", "give its name, and set it")
    return value


URL = Check("the address of a server", _url, example="http://localhost:8000")
VARIABLE = Check("a variable of the environment", _variable)


@record
class Compare(Verb[Json], SampleOptions):
    """Compare what a server serves under a name with files, by the log-probabilities of the same
    tokens. Returns

    - `compare`: 1, the version of this document; `server`, `url`, `name`, and `base`, the name of
      the model that the server has under the adapter
    - `acts`: whether the served adapter changes the served base; `same`: whether it is this adapter
      (without `adapter`: whether the served model is `model`); None for what cannot be decided
    - `verdict`: the same as a sentence; `nearest`: the variant of the adapter that is nearest to
      what is served; `drops`: modules whose deltas the server leaves out
    - `kl`: means over the positions, in nats: `file` of the served predictions from the file's,
      `base` from the file's base, `served_base` from the served base, `noise` of the served base
      from the file's base, `effect` of the file's adapter from the file's base
    - `variants`: the divergence of the served predictions from each variant, None unless it was run
    - `texts`, `positions`, `top`: how much was compared; `notes`

    The divergence of P from Q at a position is KL(P || Q) = Σ p·log(p/q) over the tokens that the
    server lists and one bucket for all others. Merging tokens into a bucket never raises it, so it
    is a lower bound of the divergence over all tokens.

    The files run in float32 unless `dtype` is given, and a server in its own dtype. The divergence
    between both bases measures that, so smaller differences do not count. `data` as in `stats`.
    `api_key_env`: the variable of the environment that has the server's key. Raises `Refused` if
    the server does not answer, lacks the name, or gives no log-probabilities."""

    tier = "experimental"
    runner = "verbs.score.compare:compare_server"
    command = """Check whether a server serves this model, with this adapter.

    Asks a running server (vLLM, SGLang, or llama.cpp's) for log-probabilities with and without the
    adapter, and compares them with those of the files. It says whether the adapter acts, whether it
    is this one, and what it is otherwise: for example this one with twice its weight, or without
    its embeddings. The exit status is 1 unless it is this one.

    \b
    Example:
      adapterkit compare http://localhost:8000 BASE --adapter style --name style
      adapterkit compare http://localhost:8080 merged --name merged --data texts.jsonl
    """

    url: str = argument(kw_only=False, check=URL)
    model: StrPath = argument(kw_only=False, check=SOURCE)
    adapter: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="ADAPTER",
        help="The adapter that the server should apply (default: compare the model alone).",
    )
    served: str = option(
        check=TEXT,
        flags=("--name",),
        metavar="NAME",
        help="The server's name of the adapter, or of the model without --adapter.",
    )
    data: StrPath | Sequence[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE",
        help="Texts to compare on, best those on which the adapter acts; repeat for several "
        "(default: a few short texts).",
    )
    samples: int = option(default=16, check=COUNT, help="Number of samples to draw.")
    top: int | None = option(
        default=None,
        check=COUNT,
        help="Most likely tokens that the server is asked for at each position (default: 20 of "
        "vLLM, 50 of SGLang, 100 of llama.cpp).",
    )
    api_key_env: str | None = option(
        default=None,
        check=VARIABLE,
        metavar="VARIABLE",
        help="Variable of the environment that has the server's key.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


compare = function_of(Compare)
