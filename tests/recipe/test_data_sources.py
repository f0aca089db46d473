import bz2
import gzip
import io
import json
import os
import sys
import threading

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gralora.recipe.data.sources import read_items

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü,\n", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = 'prompt,completion\na,b\n"ü,\n",d\n'.encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet_bytes(rows):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def zstd(content):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(content)
    return buffer.getvalue().to_pybytes()


def items(source):
    return list(read_items(str(source), "data"))


def values(source):
    return [value for _, value in items(source)]


CONTENTS = [
    ("rows.jsonl", LINES),
    ("rows.ndjson", LINES),
    ("rows.json", LINES),
    ("no-suffix", LINES),
    ("rows.json", json.dumps(ROWS, indent=2).encode()),
    ("rows.jsonl", b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode()),
    ("rows.csv", TABLE),
    ("rows.csv", b"\xef\xbb\xbf" + TABLE.replace(b"\n", b"\r\n").replace(b",\r\n", b",\n")),
    ("rows.tsv", 'prompt\tcompletion\na\tb\n"ü,\n"\td\n'.encode()),
    ("rows.parquet", parquet_bytes(ROWS)),
    ("rows", parquet_bytes(ROWS)),
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, zstd])
@pytest.mark.parametrize(("name", "content"), CONTENTS)
def test_a_file_is_read_whatever_its_form(tmp_path, name, content, compress):
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2", zstd: ".zst"}[compress]
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(content))
    assert values(path) == ROWS


@pytest.mark.parametrize(
    "content", [LINES, json.dumps(ROWS).encode(), gzip.compress(LINES, mtime=0), parquet_bytes(ROWS)]
)
def test_pipes_are_read_once_from_start_to_end(tmp_path, monkeypatch, content):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    assert values(fifo) == ROWS
    writer.join()

    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    assert values(f"/dev/fd/{reading}") == ROWS
    os.close(reading)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    assert values("-") == ROWS


def test_a_terminal_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(ValueError, match="`data` is '-', but nothing is piped into standard input"):
        items("-")


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("rows.jsonl", b"\n" + LINES.replace(b"\n", b"\n\n"), ["line 2", "line 4"]),
        ("rows.json", json.dumps(ROWS).encode(), ["row 1", "row 2"]),
        ("rows.csv", TABLE + b"e,f\n", ["line 2", "line 3", "line 5"]),
        ("rows.parquet", parquet_bytes(ROWS), ["row 1", "row 2"]),
    ],
)
def test_positions_are_those_that_an_editor_shows(tmp_path, name, content, places):
    (tmp_path / name).write_bytes(content)
    assert [where for where, _ in items(tmp_path / name)] == places


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a", ', "is not valid JSON: Expecting property name"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_bad_line_is_said_and_the_others_are_read(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + line + b"\n" + LINES)
    (where, error), *others = [(where, value) for where, value in items(path) if isinstance(value, ValueError)]
    assert (where, others) == ("line 3", [])
    assert str(error).startswith(problem)
    assert len(items(path)) == 5


