"""Servers of models: ask them for the log-probabilities of tokens, each by its own protocol.

vLLM and SGLang give those of a whole prompt at once. llama.cpp's server gives only those of the
next token, so it is asked once for each position."""

import http.client
import json
import math
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePath
from typing import Any, ClassVar

from adapterkit.core.errors import Refused, alternatives, did_you_mean, shown
from adapterkit.core.records import Json

SECONDS = 120.0  # until a server has to answer
LARGEST = 256 << 20  # bytes of an answer
BIAS = 1e4  # of a token's logit, to draw it for certain
LONGEST = 300  # characters of a server's own message that are shown
CODE = "AK910"
LogProbs = dict[int, float]  # of one position: id -> log-probability
PROTOCOLS = "vLLM, SGLang or llama.cpp's server"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because another host would get the key."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class Connection:
    """JSON over HTTP with one server."""

    def __init__(self, url: str, key: str | None = None, seconds: float = SECONDS):
        self.url, self.seconds = url, seconds
        self.headers = {"Content-Type": "application/json"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.build_opener(_NoRedirect)

    def get(self, path: str) -> Any:
        """Return the document at a path; None if the server has none there."""
        try:
            return self._answer(path, None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused(path, error) from error
            return None

    def post(self, path: str, request: Json) -> Any:
        """Return the server's answer to a request."""
        try:
            return self._answer(path, json.dumps(request).encode())
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from error

    def _answer(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, body, self.headers)
        try:
            with self.opener.open(request, timeout=self.seconds) as answer:
                data = answer.read(LARGEST + 1)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        with self.understood(path):
            if len(data) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            return json.loads(data)

    def _silent(self, error: Exception) -> Refused:
        """The refusal of a server that does not answer."""
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or reason
        if isinstance(reason, TimeoutError):
            text = f"no answer within {self.seconds:g} s"
        return Refused(
            shown(text),
            expected="a running server",
            where=self.url,
            hint="check the address, and that the server has loaded its model",
            code=CODE,
        )

    def _refused(self, path: str, error: urllib.error.HTTPError) -> Refused:
        """The refusal of a request that the server refuses, with its own words."""
        expected, hint = "an answer", "read the server's log"
        if error.code in (401, 403):
            expected, hint = (
                "a key",
                "give the name of the variable that has it: --api-key-env NAME",
            )
        elif error.code in (301, 302, 303, 307, 308):
            to = shown(error.headers.get("Location", "another address"))
            expected, hint = "the server's own address", f"it redirects to {to}"
        with error:
            words = _message(error.read(LARGEST)) or error.reason
        problem = f"{path} answers {error.code}: {shown(words)[:LONGEST]}"
        return Refused(problem, expected=expected, where=self.url, hint=hint, code=CODE)

    @contextmanager
    def understood(self, path: str) -> Iterator[None]:
        """`Refused` if the answer has another form than this block reads."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(
                f"{path} answers in another form: {type(error).__name__} {shown(error)}",
                expected=f"answers as those of {PROTOCOLS}",
                where=self.url,
                hint="check the address and the server's version",
                code=CODE,
            ) from error


def _message(data: bytes) -> str:
    """The message in an answer of an error, or the answer."""
    try:
        document = json.loads(data)
    except ValueError:
        return data[:LONGEST].decode("utf-8", "replace")
    inner = document.get("error", document) if isinstance(document, dict) else document
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


class Server(ABC):
    """A server that gives log-probabilities. `top`: the most likely tokens that it is asked for at
    each position, in addition to the given one; `most`: positions of all samples; `longest`: tokens
    of its context, if it says so."""

    title: str
    engine: ClassVar[str] = ""  # its name in `check --for`
    top: ClassVar[int]
    most: ClassVar[int] = 4096

    def __init__(self, connection: Connection, models: Sequence[Json]):
        self.connection = connection
        with connection.understood("/v1/models"):
            self.parents: dict[str, str | None] = {
                str(one["id"]): one.get("parent") for one in models
            }
            lengths = [
                one.get("max_model_len") or (one.get("meta") or {}).get("n_ctx") for one in models
            ]
        self.longest = min((one for one in lengths if type(one) is int), default=None)

    def find(self, name: str) -> tuple[str, str | None]:
        """Return the server's own spelling of a name, and the name of the model under an adapter;
        None if the name is a model's. `Refused` if the server has no such name."""
        if name in self.parents:
            return name, self.parents[name]
        known = list(self.parents)
        raise Refused(
            f"{self.title} has no {shown(name)!r}",
            expected=alternatives(name, [shown(one) for one in known]) or "a model",
            where=self.connection.url,
            hint=did_you_mean([name], known) or "give one of its names with --name",
            code=CODE,
        )

    @abstractmethod
    def predictions(
        self, name: str, tokens: Sequence[int], positions: Sequence[int], top: int
    ) -> list[LogProbs]:
        """Return the log-probabilities at each of these positions of the token after it: those of
        the `top` most likely tokens, and of the given one if the server has it."""

    def without(self, what: str) -> Refused:
        """The refusal of a server that gives no log-probabilities."""
        return Refused(
            f"{self.title} gives no {what}",
            expected=PROTOCOLS,
            where=self.connection.url,
            hint="serve the model with one of these; hosted APIs give none of a prompt's tokens",
            code=CODE,
        )

    def check_read(self, sent: Sequence[int], read: Sequence[int]) -> None:
        """`Refused` if the server read other tokens than it was sent."""
        if list(read) != list(sent):
            pairs = zip(sent, read, strict=False)
            at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(sent), len(read)))
            raise Refused(
                f"{self.title} read other tokens from the {at + 1}. on",
                expected=f"the {len(sent)} ids that it was sent",
                where=self.connection.url,
                hint="check that it serves this model, with this vocabulary",
                code=CODE,
            )


