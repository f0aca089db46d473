"""Items from files, datasets and streams.

A file is told by its first bytes: gzip and other compression, Parquet, a JSON array, else JSON lines. Only CSV and
TSV are told by their names. Files are read once, from start to end, so that pipes work.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from gralora.optional import require

STANDARD_INPUT = "-"

# A position such as "line 7" and the value there; a ValueError as value says why it could not be read.
Positioned = tuple[str, Any]

_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".bz2")
_ROW_SUFFIXES = frozenset((".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"))
_NOT_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_FIELD = 2**31 - 1  # Python's limit of 128 KiB for a CSV field is shorter than a long conversation.


def read_items(source: str, option: str) -> Iterator[Positioned]:
    """Yield the items of a source.

    Args:
        source: "-" for standard input, a file, a folder, or the name of a dataset on the hub: `name`,
            `name/configuration` (of a name with an owner), each with `:split` for a split other than `train`.
        option: Name of the option that holds `source`, for messages.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The source cannot be read.
    """
    if source == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise ValueError(f"`{option}` is {source!r}, but nothing is piped into standard input.")
        with _explained(source, option):
            yield from _file_items(sys.stdin.buffer, "")
        return
    path = Path(source).expanduser()
    if path.exists() and not path.is_dir():
        with _explained(source, option), path.open("rb") as file:
            yield from _file_items(file, path.name)
        return
    # A slice of a split has a colon as well.
    divided = None if path.is_dir() else re.fullmatch(r"(.+?):([^/]+)", source)
    folder, split = divided.groups() if divided else (source, "")
    if Path(folder).expanduser().is_file():
        raise ValueError(f"`{option}` must name a file without a split; got {source!r}.")
    if not Path(folder).expanduser().is_dir() and (
        source.endswith(_FILE_SUFFIXES) or source.startswith((".", "/", "~"))
    ):
        raise FileNotFoundError(f"`{option}` must be a file, a folder or a dataset; there is no file {source!r}.")
    yield from _dataset_items(source, folder, split, option)


@contextmanager
def _explained(source: str, option: str) -> Iterator[None]:
    """Name the source that could not be read, in one line."""
    try:
        yield
    except (EOFError, OSError, zlib.error, UnicodeError, csv.Error, _Unreadable) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"`{option}` must be a source that can be read; {source!r} fails: {reason}") from error


class _Unreadable(Exception):
    """A file is not what its first bytes promise."""


def _file_items(file: Any, name: str) -> Iterator[Positioned]:
    start = file.peek(4)[:4]
    if start.startswith(_GZIP):
        with gzip.GzipFile(fileobj=file) as content:
            yield from _file_items(content, name.removesuffix(".gz"))
        return
    for magic, codec in _COMPRESSIONS.items():
        if start.startswith(magic):
            with BufferedReader(_decompressed(file, codec)) as content:
                yield from _file_items(content, Path(name).stem)
            return
    if start.startswith(_PARQUET):
        yield from _parquet_items(file)
    elif start.startswith(_UTF16):
        raise _Unreadable("it is UTF-16 text; it must be UTF-8")
    elif delimiter := _DELIMITERS.get(Path(name).suffix.lower()):
        yield from _table_items(file, delimiter)
    else:
        yield from _json_items(file)


def _decompressed(file: Any, codec: str) -> Any:
    require("pyarrow", extra="train")
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec)


def _json_items(file: BinaryIO) -> Iterator[Positioned]:
    """Yield the entries of a JSON array, or the lines of JSON."""
    blank = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*\Z")
    number, line = 1, file.readline()
    while line and blank.match(line):
        number, line = number + 1, file.readline()
    if line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _array_items(line + file.read(), number - 1)
        return
    while line:
        yield from _json_line(line, number)
        line, number = file.readline(), number + 1


def _array_items(data: bytes, lines_before: int) -> Iterator[Positioned]:
    try:
        entries = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8 text") from None
    except RecursionError:
        raise _Unreadable("its JSON array is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno + lines_before} column {error.colno}"
        raise _Unreadable(f"it is not a valid JSON array: {error.msg} at {place}") from None
    for number, entry in enumerate(entries, start=1):
        yield f"row {number}", entry


def _json_line(line: bytes, number: int) -> Iterator[Positioned]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            yield f"line {number}", json.loads(text)
    except UnicodeDecodeError:
        yield f"line {number}", ValueError("is not UTF-8 text")
    except json.JSONDecodeError as error:
        yield f"line {number}", ValueError(f"is not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        yield f"line {number}", ValueError("is nested too deeply")


def _table_items(file: BinaryIO, delimiter: str) -> Iterator[Positioned]:
    """Yield the rows of a CSV table; empty cells are missing fields."""
    csv.field_size_limit(_LONGEST_FIELD)
    text = TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if repeated := [name for name in header if header.count(name) > 1]:
            raise _Unreadable(f"its header has column {repeated[0]!r} twice")
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if len(cells) == len(header):
                yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            elif cells:
                yield where, ValueError(f"has {len(cells)} cells; the header has {len(header)}")
    finally:
        # The file belongs to the caller, and is not closed here.
        text.detach()


def _parquet_items(file: BinaryIO) -> Iterator[Positioned]:
    require("pyarrow", extra="train")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(pyarrow.BufferReader(file.read())).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", _without_nulls(row)
    except pyarrow.ArrowException as error:
        raise _Unreadable(str(error)) from error


def _dataset_items(source: str, name: str, split: str, option: str) -> Iterator[Positioned]:
    require("datasets", extra="train")
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        dataset = _load_dataset(name, split)
        for number, row in enumerate(dataset, start=1):
            yield f"row {number}", _without_nulls(row)
    except (DatasetsError, pyarrow.ArrowException, ConnectionError, OSError, ValueError, _Unreadable) as error:
        # A failed build says only that it failed; its cause says why.
        reason = str(error.__cause__ or error) or type(error).__name__
        what = "the folder" if Path(name).expanduser().is_dir() else "it is not a file, and"
        raise ValueError(
            f"`{option}` must be a file or a dataset that loads; got {source!r}: {what} fails to load as a dataset: "
            f"{reason.splitlines()[0]}"
        ) from error


def _load_dataset(name: str, split: str) -> Any:
    import datasets

    folder = Path(name).expanduser()
    if not folder.is_dir():
        owner, _, rest = name.partition("/")
        repository, _, configuration = rest.partition("/")
        path = f"{owner}/{repository}" if rest else name
        return datasets.load_dataset(path, configuration or None, split=split or "train")
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if not saved:
        _require_all_files(folder)
        return datasets.load_dataset(str(folder), split=split or "train")
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.Dataset):
        if split:
            raise _Unreadable(f"it has no splits; leave out ':{split}'")
        return loaded
    if (split or "train") not in loaded:
        raise _Unreadable(f"it has no split {split or 'train'!r}; its splits: {', '.join(map(repr, loaded))}")
    return loaded[split or "train"]


def _require_all_files(folder: Path) -> None:
    """Check that `datasets` reads every file of rows in `folder`: it reads only those of the commonest format."""
    import datasets

    if (folder / "README.md").is_file():
        return  # it may say which files are the dataset
    splits: Any = datasets.load_dataset_builder(str(folder)).config.data_files
    formats = {Path(file).suffix for files in splits.values() for file in files}
    left_out = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.suffix in _ROW_SUFFIXES - formats and file.name not in _NOT_ROWS and file.is_file()
    )
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise _Unreadable(
            f"it holds files of several formats, of which datasets reads only {', '.join(sorted(formats))}; it would "
            f"leave out {', '.join(map(repr, left_out[:3]))}{more}. Name the files instead of the folder"
        )


def _without_nulls(value: Any) -> Any:
    """Return a value without nulls: a table has all fields in all rows, null where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value
