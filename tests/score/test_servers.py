"""Servers of models: their protocols, and a refusal with a hint for each that cannot be asked."""

import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.verbs.score.compare_verb import Compare
from adapterkit.verbs.score.servers import Connection, Query, connect
from tests.support.served import Server

TOKENS, AT = [5, 6, 7], [0, 1]


def card(name: str, owner: str = "vllm", parent: str | None = None) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": owner, "parent": parent}


def listing(*cards: dict[str, Any]) -> Callable[[Any], tuple[int, Any]]:
    return lambda _: (200, {"object": "list", "data": list(cards)})


VLLM = listing(card("org/base"), card("style", parent="org/base"))


def logprob(value: float | None, rank: int = 1) -> dict[str, Any]:
    return {"logprob": value, "rank": rank, "decoded_token": "x"}


def completion(**choice: Any) -> Callable[[Any], tuple[int, Any]]:
    return lambda _: (200, {"choices": [{"index": 0, "text": "x", "logprobs": None} | choice]})


ROWS = [None, {"6": logprob(-1.5), "9": logprob(-0.5)}, {"7": logprob(-0.25)}]


def test_vllm_s_request_and_answer():
    answer = completion(prompt_logprobs=ROWS, prompt_token_ids=TOKENS)
    with Server({"/v1/models": VLLM, "/v1/completions": answer}) as server:
        one = connect(server.url, "secret")
        assert (one.title, one.find("style"), one.find("org/base")) == (
            "vLLM",
            ("style", "org/base"),
            ("org/base", None),
        )
        assert one.predictions(Query("style", TOKENS, AT, 2)) == [{6: -1.5, 9: -0.5}, {7: -0.25}]
    path, request, headers = server.requests[-1]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert request == {
        "model": "style",
        "prompt": TOKENS,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 2,
        "return_token_ids": True,
    }


def test_sglang_s_request_and_answer():
    meta = {
        "input_token_logprobs": [[None, 5, None], [-1.5, 6, None], [None, 7, None]],
        "input_top_logprobs": [None, [[-0.5, 9, None]], [[-0.25, 8, None]]],
    }
    models = listing(card("base", "sglang"), card("style", "sglang", "base"))
    generate = lambda _: (200, {"text": "x", "meta_info": meta})
    with Server({"/v1/models": models, "/generate": generate}) as server:
        one = connect(server.url)
        found = [one.predictions(Query(name, TOKENS, AT, 1)) for name in ("style", "base")]
    assert one.title == "SGLang" and found[0] == found[1] == [
        {9: -0.5, 6: -1.5},
        {8: -0.25, 7: -math.inf},
    ]
    request, base = (request for path, request, _ in server.requests if path == "/generate")
    assert request["input_ids"] == TOKENS and request["lora_path"] == "style"
    assert request["return_logprob"] and request["logprob_start_len"] == 0
    assert request["top_logprobs_num"] == 1 and "lora_path" not in base


ADAPTERS = [
    {"id": 0, "path": "a/style.gguf", "scale": 0.5},
    {"id": 1, "path": "b/other.gguf", "scale": 0.0},
    {"id": 2, "path": "x/same.gguf", "scale": 1.0},
    {"id": 3, "path": "y/same.gguf", "scale": 1.0},
]


@pytest.fixture
def llama_cpp() -> Iterator[Server]:
    """Token 7 is half a letter."""

    def complete(request: Any) -> tuple[int, Any]:
        drawn, count = request["logit_bias"][0][0], len(request["prompt"])
        one = {"id": drawn, "logprob": -2.0, "top_logprobs": [{"id": 9, "logprob": -0.5}]}
        rows = {"completion_probabilities": [one]} if drawn != 7 else {}
        return 200, {"tokens_evaluated": count, "truncated": False} | rows

    cards = card("m.gguf", "llamacpp"), card("two.gguf", "llamacpp")
    routes = {"/v1/models": listing(*cards), "/completion": complete}
    routes |= {"/lora-adapters": lambda _: (200, ADAPTERS)}
    with Server(routes | {"/tokenize": lambda _: (200, {"tokens": [40, 41]})}) as server:
        yield server


def test_llama_cpp_is_asked_for_each_position(llama_cpp: Server):
    one = connect(llama_cpp.url)
    assert one.predictions(Query("style", TOKENS, AT, 3)) == [
        {9: -0.5, 6: -2.0},
        {9: -0.5, 41: -2.0},
    ]
    asked = [request for path, request, _ in llama_cpp.requests if path == "/completion"]
    assert [request["prompt"] for request in asked] == [[5], [5, 6], [5, 6]]
    assert [request["logit_bias"][0][0] for request in asked] == [6, 7, 41]
    assert all(request["n_predict"] == 1 and request["n_probs"] == 3 for request in asked)


@pytest.mark.parametrize(
    "name, scales",
    [
        ("style", (0.5, 0, 0, 0)),
        ("style.gguf", (0.5, 0, 0, 0)),
        ("a/style.gguf", (0.5, 0, 0, 0)),
        ("other", (0, 1, 0, 0)),  # loaded without being applied: requests apply it
        ("y/same.gguf", (0, 0, 0, 1)),
        ("m.gguf without adapters", (0, 0, 0, 0)),
        ("m.gguf", None),
        ("two.gguf", None),
    ],
)
def test_llama_cpp_s_scales(name: str, scales: tuple | None, llama_cpp: Server):
    one = connect(llama_cpp.url)
    own, base = one.find(name)
    assert base == ("m.gguf without adapters" if scales and any(scales) else None)
    one.predictions(Query(own, TOKENS, [0], 3))
    sent = llama_cpp.requests[-1][1]
    expected = scales and [{"id": id, "scale": scale} for id, scale in enumerate(scales)]
    assert sent.get("lora") == expected
    assert sent["model"] == ("two.gguf" if name == "two.gguf" else "m.gguf")


