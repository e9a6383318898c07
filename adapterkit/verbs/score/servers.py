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
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any, ClassVar

from adapterkit.core.errors import Refused, alternatives, did_you_mean, shown
from adapterkit.core.records import Json

SECONDS = 120.0  # until a server has to answer
LARGEST = 256 << 20  # bytes of an answer
BIAS = 1e4  # of a token's logit, to draw it for certain
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
        self.headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        self.opener = urllib.request.build_opener(_NoRedirect)

    def refused(self, problem: str, expected: str, hint: str) -> Refused:
        return Refused(problem, expected=expected, where=self.url, hint=hint, code="AK910")

    def get(self, path: str) -> Any:
        """Return the document at a path; None if the server has none there."""
        try:
            return self._answer(path, None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._status(path, error) from error
            return None

    def post(self, path: str, request: Json) -> Any:
        """Return the server's answer to a request."""
        try:
            return self._answer(path, json.dumps(request).encode())
        except urllib.error.HTTPError as error:
            raise self._status(path, error) from error

    def _answer(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, body, self.headers)
        try:
            with self.opener.open(request, timeout=self.seconds) as answer:
                data = answer.read(LARGEST + 1)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            late = f"no answer within {self.seconds:g} s"
            text = late if isinstance(reason, TimeoutError) else getattr(reason, "strerror", reason)
            hint = "check the address, and that the server has loaded its model"
            raise self.refused(shown(text), "a running server", hint) from error
        with self.understood(path):
            if len(data) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            return json.loads(data)

    def _status(self, path: str, error: urllib.error.HTTPError) -> Refused:
        """The refusal of a request that the server refuses, with the server's own words."""
        expected, hint = "an answer", "read the server's log"
        if error.code in (401, 403):
            expected, hint = "a key", "name the variable that has it with --api-key-env"
        elif 300 <= error.code < 400:
            hint = f"it redirects to {shown(error.headers.get('Location'))}: give its own address"
        with error:
            text = error.read(LARGEST).decode("utf-8", "replace")
        return self.refused(f"{path} answers {error.code}: {shown(text)}", expected, hint)

    @contextmanager
    def understood(self, path: str) -> Iterator[None]:
        """`Refused` if the answer has another form than this block reads."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{path} answers in another form: {type(error).__name__} {shown(error)}"
            expected, hint = f"answers as those of {PROTOCOLS}", "check the server's version"
            raise self.refused(problem, expected, hint) from error


@dataclass(frozen=True)
class Query:
    """A prompt; the positions at which the token after it is predicted; and how many of the most
    likely tokens are listed there, in addition to the given one."""

    name: str  # of the model or the adapter
    tokens: Sequence[int]
    positions: Sequence[int]
    top: int


class Server(ABC):
    """A server that gives log-probabilities. `top`: how many tokens it is asked to list; `most`: at
    how many positions of all prompts; `longest`: tokens of its context, if it says so."""

    title: str
    engine: ClassVar[str] = ""  # its name in `check --for`
    top: ClassVar[int]
    most: ClassVar[int] = 4096

    def __init__(self, connection: Connection, models: Sequence[Json]):
        self.connection = connection
        with connection.understood("/v1/models"):
            self.parents: dict[str, str | None] = {str(x["id"]): x.get("parent") for x in models}
            own = [x.get("max_model_len") or (x.get("meta") or {}).get("n_ctx") for x in models]
        self.longest = min((one for one in own if type(one) is int), default=None)

    def find(self, name: str) -> tuple[str, str | None]:
        """Return the server's spelling of a name, and the name of the model under it if it is an
        adapter. `Refused` if the server has no such name."""
        if name in self.parents:
            return name, self.parents[name]
        known = list(map(shown, self.parents))
        hint = did_you_mean([name], known) or "give one of its names with --name"
        problem = f"{self.title} has no {shown(name)!r}"
        raise self.connection.refused(problem, alternatives(name, known) or "a model", hint)

    @abstractmethod
    def predictions(self, query: Query) -> list[LogProbs]:
        """Return the log-probabilities at each position; the given token may be missing."""

    def without(self, why: str = "") -> Refused:
        """The refusal of a server that gives no log-probabilities."""
        hint = "serve the model with one of these; hosted APIs give none of given tokens"
        problem = f"{self.title} gives no log-probabilities of given tokens{why}"
        return self.connection.refused(problem, PROTOCOLS, hint)

    def check_read(self, sent: Sequence[int], read: Sequence[int]) -> None:
        """`Refused` if the server read other tokens than it was sent."""
        if list(read) != list(sent):
            problem = f"{self.title} read other tokens: {list(read)[:8]} ..."
            hint = "check that it serves this model, with this vocabulary"
            raise self.connection.refused(problem, f"{list(sent)[:8]} ..., as sent", hint)


class Vllm(Server):
    """vLLM: `prompt_logprobs` of /v1/completions; `model` selects the adapter."""

    title, engine = "vLLM", "vllm"
    top = 20  # what it allows unless --max-logprobs is larger

    def predictions(self, query: Query) -> list[LogProbs]:
        tokens = list(query.tokens)
        request = {"model": query.name, "prompt": tokens, "max_tokens": 1, "temperature": 0}
        request |= {"prompt_logprobs": query.top, "return_token_ids": True}
        answer = self.connection.post("/v1/completions", request)
        with self.connection.understood("/v1/completions"):
            choice = answer["choices"][0]
            if (rows := choice.get("prompt_logprobs")) is None:
                raise self.without()
            self.check_read(tokens, choice.get("prompt_token_ids") or tokens)
            own = [rows[at + 1].items() for at in query.positions]
            return [{int(id): _log(one["logprob"]) for id, one in row} for row in own]


class Other(Vllm):
    """A server that names itself otherwise, and may have vLLM's protocol."""

    engine = ""

    def __init__(self, connection: Connection, models: Sequence[Json]):
        super().__init__(connection, models)
        owners = dict.fromkeys(shown(one.get("owned_by") or "unknown") for one in models)
        self.title = f"a server of {', '.join(owners)}"

    def predictions(self, query: Query) -> list[LogProbs]:
        try:
            return super().predictions(query)
        except Refused as error:
            if " answers 4" not in error.problem:
                raise
            raise self.without(f": {error.problem}") from error


class Sglang(Server):
    """SGLang: `input_top_logprobs` of /generate; `lora_path` is the adapter's name. Its
    /v1/completions gives none of a prompt."""

    title, engine = "SGLang", "sglang"
    top = 50

    def predictions(self, query: Query) -> list[LogProbs]:
        sampling = {"max_new_tokens": 1, "temperature": 0}
        request: Json = {"input_ids": list(query.tokens), "sampling_params": sampling}
        request |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": query.top}
        request |= {} if self.parents[query.name] is None else {"lora_path": query.name}
        answer = self.connection.post("/generate", request)
        with self.connection.understood("/generate"):
            about = answer["meta_info"]
            given, rows = about.get("input_token_logprobs"), about.get("input_top_logprobs")
            if not given or not rows:
                raise self.without()
            self.check_read(query.tokens, [row[1] for row in given])
            own = [[*rows[at + 1], given[at + 1]] for at in query.positions]
            return [{int(one[1]): _log(one[0]) for one in row} for row in own]


class LlamaCpp(Server):
    """llama.cpp's server: `n_probs` of /completion, one request for each position; `lora` gives
    each adapter its scale. An adapter's name is its file's, or its path if others have that name.
    The model's name means the model as it is served, which may apply adapters to all requests."""

    title, engine = "llama.cpp", "llama.cpp"
    top, most = 100, 64

    def __init__(self, connection: Connection, models: Sequence[Json]):
        super().__init__(connection, models)
        self.models, adapters = list(self.parents), connection.get("/lora-adapters") or ()
        with connection.understood("/lora-adapters"):
            self.scales = {int(one["id"]): float(one["scale"]) for one in adapters}
            paths = {int(one["id"]): PurePath(one["path"]) for one in adapters}
        stems = [path.stem for path in paths.values()]
        name = lambda path: path.stem if stems.count(path.stem) == 1 else str(path)
        self.ids = {name(path): id for id, path in paths.items()}
        alone = f"{self.models[0]} without adapters"
        self.parents |= dict.fromkeys(self.ids, alone) | ({alone: None} if self.ids else {})

    def find(self, name: str) -> tuple[str, str | None]:
        stem = PurePath(name).stem
        return super().find(stem if name not in self.parents and stem in self.ids else name)

    def predictions(self, query: Query) -> list[LogProbs]:
        return [self._next(query, at + 1) for at in query.positions]

    def _next(self, query: Query, at: int) -> LogProbs:
        """The log-probabilities of a token. A bias makes the server draw the given one, and list it
        too; what it lists has no bias. It lists none for a token that is no whole letter, so a
        letter is drawn then."""
        model = query.name if query.name in self.models else self.models[0]
        request: Json = {"model": model, "prompt": list(query.tokens[:at])}
        request |= {"n_predict": 1, "n_probs": query.top, "post_sampling_probs": False}
        request |= {"temperature": 1.0, "cache_prompt": True, **self._adapters(query.name)}
        rows = self._listed(request | {"logit_bias": [[query.tokens[at], BIAS]]})
        rows = rows or self._listed(request | {"logit_bias": [[self._letter, BIAS]]})
        with self.connection.understood("/completion"):
            if not rows or "top_logprobs" not in rows[0]:
                raise self.without()
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
        """The scales of a request: of an adapter the server's own, or 1 if that is 0; 0 of all
        others."""
        if name in self.models:
            return {}
        own, scales = self.ids.get(name), self.scales.items()
        return {"lora": [{"id": i, "scale": (s or 1.0) * (i == own)} for i, s in scales]}


def _log(value: Any) -> float:
    """A log-probability; some servers have none for a probability of 0."""
    number = -math.inf if value is None else float(value)
    if math.isnan(number) or number > 1e-3:
        raise ValueError(f"log-probability {number}")
    return number


KINDS: Mapping[str, type[Server]] = {"vllm": Vllm, "sglang": Sglang, "llamacpp": LlamaCpp}
ADDRESSES = {"/lora-adapters": "llamacpp", "/get_server_info": "sglang"}  # that one kind has


def connect(url: str, key: str | None = None) -> Server:
    """Return the server at an address, by the owner in its list of models or by an address that
    only one kind has. `Refused` if it has no list."""
    connection = Connection(url, key)
    if (listing := connection.get("/v1/models")) is None:
        hint = "give the server's address, for example http://localhost:8000"
        raise connection.refused("there is no list of models at /v1/models", PROTOCOLS, hint)
    with connection.understood("/v1/models"):
        models = list(listing["data"])
        kind = str(models[0].get("owned_by"))
    if kind not in KINDS:
        kind = next((kind for path, kind in ADDRESSES.items() if connection.get(path)), kind)
    return KINDS.get(kind, Other)(connection, models)