def test_cells_are_text_and_empty_ones_are_missing(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b,c\n1,,NA\n"x ""y""",2\n\n1,2,3,4\n')
    (_, first), (where, short), (_, long) = items(tmp_path / "rows.csv")
    assert first == {"a": "1", "c": "NA"}
    assert (where, str(short)) == ("line 3", "has 2 cells; the header has 3")
    assert str(long) == "has 4 cells; the header has 3"


def test_a_cell_may_be_longer_than_the_limit_of_python(tmp_path):
    (tmp_path / "rows.csv").write_text("a\n" + "x" * 200_000 + "\n")
    assert len(values(tmp_path / "rows.csv")[0]["a"]) == 200_000


def test_fields_that_a_table_fills_with_null_are_missing(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "tool", "name": "f"}], "id": 1}]
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes([{"id": None, **rows[0]}, rows[1]]))
    assert values(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json.gz", "-"])
def test_an_empty_file_has_no_items(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO())))
    (tmp_path / name).write_bytes(b"" if "gz" not in name else gzip.compress(b"\n"))
    assert items("-" if name == "-" else tmp_path / name) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES * 50, mtime=0)[:-20], "Compressed file ended before"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-8] + b"\0" * 8, "CRC check failed"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:10] + b"\xff" * 9, "Error -3 while decompressing"),
        ("rows.jsonl.zst", zstd(LINES * 50)[:-20], "ZSTD|[Tt]runcated"),
        ("rows.parquet", parquet_bytes(ROWS)[:-9], "Parquet magic bytes not found"),
        ("rows.json", json.dumps(ROWS).encode()[:-5], "it is not a valid JSON array: .* at line 1 column"),
        ("rows.json", b"\n\n[{},\n}]", "it is not a valid JSON array: .* at line 4 column 1"),
        ("rows.json", b'["\xff"]', "it is not UTF-8 text"),
        ("rows.json", b"[" * 100_000, "nested too deeply"),
        ("rows.jsonl", LINES.decode().encode("utf-16"), "it is UTF-16 text; it must be UTF-8"),
        ("rows.csv", TABLE.decode().encode("latin-1"), "'utf-8' codec can't decode byte"),
        ("rows.csv", b'a\n"b', "unexpected end of data"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "its header has column 'a' twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"`data` must be a source that can be read; '{path}' fails: .*{reason}"
    ) as error:
        items(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_error():
    for name in ("nowhere.jsonl", "./nowhere", "~/nowhere", "nowhere.csv", "nowhere.json.gz"):
        with pytest.raises(FileNotFoundError, match=f"`data` must be a file, a folder or a dataset; .* '{name}'"):
            items(name)


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"`data` must name a file without a split; got '.*rows.jsonl:train'"):
        items(tmp_path / "rows.jsonl:train")


def test_a_folder_of_files_is_read_as_a_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    (folder / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
    assert items(folder) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]
    assert items(f"{folder}:test") == [("row 1", ROWS[0])]


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).select([1, 0]).save_to_disk(tmp_path / "one")
    assert items(tmp_path / "one") == [("row 1", ROWS[1]), ("row 2", ROWS[0])]
    parts = {"train": datasets.Dataset.from_list(ROWS), "held": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert values(tmp_path / "several") == ROWS
    assert values(f"{tmp_path / 'several'}:held") == ROWS[1:]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("several", "it has no split 'train'; its splits: 'a', 'b'"),
        ("several:c", "it has no split 'c'; its splits: 'a', 'b'"),
        ("one:a", "it has no splits; leave out ':a'"),
        ("files:c", 'Unknown split "c"'),
        ("empty", "doesn't contain any data files"),
        ("broken", "JSON parse error"),
    ],
)
def test_a_folder_that_cannot_be_read_is_said_in_one_line(tmp_path, source, reason):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(tmp_path / "several")
    for name, content in (("files", LINES), ("empty", None), ("broken", b"{]\n")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="the folder fails to load as a dataset: ") as error:
        items(tmp_path / source)
    assert reason in str(error.value)
    assert f"got '{tmp_path / source}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("name", ("name", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/part", ("owner/name", "part", "train")),
        ("owner/name/part:test[:5]", ("owner/name", "part", "test[:5]")),
    ],
)
def test_a_name_on_the_hub_may_have_a_configuration_and_a_split(monkeypatch, source, expected):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(source) == ROWS
    assert asked == [expected]


def test_a_name_that_is_neither_a_file_nor_a_dataset_is_said():
    with pytest.raises(ValueError, match=r"got 'nobody/nothing': it is not a file, and fails to load as a dataset: "):
        items("nobody/nothing")


def test_a_folder_of_several_formats_is_not_read_in_part(tmp_path):
    """datasets takes the commonest format and leaves the other files out without a word."""
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for name in ("one.jsonl", "two.jsonl", "config.json"):
        (folder / name).write_bytes(LINES)
    (folder / "deep" / "three.csv").write_bytes(TABLE)
    with pytest.raises(ValueError, match=r"reads only .jsonl; it would leave out 'deep/three.csv'. Name the files"):
        items(folder)
    (folder / "deep" / "three.csv").unlink()
    (folder / "config.json").unlink()
    assert len(items(folder)) == 2 * len(ROWS)
