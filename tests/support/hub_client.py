"""A client of the Hub on 127.0.0.1, in a process of its own.

HF_ENDPOINT and HF_HUB_OFFLINE count when huggingface_hub is imported.
"""

import ast
import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.forks import forks
from tests.support.hub_server import Fault

ROOT = Path(__file__).parents[2]
REPO = "org/name"
TOKEN = "hf_" + "secretsecretsecret"
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": WEIGHTS[::-1],
}

WORKER = """
import ast, json, os, sys, traceback, warnings
warnings.simplefilter("error")
# huggingface_hub 2.4 about itself, and torchao 0.18 about its text
for text in (".*Use 'content=", ".*invalid escape sequence"):
    warnings.filterwarnings("ignore", text, DeprecationWarning)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
space = {}
for line in sys.stdin:
    body = ast.parse(json.loads(line)).body
    last = ast.parse("None", mode="eval")
    if isinstance(body[-1], ast.Expr):
        last = ast.Expression(body.pop().value)
    try:
        exec(compile(ast.Module(body, []), "test", "exec"), space)
        value = eval(compile(last, "test", "eval"), space)
        answer = {"value": repr(str(value) if isinstance(value, os.PathLike) else value)}
    except Exception as error:
        answer = {"kind": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        names = ("problem", "expected", "where", "hint")
        answer["parts"] = {name: getattr(error, name, "") for name in names}
    print(json.dumps(answer), file=answers, flush=True)
"""
PRELUDE = """
from adapterkit.bases.hub import folder as folders, listing, retry, upload as uploading
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.core.checkpoint.hub_ids import HubId, parse
from adapterkit.bases.hub.push import push
from pathlib import Path
retry.WAIT = 0.01
"""


class ClientError(Exception):
    """An exception of the client."""

    def __init__(self, kind: str, text: str, trace: str, parts: dict[str, str]):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.trace, self.parts = kind, text, trace, parts


class Client:
    """A process with adapterkit.bases.hub; called with code, it gives the value of the last
    expression."""

    def __init__(self, environment: dict[str, str], errors: Path):
        self.errors = errors
        pipes = [f"{errors}.{name}" for name in ("in", "out")]
        for pipe in pipes:
            os.mkfifo(pipe)
        self.pid = forks(rehearse=False).start(
            program=WORKER, env=environment, cwd=str(ROOT), streams=[*pipes, str(errors)]
        )
        self.questions, self.answers = open(pipes[0], "w"), open(pipes[1])  # noqa: SIM115 (until `close`)

    def __call__(self, code: str):
        self.questions.write(json.dumps(code) + "\n")
        self.questions.flush()
        line = self.answers.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        if "kind" in answer:
            raise ClientError(**answer)
        return ast.literal_eval(answer["value"])

    def refusal(self, code: str, kind: str = "Refused") -> ClientError:
        """The error that code ends in, which has all of its four parts."""
        with pytest.raises(ClientError) as caught:
            self(code)
        error = caught.value
        assert error.kind == kind, error.trace
        assert all(error.parts.values()), error.parts
        return error

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        if not self.questions.closed:
            self.questions.close()
            self.answers.close()
            forks(rehearse=False).wait(self.pid, 20)


OUTPUT = {
    "config.json": b'{"a": 1}',
    "model-00001-of-00002.safetensors": b"\0first" * 1000,
    "model-00002-of-00002.safetensors": b"\0second" * 1000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "README.md": b"---\nlibrary_name: transformers\n---\n",
}


def receipt(files: dict[str, bytes], job: str) -> bytes:
    """As much of the receipt of an output as tells that adapterkit wrote it."""
    listed = {name: {"size": len(data)} for name, data in files.items()}
    return json.dumps({"fingerprint": job, "files": listed}).encode()


OUTPUT["adapterkit.json"] = receipt(OUTPUT, "one")


def during(fault: Fault, method: str = "GET", path: str = "", times: int = 1_000_000):
    """Faults for the first requests of a kind."""
    left = [times]

    def faults(asked):
        if asked.method == method and path in asked.path and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return faults
