"""Runs adapterkit's command line in forked children, with faults put into their system calls.

A merge of a tiny model costs a hundredth of what importing torch does, so this process imports once
and forks for each run. It reads one request a line on stdin and answers each with one line of JSON.
huggingface_hub reads the environment when it is imported, so each child imports it again, unless
this process is told to rehearse.
In a child with faults, the functions of `os` and libc that the writer and the reader use are
wrapped: each call counts, and the N-th one dies, fails, is cut short, or is lost.
"""

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import mmap
import os
import re
import resource
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from unittest import mock

WRITES = [
    "open", "pwrite", "write", "copy_file_range", "ftruncate", "fallocate", "fsync", "close",
    "rename", "renameat2", "link", "unlink", "rmdir", "mkdir",
]  # fmt: skip
KILL = signal.SIGKILL
SHUTDOWN = 0x8004587D  # _IOR('X', 125, uint32): ext4 and XFS stop at once, as in a power cut


class Faults:
    """Wraps the system's functions and does what the specification says at the N-th call that it is
    about.

    spec: calls (names), match (part of the path), when (N, or 0 for every call; `sticky`: from N
    on), and one of kill, torn, error=NAME, short, zero, lost, delay=SECONDS, act=[[what, ...]],
    which comes before a delay; `also`: a second specification.
    """

    def __init__(self, spec: dict, shared: mmap.mmap):
        self.spec, self.shared, self.lock, self.count = spec, shared, threading.Lock(), 0
        self.names = set(spec.get("calls", WRITES))

    def install(self) -> None:
        from adapterkit.core.system import system

        for name in (
            "open", "pwrite", "write", "copy_file_range", "ftruncate", "fsync", "close", "rename",
            "link", "unlink", "rmdir", "mkdir", "preadv", "pread",
        ):  # fmt: skip
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        libc, faults = system.libc, self

        class Libc:
            def __getattr__(self, name):
                real = getattr(libc, name)
                wrapped = faults._wrapped(name, real, libc=True)
                functools.update_wrapper(wrapped, real, assigned=())
                return wrapped

        system.libc = Libc()

    def _wrapped(self, name, real, libc=False):
        @functools.wraps(real, assigned=())
        def call(*args, **kwargs):
            if name not in self.names or not self._counts(name, args):
                return real(*args, **kwargs)
            with self.lock:
                self.count += 1
                number = self.count
                label = f"{name} {self._path(args)}".encode()[-200:]
                self.shared[:208] = struct.pack("q200s", number, label)
            when = self.spec.get("when", 0)
            if number == when or not when or (self.spec.get("sticky") and number > when):
                return self._fault(name, real, args, kwargs, libc)
            return real(*args, **kwargs)

        return call

    def _path(self, args) -> str:
        where = args[1] if args and args[0] == -100 else args[0]
        if isinstance(where, int):
            try:
                return os.readlink(f"/proc/self/fd/{where}")
            except OSError:
                return "?"
        return os.fsdecode(where)

    def _counts(self, name, args) -> bool:
        if name == "open" and not args[1] & os.O_CREAT:
            return False
        path = self._path(args)
        if name in ("close", "open", "write") and "/" not in path:
            return False
        device = path.startswith(("pipe:", "/proc/", "/dev/", "/memfd")) and not path.startswith(
            "/dev/shm/"
        )
        return not device and self.spec.get("match", "") in path

    def _fault(self, name, real, args, kwargs, libc):
        spec = self.spec
        for act in spec.get("act", []):
            self._act(*act)
        if spec.get("delay"):
            time.sleep(spec["delay"])
        if spec.get("torn") and name in ("pwrite", "write"):
            real(args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
        if spec.get("kill") or spec.get("torn"):
            os.kill(os.getpid(), KILL)
        if spec.get("error"):
            if name == "close":
                real(*args)
            code = getattr(errno, spec["error"])
            if libc:
                ctypes.set_errno(code)
                return -1
            raise OSError(code, os.strerror(code))
        if spec.get("zero"):
            return 0
        if spec.get("lost"):
            return args[2] if name == "copy_file_range" else len(args[1])
        if spec.get("short"):
            return self._short(name, real, args, kwargs)
        return real(*args, **kwargs)

    def _short(self, name, real, args, kwargs):
        if name == "copy_file_range":
            return real(args[0], args[1], max(1, args[2] // 3), *args[3:], **kwargs)
        if name == "preadv":
            view = memoryview(args[1][0])
            return real(args[0], [view[: max(1, len(view) // 3)]], *args[2:])
        if name in ("write", "pwrite"):
            return real(args[0], memoryview(args[1])[: max(1, len(args[1]) // 3)], *args[2:])
        return real(*args, **kwargs)

    def _act(self, what, path, *more) -> None:
        with open(path, "r+b") if os.path.isfile(path) else open("/dev/null") as file:
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif what == "truncate":
                os.truncate(path, more[0])
            elif what == "poke":
                file.seek(more[0])
                file.write(bytes(more[1]))
            elif what == "replace":
                with open(path, "rb") as old, open(path + ".new", "wb") as new:
                    new.write(old.read())
                os.replace(path + ".new", path)
            elif what == "remove":
                os.remove(path)
            elif what == "mark":
                open(path, "w").close()
            elif what == "shutdown":
                descriptor = os.open(path, os.O_RDONLY)
                fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", more[0]))
                os.kill(os.getpid(), KILL)


class Child:
    """One run in a forked process."""

    def __init__(self, request: dict):
        self.request, self.shared, self.began = request, mmap.mmap(-1, 4096), time.monotonic()
        self.out, self.err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self.gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run()
        os.close(self.gate[0])
        if not request.get("held"):
            self.release()

    def release(self) -> None:
        os.close(self.gate[1])

    def _run(self) -> None:
        status = 70
        lines_seen = sys.modules.get("tests.support.lines_seen")
        if lines_seen:
            lines_seen.begin()
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.close(self.gate[1])
            os.read(self.gate[0], 1)
            self._enter()
            status = self._command()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if lines_seen:
            lines_seen.write(self.request["test"], 0)
        os._exit(status)

    def _enter(self) -> None:
        """The folder, the environment and the streams of the request."""
        request = self.request
        if "env" in request:
            os.environ.clear()
            os.environ.update(request["env"])
        os.chdir(request.get("cwd", "."))
        stdin, stdout, stderr = request.get("streams", (os.devnull, None, None))
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        os.dup2(os.open(stdout, os.O_WRONLY) if stdout else self.out, 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT) if stderr else self.err, 2)
        sys.stdin = os.fdopen(0, closefd=False)
        faulthandler.enable(2)  # one that hangs says where

    def _command(self) -> int:
        request = self.request
        if "program" in request:
            program = compile(request["program"], request.get("cwd", "program"), "exec")
            exec(program, {"__name__": "__main__"})
            return 0
        from adapterkit.cli import main, signals
        from adapterkit.core import libraries
        from adapterkit.core.checkpoint import disk
        from adapterkit.core.engine import local
        from adapterkit.core.engine import partition as pieces
        from adapterkit.core.tasks import rows

        if request.get("rows"):
            rows.ELEMENTS, pieces.RUN = request["rows"], request["rows"] * 4
        for name, limit in request.get("limits", {}).items():
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        if request.get("workers"):
            local.local = functools.partial(local.local, workers=request["workers"])
        for name, value in request.get("constants", {}).items():
            module, _, name = name.rpartition(".")
            setattr(importlib.import_module(f"adapterkit.{module}"), name, value)
        if "umask" in request:
            os.umask(request["umask"])
        if request.get("user"):
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        if request.get("undurable"):
            disk.DURABLE = False
        if "fault" in request:
            fault = request["fault"] or {"calls": WRITES, "when": -1}
            if "also" in fault:
                Faults(fault["also"], mmap.mmap(-1, 4096)).install()
            Faults(fault, self.shared).install()
        if "system" in request:
            if "env" in request:  # of the Hub; what it imports chooses by the true system
                importlib.import_module("huggingface_hub.file_download")
            importlib.import_module(f"tests.support.{request['system']}").pretend()
        sys.argv = ["adapterkit", *request["argv"]]
        libraries.hush_process()  # as `process` does
        signals.own_process = True  # likewise
        main(args=request["argv"], prog_name="adapterkit")
        return 0

    def wait(self, timeout: float = 60) -> dict:
        deadline = time.monotonic() + timeout
        while (found := os.wait4(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                is_late = time.monotonic() > deadline + 2
                os.kill(self.pid, signal.SIGKILL if is_late else signal.SIGABRT)
            time.sleep(0.002)
        seconds = time.monotonic() - self.began
        count, label = struct.unpack("q200s", self.shared[:208])
        texts = [
            os.pread(f, os.fstat(f).st_size, 0).decode("utf-8", "replace")
            for f in (self.out, self.err)
        ]
        os.close(self.out), os.close(self.err)
        return {
            "status": os.waitstatus_to_exitcode(found[1]), "stdout": texts[0], "stderr": texts[1],
            "calls": count, "last": label.rstrip(b"\0").decode("utf-8", "replace"),
            "memory": found[2].ru_maxrss << 10, "seconds": seconds,
        }  # fmt: skip


def rehearse(request: dict) -> None:
    """A dry run in this process: what it imports and reads of the package, every fork has then."""
    from adapterkit.cli import main

    here = os.getcwd()
    os.chdir(request.get("cwd", "."))
    with open(os.devnull, "w") as nothing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing)
        # with which a refusal ends the command
        stays = mock.patch("os._exit", side_effect=SystemExit)
        with outputs[0], outputs[1], stays, contextlib.suppress(BaseException):
            main(args=[*request["argv"], "--dry-run"], prog_name="adapterkit")
        for name in OF_MODELS if "transformers" in sys.modules else ():
            importlib.import_module(name)
    os.chdir(here)


# what transformers and huggingface_hub import that reads nothing of the environment: most of it
OF_TRANSFORMERS = (
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torchao.prototype.mx_formats", "torchao.prototype.safetensors.safetensors_support",
    "torchao.quantization", "scipy.optimize", "bitsandbytes", "tokenizers", "PIL.Image", "jinja2",
    "regex", "psutil", "httpx2", "h11", "anyio", "filelock", "tqdm.auto",
)  # fmt: skip
# these read the environment at their import; an extension module is imported only once
OF_ENVIRONMENT = re.compile(r"(huggingface_hub|kernels)(\.(?!_rust$)|$)")
# with which a job runs a model: a second of processor time
OF_MODELS = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")


def serve(rehearses: bool) -> None:
    import torch

    from adapterkit.adapters.formats import library
    from adapterkit.core import libraries

    library.formats()
    torch.set_num_threads(1)
    if not rehearses:
        libraries.hush()
        for name in OF_TRANSFORMERS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        for name in filter(OF_ENVIRONMENT.match, list(sys.modules)):
            del sys.modules[name]
    if os.environ.get("ADAPTERKIT_LINES"):
        importlib.import_module("tests.support.lines_seen")
    children: dict[int, Child] = {}
    rehearsed: set[str] = set()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = children.pop(request["wait"]).wait(request.get("timeout", 60))
        elif "release" in request:
            children[request["release"]].release()
            answer = {}
        else:
            verb = (request.get("argv") or [""])[0]
            for name in request.get("imports", ()):
                importlib.import_module(name)
            if rehearses and verb not in rehearsed:
                rehearsed.add(verb)
                rehearse(request)
                gc.freeze()
            child = Child(request)
            children[child.pid] = child
            answer = {"pid": child.pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(rehearses="rehearse" in sys.argv)