class Vllm(Server):
    """vLLM: `prompt_logprobs` of /v1/completions; `model` selects the adapter."""

    title, engine = "vLLM", "vllm"
    top = 20  # what it allows unless --max-logprobs is larger

    def predictions(
        self, name: str, tokens: Sequence[int], positions: Sequence[int], top: int
    ) -> list[LogProbs]:
        request = {"model": name, "prompt": list(tokens), "max_tokens": 1, "temperature": 0}
        request |= {"prompt_logprobs": top, "return_token_ids": True}
        answer = self.connection.post("/v1/completions", request)
        with self.connection.understood("/v1/completions"):
            choice = answer["choices"][0]
            rows, read = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
            if rows is None:
                raise self.without("log-probabilities of a prompt's tokens")
            self.check_read(tokens, tokens if read is None else read)
            own = [rows[position + 1].items() for position in positions]
            return [{int(id): _log(one["logprob"]) for id, one in row} for row in own]


class Other(Vllm):
    """A server that names itself otherwise, and may have vLLM's protocol."""

    engine = ""

    def __init__(self, connection: Connection, models: Sequence[Json]):
        super().__init__(connection, models)
        owners = dict.fromkeys(shown(one.get("owned_by") or "") for one in models)
        names = ", ".join(filter(None, owners))
        self.title = f"a server of {names}" if names else "the server"

    def predictions(
        self, name: str, tokens: Sequence[int], positions: Sequence[int], top: int
    ) -> list[LogProbs]:
        try:
            return super().predictions(name, tokens, positions, top)
        except Refused as error:
            if " answers " not in error.problem:
                raise
            what = f"log-probabilities of a prompt's tokens: {error.problem}"
            raise self.without(what) from error


class Sglang(Server):
    """SGLang: `input_top_logprobs` of /generate; `lora_path` is the adapter's name. Its
    /v1/completions gives none of a prompt."""

    title, engine = "SGLang", "sglang"
    top = 50

    def predictions(
        self, name: str, tokens: Sequence[int], positions: Sequence[int], top: int
    ) -> list[LogProbs]:
        sampling = {"max_new_tokens": 1, "temperature": 0}
        request: Json = {"input_ids": list(tokens), "sampling_params": sampling}
        request |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}
        request |= {} if self.parents[name] is None else {"lora_path": name}
        answer = self.connection.post("/generate", request)
        with self.connection.understood("/generate"):
            given = answer["meta_info"].get("input_token_logprobs")
            rows = answer["meta_info"].get("input_top_logprobs")
            if not given or not rows:
                raise self.without("log-probabilities of a prompt's tokens")
            self.check_read(tokens, [row[1] for row in given])
            own = [[*rows[position + 1], given[position + 1]] for position in positions]
            return [{int(one[1]): _log(one[0]) for one in row} for row in own]


