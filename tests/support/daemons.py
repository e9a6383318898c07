"""Processes that end with this one, and this one when its input does, whoever closes it.

Started as a script: each line of the input, JSON, is a command and the file of its messages.
"""

import ctypes
import json
import subprocess
import sys

import psutil

SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def serve() -> None:
    """Start what is asked for; at the end kill it, with what it started and then left."""
    status = ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    assert status == 0, ctypes.get_errno()
    try:
        start()
    finally:
        # orphans of what is killed become children of this process
        while children := psutil.Process().children():
            for child in children:
                child.kill()
            psutil.wait_procs(children, timeout=10)


def start() -> None:
    started = []  # a Popen that is not kept warns that its process runs
    for line in sys.stdin:
        command, messages = json.loads(line)
        with open(messages, "wb") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            started.append(subprocess.Popen(command, **streams))


if __name__ == "__main__":
    serve()
