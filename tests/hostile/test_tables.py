"""Tables of a few bytes that unpack to gigabytes, or to no text, are refused before they are in
memory."""

from pathlib import Path
from typing import Any

import pytest

from adapterkit.core.errors import Damaged
from adapterkit.verbs.stats.data.records import draw_records

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, **columns: Any) -> Path:
    parquet.write_table(arrow.table(columns), path, compression="zstd")
    return path


def refused(path: Path, problem: str) -> None:
    with pytest.raises(Damaged, match=problem) as caught:
        draw_records([path], 300, 0)
    error = caught.value
    assert error.expected and error.where == str(path) and error.hint and error.code == "AK901"


def test_one_long_text_in_256_rows_of_a_small_file_is_refused(tmp_path: Path, frugal):
    path = write(tmp_path / "a.parquet", text=["a" * (4 << 20)] * 256)
    assert path.stat().st_size < 50_000
    with frugal(megabytes=400):
        refused(path, "1,000 times those of the file")


def test_ten_million_rows_of_a_small_file_are_refused(tmp_path: Path, frugal):
    path = write(tmp_path / "a.parquet", text=arrow.repeat("ab", 10_000_000))
    assert path.stat().st_size < 100_000
    with frugal():
        refused(path, "1,000 times those of the file")


def test_a_row_of_20_million_ids_is_refused(tmp_path: Path, frugal):
    ids = arrow.ListArray.from_arrays([0, 20_000_000], arrow.repeat(7, 20_000_000))
    path = write(tmp_path / "a.parquet", input_ids=ids)
    assert path.stat().st_size < 200_000
    with frugal():
        refused(path, "a row has more than 67,108,864 bytes")


def test_a_text_that_is_no_utf8_is_damaged(tmp_path: Path):
    buffers = [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0"), arrow.py_buffer(b"\xff\xfe")]
    refused(
        write(tmp_path / "a.parquet", text=arrow.Array.from_buffers(arrow.string(), 1, buffers)),
        "utf-8",
    )


def test_rows_of_a_table_are_read_as_they_were(tmp_path: Path):
    texts = [f"{number} text" * (number % 7) for number in range(2000)]
    path = write(tmp_path / "a.parquet", text=texts)
    found = draw_records([path], 2000, 0).records
    assert [one.fields["text"] for one in found] == [text for text in texts if text]
