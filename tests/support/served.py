"""Servers that answer as vLLM and SGLang do: the forms of their documentation, the numbers of
transformers and PEFT."""

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

LIMIT, CONTEXT = 20, 64  # vLLM's --max-logprobs, and tokens with the drawn one
Route = Callable[[Any], tuple[int, Any]]  # the body of a request -> status, document


class Server:
    """Answers on a port of this machine; keeps the requests that it got."""

    def __init__(self, routes: Mapping[str, Route]):
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = json.loads(body) if body else None
                requests.append((self.path, request, dict(self.headers)))
                route = routes.get(self.path)
                answer: tuple[int, Any] = (
                    route(request) if route else (404, {"detail": "Not Found"})
                )
                status, document = answer
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                if status // 100 == 3:
                    self.send_header("Location", data.decode())
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Models:
    """Models by name: a base, and adapters on it, run by transformers and PEFT."""

    def __init__(
        self, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ):
        self.base, self.adapters, self.dtype = base, adapters, dtype
        self.load = functools.cache(self._load)

    def _load(self, name: str) -> Any:
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(self.base, dtype=self.dtype, attn_implementation="eager")
        if name in self.adapters:
            model = PeftModel.from_pretrained(model, self.adapters[name]).to(self.dtype)
        return model.eval()

    def log_probabilities(self, name: str, tokens: Sequence[int]) -> Tensor:
        """(tokens, vocabulary) float64, of the token after each."""
        with torch.no_grad():
            logits = self.load(name)(torch.tensor([tokens])).logits[0]
        return torch.log_softmax(logits.float(), -1).double()

    def cards(self, owner: str, base: str = "base") -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        about = {"object": "model", "created": 1, "owned_by": owner}
        own = [{"id": base, **about, "root": str(self.base), "parent": None}]
        own[0]["max_model_len"] = CONTEXT
        return own + [
            {"id": name, **about, "root": str(path), "parent": base}
            for name, path in self.adapters.items()
        ]


def _listed(row: Tensor, token: int, top: int) -> list[tuple[int, float]]:
    """The given token, and the most likely ones."""
    ids = dict.fromkeys([token, *row.topk(min(top, len(row))).indices.tolist()])
    return [(id, float(row[id])) for id in ids]


def vllm(models: Models, owner: str = "vllm") -> Server:
    def completions(request: Any) -> tuple[int, Any]:
        tokens, top = request["prompt"], request["prompt_logprobs"]
        assert all(type(token) is int for token in tokens) and request["max_tokens"] >= 1
        assert len(tokens) < CONTEXT
        if top > LIMIT:
            message = f"Requested prompt logprobs of {top}, which is greater than max allowed: 20"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        rows = models.log_probabilities(request["model"], tokens)
        listed = [
            {
                str(id): {"logprob": value, "rank": rank, "decoded_token": "x"}
                for rank, (id, value) in enumerate(_listed(row, token, top), 1)
            }
            for row, token in zip(rows, tokens[1:], strict=False)
        ]
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
        choice |= {"prompt_logprobs": [None, *listed], "prompt_token_ids": tokens}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}

    listing = {"object": "list", "data": models.cards(owner)}
    return Server({"/v1/models": lambda _: (200, listing), "/v1/completions": completions})


def sglang(models: Models) -> Server:
    def generate(request: Any) -> tuple[int, Any]:
        tokens, top = request["input_ids"], request["top_logprobs_num"]
        assert request["return_logprob"] and request["logprob_start_len"] == 0
        rows = models.log_probabilities(request.get("lora_path") or "base", tokens)
        given = [[None, tokens[0], None]]
        given += [
            [float(row[token]), token, None] for row, token in zip(rows, tokens[1:], strict=False)
        ]
        best = [None] + [
            [[float(row[id]), id, None] for id in row.topk(min(top, len(row))).indices.tolist()]
            for row in rows[:-1]
        ]
        meta = {"input_token_logprobs": given, "input_top_logprobs": best, "prompt_tokens": 1}
        return 200, {"text": "x", "output_ids": [1], "meta_info": meta}

    listing = {"object": "list", "data": models.cards("sglang")}
    return Server({"/v1/models": lambda _: (200, listing), "/generate": generate})