class LlamaCpp(Server):
    """llama.cpp's server: `n_probs` of /completion, one request for each position; `lora` gives
    each adapter its scale. An adapter's name is its file's, with or without .gguf, or its path. The
    model's name means the model as it is served, which may apply adapters to all requests."""

    title, engine = "llama.cpp", "llama.cpp"
    top, most = 100, 64

    def __init__(self, connection: Connection, models: Sequence[Json]):
        super().__init__(connection, models)
        self.model, adapters = next(iter(self.parents), ""), connection.get("/lora-adapters") or ()
        with connection.understood("/lora-adapters"):
            self.scales = {int(one["id"]): float(one["scale"]) for one in adapters}
            paths = {int(one["id"]): PurePath(one["path"]) for one in adapters}
        stems = [path.stem for path in paths.values()]
        is_alone = lambda path: stems.count(path.stem) == 1
        self.ids = {path.stem if is_alone(path) else str(path): id for id, path in paths.items()}
        names = {id: name for name, id in self.ids.items()}
        self.spellings = {
            text: names[id]
            for id, path in paths.items()
            for text in (str(path), *([path.name] if is_alone(path) else []))
        }
        alone = f"{self.model} without adapters"
        self.parents |= dict.fromkeys(self.ids, alone) | ({alone: None} if self.ids else {})

    def find(self, name: str) -> tuple[str, str | None]:
        return super().find(self.spellings.get(name, name))

    def predictions(
        self, name: str, tokens: Sequence[int], positions: Sequence[int], top: int
    ) -> list[LogProbs]:
        return [self._next(name, tokens[: at + 1], tokens[at + 1], top) for at in positions]

    def _next(self, name: str, prompt: Sequence[int], token: int, top: int) -> LogProbs:
        """The log-probabilities after a prompt. A bias makes the server draw the given token, and
        list it too; what it lists has no bias. For a token that is no whole letter it lists none,
        so it draws a letter then."""
        request: Json = {"model": self.model, "prompt": list(prompt), "cache_prompt": True}
        request |= {"n_predict": 1, "n_probs": top, "post_sampling_probs": False}
        request |= {"temperature": 1.0, **self._adapters(name)}
        rows = self._listed(request | {"logit_bias": [[token, BIAS]]})
        rows = rows or self._listed(request | {"logit_bias": [[self._letter, BIAS]]})
        with self.connection.understood("/completion"):
            if not rows or "top_logprobs" not in rows[0]:
                raise self.without("log-probabilities of the next token")
            listed = (*rows[0]["top_logprobs"], rows[0])
            return {int(one["id"]): _log(one["logprob"]) for one in listed}

    def _listed(self, request: Json) -> list[Any]:
        answer, count = self.connection.post("/completion", request), len(request["prompt"])
        with self.connection.understood("/completion"):
            if answer.get("truncated") or answer.get("tokens_evaluated", count) != count:
                raise ValueError(f"of {count} tokens {answer['tokens_evaluated']} were read")
            return answer.get("completion_probabilities") or []

    @cached_property
    def _letter(self) -> int:
        """The id of a letter."""
        answer = self.connection.post("/tokenize", {"content": "a"})
        with self.connection.understood("/tokenize"):
            return int(answer["tokens"][-1])

    def _adapters(self, name: str) -> Json:
        """The scales of a request: of an adapter the server's own, or 1 if that is 0, and 0 of all
        others. The model's own name means the model as it is served."""
        if name == self.model:
            return {}
        own = self.ids.get(name)
        return {
            "lora": [{"id": i, "scale": (s or 1.0) * (i == own)} for i, s in self.scales.items()]
        }


def _log(value: Any) -> float:
    """A log-probability; some servers have none for a probability of 0."""
    number = -math.inf if value is None else float(value)
    if math.isnan(number) or number > 1e-3:
        raise ValueError(f"log-probability {number}")
    return number


KINDS: Mapping[str, type[Server]] = {"vllm": Vllm, "sglang": Sglang, "llamacpp": LlamaCpp}


def connect(url: str, key: str | None = None) -> Server:
    """Return the server at an address, by the owner that it names in its list of models, or by the
    addresses that only one kind has. `Refused` if it has no list."""
    connection = Connection(url, key)
    listing = connection.get("/v1/models")
    if listing is None:
        raise Refused(
            "there is no list of models at /v1/models",
            expected=f"the address of {PROTOCOLS}",
            where=url,
            hint="give the server's address, for example http://localhost:8000",
            code=CODE,
        )
    with connection.understood("/v1/models"):
        models = list(listing["data"])
        owner = str(models[0].get("owned_by")) if models else ""
    if owner not in KINDS:
        asked = {"/lora-adapters": "llamacpp", "/get_server_info": "sglang"}
        owner = next((kind for path, kind in asked.items() if connection.get(path)), owner)
    return KINDS.get(owner, Other)(connection, models)