def refusal(routes: dict, name: str = "style") -> Refused:
    with Server(routes) as server:
        with pytest.raises(Refused) as caught:
            one = connect(server.url)
            one.predictions(Query(one.find(name)[0], TOKENS, AT, 2))
        assert caught.value.where == server.url and caught.value.code == "AK910"
        assert caught.value.expected and caught.value.hint
    return caught.value


def answered(status: int, document: Any) -> dict:
    return {"/v1/models": VLLM, "/v1/completions": lambda _: (status, document)}


READ = {"prompt_logprobs": ROWS}


@pytest.mark.parametrize(
    "routes, words",
    [
        ({}, "there is no list of models at /v1/models"),
        ({"/v1/models": lambda _: (401, b"Unauthorized")}, "/v1/models answers 401: Unauthorized"),
        ({"/v1/models": lambda _: (200, b"<html>")}, "answers in another form"),
        ({"/v1/models": lambda _: (200, {"data": []})}, "answers in another form: IndexError"),
        ({"/v1/models": lambda _: (200, {"data": [{}]})}, "answers in another form: KeyError 'id'"),
        (answered(404, b"no such `style`"), "/v1/completions answers 404: no such `style`"),
        (answered(500, b"\x1b[31m oh"), r"answers 500: \x1b[31m oh"),
        (answered(200, {"choices": []}), "answers in another form: IndexError"),
        (answered(302, b"http://localhost/x"), "answers 302: http://localhost/x"),
    ],
)
def test_answers_that_are_refused(routes: dict, words: str):
    assert words in refusal(routes).problem


@pytest.mark.parametrize(
    "choice, words",
    [
        ({}, "vLLM gives no log-probabilities of given tokens"),
        (
            {"prompt_logprobs": ROWS, "prompt_token_ids": [1, 5, 6, 7]},
            "vLLM read other tokens: [1, 5, 6, 7] ...",
        ),
        (
            {"prompt_logprobs": ROWS, "prompt_token_ids": [5, 6]},
            "vLLM read other tokens: [5, 6] ...",
        ),
        ({"prompt_logprobs": ROWS[:2]}, "answers in another form: IndexError"),
        ({"prompt_logprobs": [None, {"6": logprob(2.0)}, {}]}, "log-probability 2.0"),
        ({"prompt_logprobs": [None, {"6": logprob(math.nan)}, {}]}, "log-probability nan"),
    ],
)
def test_completions_that_are_refused(choice: dict, words: str):
    routes = {"/v1/models": VLLM, "/v1/completions": completion(**choice)}
    assert words in refusal(routes).problem


@pytest.mark.parametrize(
    "answer", [completion(), lambda _: (400, {"error": {"message": "prompt is no text"}})]
)
def test_a_hosted_api_is_refused_by_name(answer: Callable):
    models = listing(card("style", "system"), card("other", "acme"))
    error = refusal({"/v1/models": models, "/v1/completions": answer})
    assert error.problem.startswith("a server of system, acme gives no log-probabilities")
    assert error.expected == "vLLM, SGLang or llama.cpp's server"


def test_a_server_with_vllm_s_protocol_and_another_name_is_asked():
    answer = completion(prompt_logprobs=ROWS)
    with Server({"/v1/models": listing(card("x", "me")), "/v1/completions": answer}) as server:
        assert connect(server.url).predictions(Query("x", TOKENS, [1], 2)) == [{7: -0.25}]


@pytest.mark.parametrize("path", ["/lora-adapters", "/get_server_info"])
def test_a_server_behind_another_name_is_known_by_its_addresses(path: str):
    routes = {"/v1/models": listing(card("x", "me")), path: lambda _: (200, ADAPTERS)}
    with Server(routes) as server:
        title = connect(server.url).title
    assert title == {"/lora-adapters": "llama.cpp", "/get_server_info": "SGLang"}[path]


def test_an_unknown_name_gets_the_nearest():
    error = refusal({"/v1/models": VLLM}, "stile")
    assert error.problem == "vLLM has no 'stile'" and error.expected == "org/base or style"
    assert error.hint == "did you mean 'style'?"


def test_no_answer_in_time_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Refused, match=r"no answer within 0\.2 s"):
            Connection(url, seconds=0.2).get("/v1/models")


def test_a_redirect_does_not_get_the_key():
    moved = lambda _: (302, f"{other.url}/v1/models".encode())
    routes = {"/v1/models": VLLM, "/v1/completions": moved}
    with (
        Server({"/v1/models": VLLM}) as other,
        Server(routes) as server,
        pytest.raises(Refused, match="it redirects to http"),
    ):
        connect(server.url, "secret").predictions(Query("style", TOKENS, AT, 2))
    assert not other.requests


@pytest.mark.parametrize(
    "given, words",
    [
        ({"url": "localhost:8000"}, "--url 'localhost:8000'"),
        ({"url": "file:///etc/passwd"}, "with http:// or https://"),
        ({"url": "http://me:secret@host"}, "--api-key-env"),
        ({"api_key_env": "sk-secret"}, "--api-key-env '...'"),
        ({"api_key_env": "NO_SUCH_KEY"}, "--api-key-env 'NO_SUCH_KEY'"),
    ],
)
def test_wrong_options(given: dict, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    call: dict[str, Any] = {"url": "http://host", "model": "base", "served": "style"} | given
    with pytest.raises(AdapterkitError) as caught:
        Compare(**call)
    assert words in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.is_usage


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_is_that_of_the_server(end: str):
    assert Compare(f"http://host:1/a{end}", "base", served="x").url == "http://host:1/a"
