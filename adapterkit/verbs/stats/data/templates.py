"""Render chat templates, which are programs of strangers, in a process with limits of time and
memory. Messages and texts pass through its pipes as lines of JSON."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from adapterkit.core.errors import Refused
from adapterkit.core.records import Json
from adapterkit.core.system import system

SECONDS, TOTAL, SHARE = 10.0, 60.0, 0.1  # for a conversation, for all, and more of it for each
MEMORY = 1 << 30  # bytes more than at its start, if the system can limit them
TEXT, TIMES = 1 << 20, 16  # bytes of a text, and for each byte that is rendered
KEPT = (  # of the environment: what Python and its libraries need to start
    "PATH", "HOME", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "USERPROFILE", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
)  # fmt: skip
Limit = Callable[[int], float]


class LimitedProcess:
    """A process that runs a module's `serve`, from the first request until a limit ends it."""

    def __init__(self, module: str, memory: int) -> None:
        self.module, self.memory, self.process = module, memory, None

    def answer(self, request: Json, seconds: Limit, most: Limit) -> bytes:
        """The line that answers a request; an incomplete one if a limit ended the process.
        `seconds` and `most` give the limits of time and of the answer's bytes for the request's
        bytes."""
        line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode()
        process = self.process = self.process or _started(self.module, self.memory)
        timer = threading.Timer(seconds(len(line)), process.kill)
        timer.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            return process.stdout.readline(int(most(len(line))))
        except OSError:  # it ended before it had read all
            return b""
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


class TemplateProcess(LimitedProcess):
    """The process that renders chat templates."""

    def __init__(self) -> None:
        super().__init__(__name__, MEMORY)
        self._left = TOTAL

    def render(self, where: str, request: Json) -> tuple[list[str], list[Any]]:
        """The result of transformers' `render_jinja_template` for these arguments."""
        began = time.monotonic()
        answer = b""
        if self._left > 0:
            seconds = min(SECONDS, self._left)
            answer = self.answer(request, lambda size: seconds, lambda size: TEXT + TIMES * size)
            self._left += SHARE - (time.monotonic() - began)
        if not answer.endswith(b"\n"):
            self._left = 0.0
            raise Refused(
                f"the chat template takes more than {SECONDS:g} s, {MEMORY >> 20} MiB, or {TIMES} "
                f"times the text of the messages, or {TOTAL:g} s for all",
                expected="a template that only writes the messages",
                where=where,
                hint="give text, or a tokenizer whose chat template ends",
                code="AK901",
            )
        rendered = json.loads(answer)
        if "error" in rendered:
            raise ValueError(rendered["error"])
        return rendered["texts"], rendered["spans"]


def _started(module: str, memory: int) -> Any:
    words = [sys.executable, "-P", "-m", module, str(memory)]  # -P: no module of the folder here
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process: Any = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=null, env=environment)
    process.stdout.readline()  # it has imported what it needs, which takes a second
    return process


def serve(library: str, answer: Callable[[Json], object]) -> None:
    """Answer each line, after an empty one; `library` is imported before memory is limited."""
    # nothing here uses torch, and its import takes a second
    sys.modules["torch"] = None  # type: ignore[assignment]
    importlib.import_module(library)
    system.limit(int(sys.argv[1]), 3600)  # seconds, in case its parent has died
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def _answer(request: Json) -> Json:
    """The texts and spans of a conversation, or the reason why there are none."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(**request)
        return {"texts": texts, "spans": spans}
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        return {"error": str(error)[:1000] or type(error).__name__}


if __name__ == "__main__":
    serve("transformers.utils.chat_template_utils", _answer)
