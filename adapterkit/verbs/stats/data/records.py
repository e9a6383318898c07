"""Read samples from data files: texts, pairs, conversations, token ids. A file is read line by
line, and unused records are not kept."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from adapterkit.core.checkpoint.strict import strict_json
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, did_you_mean, shown
from adapterkit.core.lazy import optional
from adapterkit.core.options import StrPath
from adapterkit.core.records import Json

IGNORED = -100  # of labels, as in torch's cross entropy
LONGEST = 64 << 20  # bytes of a line, a paragraph or a row
TIMES, ROW = 1000, 64  # bytes of all rows for each of a packed file, and of a row at least
TOO_LARGE = f"a row has more than {LONGEST:,} bytes, or all have {TIMES:,} times those of the file"
FIELDS = {
    "text": ("text",),
    "pair": ("prompt", "completion"),
    "messages": ("messages",),
    "tokens": ("input_ids",),
}
OPTIONAL = ("labels", "attention_mask", "tools")
KNOWN = tuple(name for names in FIELDS.values() for name in names)
LINES = "text, messages, prompt and completion, or input_ids"
SUFFIXES = ".txt, .jsonl, .parquet, or a folder of datasets"


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of a file: its kind (a key of `FIELDS`), its fields by name, and its location."""

    kind: str
    fields: Json
    where: str


@dataclass(frozen=True)
class Drawn:
    """Records in file order; the number of records of each file, and notes for the user."""

    records: list[Record]
    files: dict[str, Json]
    notes: list[str] = field(default_factory=list)


def draw_records(paths: Sequence[StrPath], count: int, seed: int) -> Drawn:
    """`count` records of all files together, drawn without replacement, or all if there are fewer.

    Every file is read to its end, and every line checked: `Refused` or `Damaged` with the first
    problem of each file."""
    drawn: list[tuple[int, Record]] = []
    files: dict[str, Json] = {}
    errors = Problems()
    generator, total, empty = random.Random(seed), 0, 0
    for number, path in enumerate(map(Path, paths)):
        usable = 0
        with errors.collected():
            unit, records = _open(path)
            for record in records:
                if record is None:
                    empty += 1
                    continue
                # algorithm R: of the records so far each is among the drawn ones with the same odds
                place = generator.randrange(total + 1) if total >= count else total
                if place < count:
                    drawn[place : place + 1] = [(total, record)]
                usable, total = usable + 1, total + 1
            if not usable:
                raise Refused(
                    f"there is no usable {'line' if path.is_file() else 'row'}",
                    expected=f"samples: {LINES}",
                    where=shown(path),
                    hint="give a file with text in it",
                    code="AK901",
                )
            files[f"{number} {shown(path.name)}"] = {"samples": usable, "unit": unit}
    errors.raise_all()
    notes = [f"{total} samples, fewer than --samples {count}: all are used"] * (total < count)
    notes += [f"{empty} empty samples left out"] * bool(empty)
    return Drawn([record for _, record in sorted(drawn, key=lambda pair: pair[0])], files, notes)


