"""Only `core/system` names the operating system; text files say their encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest

import adapterkit
from adapterkit.core.checkpoint.folder import check_names
from adapterkit.core.checkpoint.hub_ids import is_on_hub, parse, place_on_hub
from adapterkit.core.errors import MultipleErrors, Refused
from adapterkit.core.inputs.sources import weight_of
from tests.golden.inputs import create_inputs
from tests.support.sources import sources, walked

PACKAGE = Path(adapterkit.__file__).parent
SYSTEM = PACKAGE / "core" / "system"
MODULES = {"fcntl", "msvcrt", "resource", "pwd", "grp", "termios", "winreg"}
# these are not everywhere, or mean something else elsewhere
NAMES = {
    "ctypes": {"CDLL", "PyDLL", "WinDLL", "cdll", "windll"},
    "os": {
        "open", "kill", "killpg", "fork", "rename", "replace", "link", "symlink", "fsync",
        "pread", "preadv", "pwrite", "pwritev", "readv", "copy_file_range", "posix_fadvise",
        "posix_fallocate", "sendfile", "sched_getaffinity", "getuid", "geteuid", "getloadavg",
        "statvfs", "fchmod", "chown", "mkfifo", "nice", "getpgid", "setsid", "wait", "waitpid",
        "sysconf", "uname", "fdatasync",
    },
    "signal": {
        "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGBREAK",
        "alarm", "setitimer", "ITIMER_REAL", "pthread_sigmask", "pthread_kill", "sigwait", "pause",
        "SIG_BLOCK",
    },
}  # fmt: skip
FILES = ("/proc", "/sys/", "/dev/", "/etc")
LINKS = {"symlink_to", "hardlink_to"}  # Windows makes them for developers and administrators only
TEXT = {"read_text": 0, "write_text": 1}  # the place of the encoding


def trees() -> Iterator[tuple[str, ast.Module]]:
    for name, tree in sources().items():
        if not name.startswith("core/system/"):
            yield name, tree


def test_only_one_place_names_the_operating_system():
    found = []
    for name, tree in trees():
        for node in walked(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [f"{where} {one.name}" for one in node.names if one.name in MODULES]
            elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                found.append(f"{where} {node.module}")
            elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
                found += [f"{where} {one.name}" for one in node.names
                          if one.name in NAMES[node.module]]  # fmt: skip
            elif isinstance(node, ast.Attribute) and node.attr in LINKS:
                found.append(f"{where} {node.attr}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                is_named = node.attr in NAMES.get(node.value.id, ())
                if is_named or (node.value.id == "os" and node.attr.startswith("O_")):
                    found.append(f"{where} {node.value.id}.{node.attr}")
            elif isinstance(node, ast.Constant) and str(node.value).startswith(FILES):
                found.append(f"{where} {node.value}")
    assert not found


def test_text_files_say_their_encoding():
    """Elsewhere than on Linux and macOS another one is the default."""
    found = []
    for name, tree in trees():
        for node in walked(tree):
            if isinstance(node, ast.Call) and is_text(node):
                found.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
    assert not found


def is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text without an encoding."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in TEXT:
        if ast.unparse(function.value) == "formatter":  # click's, of a help
            return False
        return len(call.args) <= TEXT[function.attr]
    if isinstance(function, ast.Name) and function.id == "open":
        return is_text_mode(call, 1)
    if isinstance(function, ast.Attribute) and function.attr == "open":
        modes = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "mode")]
        texts = [one.value for one in modes if isinstance(one, ast.Constant)]
        return any(mode in ("r", "w", "a", "x") for mode in texts) or (
            not call.args and not call.keywords
        )
    return False


def is_text_mode(call: ast.Call, place: int) -> bool:
    modes = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
    return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["con.json"], "a device of Windows"),
        (["a/NUL"], "a device of Windows"),
        (["lpt1.safetensors"], "a device of Windows"),
        (["COM\u00b2 .txt"], "a device of Windows"),
        (["notes."], "dots and spaces"),
        (["a /b"], "dots and spaces"),
        (["what?.json"], "Windows has no"),
        (["a:b"], "Windows has no"),
        (["README.md", "readme.md"], "differ in case only"),
        (["caf\u00e9.json", "cafe\u0301.json"], "differ in case only"),
        (["STRASSE", "stra\u00dfe"], "differ in case only"),
    ],
)
def test_names_that_some_system_cannot_hold_are_refused(names: list[str], problem: str):
    with pytest.raises(Refused, match=problem):
        check_names(names)


def test_ordinary_names_are_taken():
    check_names(["model-00001-of-00002.safetensors", "console.json", "a.b/com10", ".gitattributes"])


def test_all_unportable_names_of_an_output_are_listed_together(tmp_path: Path):
    create_inputs(tmp_path)
    base = tmp_path / "base"
    for name in ("aux.json", "Config.json"):
        (base / name).write_text("{}", encoding="utf-8")
    with pytest.raises(MultipleErrors) as caught:
        adapterkit.merge(base, [tmp_path / "style"], out=tmp_path / "out")
    assert "aux.json" in str(caught.value) and "Config.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_drives_are_no_ids_and_may_have_weights():
    assert weight_of(r"C:\lora=0.7") == (r"C:\lora", 0.7)
    for text in (r"C:\lora", "C:/lora", "C:/lora/rank8", r"C:lora", r"org\name", r"..\lora"):
        assert parse(text) is None, text
    assert parse("org/name:folder") is not None


def test_an_output_on_the_hub_may_be_a_path_of_windows():
    path = PureWindowsPath("hf://org/name:folder")
    assert is_on_hub(path) and str(place_on_hub(path)) == "org/name:folder"