def _open(path: Path) -> tuple[str, Iterable[Record | None]]:
    """The unit of one sample in a file, and its records; None for an empty one."""
    if path.is_dir():
        return "row", _rows(_folder_rows(path), path)
    if not path.is_file():
        raise Refused(
            "not a regular file" if path.exists() else "no such file",
            expected=SUFFIXES,
            where=shown(path),
            hint="check the path",
            code="AK901",
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if _has_paragraphs(path):
            return "paragraph", _paragraphs(path)
        return "line", _text_lines(path)
    if suffix == ".jsonl":
        return "line", _json_lines(path)
    if suffix == ".parquet":
        return "row", _rows(_parquet_rows(path), path)
    raise Refused(
        f"files of type {shown(path.suffix) or 'unknown'} cannot be read",
        expected=SUFFIXES,
        where=shown(path),
        hint="convert it to .jsonl: one JSON object on each line",
        code="AK901",
    )


# -- text ------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, without line ends; `Refused` for one that is not UTF-8."""
    with _readable(path).open("rb") as file:
        number = 0
        while data := file.readline(LONGEST + 1):
            number += 1
            if len(data) > LONGEST:
                raise _too_long(path, number)
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Refused(
                    f"not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}",
                    expected="text in UTF-8",
                    where=_line(path, number),
                    hint="convert it: iconv -f ENCODING -t UTF-8",
                    code="AK901",
                ) from error
            yield number, line.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")


def _readable(path: Path) -> Path:
    try:
        path.open("rb").close()
    except OSError as error:
        raise Refused(
            f"cannot read: {error.strerror}",
            expected="a file to read",
            where=shown(path),
            hint="check its permissions",
            code="AK209",
        ) from error
    return path


def _too_long(path: Path, number: int) -> Refused:
    return Refused(
        f"a sample has more than {LONGEST:,} bytes",
        expected="separate samples: one per line, or with blank lines between",
        where=_line(path, number),
        hint="break the text into samples",
        code="AK901",
    )


def _has_paragraphs(path: Path) -> bool:
    """True if there is a blank line between two others."""
    text = blank = False
    for _, line in _lines(path):
        if not line.strip():
            blank = text
        elif blank:
            return True
        else:
            text = True
    return False


def _paragraphs(path: Path) -> Iterator[Record]:
    lines: list[str] = []
    size = number = 0
    for number, line in _lines(path):
        if line.strip():
            lines.append(line)
            size += len(line)
            if size > LONGEST:
                raise _too_long(path, number)
        elif lines:
            yield Record("text", {"text": "\n".join(lines)}, _line(path, number - 1))
            lines, size = [], 0
    if lines:
        yield Record("text", {"text": "\n".join(lines)}, _line(path, number))


def _text_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield Record("text", {"text": line}, _line(path, number))


# -- JSON and tables -------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Record | None]:
    for number, line in _lines(path):
        where = _line(path, number)
        if not line.strip():
            continue
        try:
            row = strict_json(line.encode())
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at column {error.colno}"  # its own line number is always 1
            raise Damaged(
                f"not JSON: {shown(reason)}",
                expected="one JSON object on each line",
                where=where,
                hint="fix the line",
                code="AK901",
            ) from error
        yield _record(row, where)


def _rows(rows: Iterable[Json], path: Path) -> Iterator[Record | None]:
    for number, row in enumerate(rows, 1):
        yield _record(row, f"{shown(path)}, row {number}")


def _parquet_rows(path: Path) -> Iterator[Json]:
    pyarrow, parquet = _library("pyarrow", path), _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(_readable(path))
        columns = _columns(file.schema_arrow.names, path)
        count, largest = file.metadata.num_rows, _largest_group(file.metadata, columns)
        most = LONGEST + TIMES * path.stat().st_size - ROW * count
        if most < 0 or largest > LONGEST * count:
            raise ValueError(TOO_LARGE)
        rows = max(16, min(256, LONGEST // largest))  # one by one is slow
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            most -= batch.nbytes
            if most < 0 or batch.nbytes > LONGEST * len(batch):
                raise ValueError(TOO_LARGE)
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error


def _largest_group(metadata: Any, columns: Sequence[str]) -> int:
    """Bytes of the largest group by the file's metadata: an upper bound of every value in it."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    used = lambda chunk: chunk.path_in_schema.partition(".")[0] in columns
    size = lambda chunk: chunk.total_uncompressed_size + 8 * chunk.num_values
    return max([1, *(sum(map(size, filter(used, its))) for its in chunks)])


def _folder_rows(path: Path) -> Iterator[Json]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise Refused(
            f"the dataset has several splits: {', '.join(map(shown, splits[:6]))}",
            expected="one split",
            where=shown(path),
            hint=f"give {shown(path.name)}/SPLIT",
            code="AK901",
        )
    if not (path / "dataset_info.json").is_file():
        raise Refused(
            "the folder has no dataset_info.json",
            expected="a folder that save_to_disk of datasets wrote, or files",
            where=shown(path),
            hint="give the files themselves, each with --data",
            code="AK901",
        )
    datasets = _library("datasets", path)
    try:
        table: Any = datasets.load_from_disk(str(path))
        yield from table.select_columns(_columns(table.column_names, path))
    except AdapterkitError:
        raise
    except Exception as error:  # a damaged folder: the library may raise anything
        raise _unreadable(path, error) from error


def _columns(names: Sequence[str], path: Path) -> list[str]:
    """The columns to read; `Refused` if none has samples."""
    known = [name for name in names if name in (*KNOWN, *OPTIONAL)]
    if not set(known) & {*KNOWN}:
        raise _unknown_fields(list(names), shown(path))
    return known


def _library(module: str, path: Path) -> ModuleType:
    package = module.partition(".")[0]
    install, expected = f"{package}, or convert the data to .jsonl", f"{package}, to read it"
    return optional(module, install=install, expected=expected, where=shown(path))


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(
        f"cannot be read: {shown(error)}",
        expected=SUFFIXES,
        where=shown(path),
        hint="write it again, or convert it to .jsonl",
        code="AK901",
    )


# -- one record ------------------------------------------------------------------------------------


def _record(row: object, where: str) -> Record | None:
    """The record of a row; None for an empty one."""
    if not isinstance(row, dict):
        raise _wrong(f"a JSON {type(row).__name__}", f"an object with {LINES}", where)
    row = {name: value for name, value in row.items() if value is not None}
    kinds = [kind for kind, names in FIELDS.items() if all(name in row for name in names)]
    if not kinds:
        raise _unknown_fields(list(row), where)
    if len(kinds) > 1:
        both = " and ".join(name for kind in kinds for name in FIELDS[kind])
        raise _wrong(f"{both} on one line", f"one of {LINES}", where, "leave all but one out")
    kind = kinds[0]
    values = {name: row[name] for name in (*FIELDS[kind], *OPTIONAL) if name in row}
    _CHECKS[kind](values, where)
    first = values[FIELDS[kind][-1]]
    return Record(kind, values, where) if (first.strip() if kind == "text" else first) else None


def _unknown_fields(names: list[Any], where: str) -> Refused:
    half = {"prompt": "completion", "completion": "prompt"}
    lone = next((name for name in half if name in names), None)
    hint = f"give {half[lone]} too" if lone else did_you_mean(map(str, names), KNOWN)
    fields = ", ".join(map(shown, names[:6])) or "none"
    hint = hint or "rename the field that holds the text to text"
    return _wrong(f"fields {fields}", LINES, where, hint)


def _wrong(problem: str, expected: str, where: str, hint: str = "fix the data") -> Refused:
    return Refused(problem, expected=expected, where=where, hint=hint, code="AK901")


def _check_text(fields: Json, where: str) -> None:
    if not isinstance(fields["text"], str):
        raise _wrong(f"text is a {type(fields['text']).__name__}", "a string", where)


def _check_pair(fields: Json, where: str) -> None:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    if not (_is_conversation(prompt) and _is_conversation(completion)):
        raise _wrong(
            f"prompt is a {type(prompt).__name__}, completion a {type(completion).__name__}",
            "two strings, or two lists of messages",
            where,
        )


def _check_messages(fields: Json, where: str) -> None:
    if not _is_conversation(fields["messages"]):
        raise _wrong("messages without roles", "a list of objects with role and content", where)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )


def _check_tokens(fields: Json, where: str) -> None:
    """Check token ids and labels. An encoder-decoder's labels may have another length, which a
    caller that knows the model checks."""
    count = len(fields["input_ids"]) if isinstance(fields["input_ids"], list) else 0
    for name in ("input_ids", "labels", "attention_mask"):
        values = fields.get(name, [])
        integers = isinstance(values, list) and all(type(value) is int for value in values)
        if not integers or (name == "attention_mask" and name in fields and len(values) != count):
            raise _wrong(f"{name} is no list of {count or 'the'} ids", "integers", where)


_CHECKS = {
    "text": _check_text,
    "pair": _check_pair,
    "messages": _check_messages,
    "tokens": _check_tokens,
}


def _line(path: Path, number: int) -> str:
    return f"{shown(path)}, line {number}"
