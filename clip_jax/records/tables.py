"""Tables of paths, or of pictures themselves, and captions: CSV and TSV with a header, JSON lines, Parquet."""

import csv
import functools
import io
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from clip_jax.errors import BadSample, UserError
from clip_jax.files import expand, filesystem, is_local, read_ranges
from clip_jax.records import Place, Record, missing_field, unreadable


def open_table(pattern: str, fields: Sequence[str]) -> "Table":
    """One table, or several with the same columns."""
    kinds = {".csv": lambda path: Delimited(path, ","), ".tsv": lambda path: Delimited(path, "\t")}
    kinds |= {".jsonl": JSONLines, ".parquet": lambda path: Parquet(path, fields)}
    parts = []
    for path in expand(pattern):
        fs, own = filesystem(path)
        if not fs.isfile(own):
            raise UserError(f"data set {path}: no such file")
        parts.append(kinds[posixpath.splitext(path)[1].lower()](path))
    table = Table(parts, fields)
    if not len(table):
        raise UserError(f"data set {pattern}: expected at least one row, found none")
    return table


class Table:
    """Rows of one or several files.  A picture is bytes, or the path of its file, relative to that of the table."""

    def __init__(self, parts: list, fields: Sequence[str]):
        self.parts, self.fields = parts, tuple(fields)
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.broken = [broken for part in parts for broken in part.broken]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        records = [self._row(int(i)) for i in indices]
        paths = {}
        for n, (i, record) in enumerate(zip(indices, records)):
            if isinstance(record, dict) and isinstance(picture := record[self.fields[0]], str):
                paths[n] = self._path(self.place(i).shard, picture)
        for n, data in zip(paths, read_ranges([(path, 0, None) for path in paths.values()])):
            if isinstance(data, Exception):
                records[n] = unreadable(Place(f"{self.place(indices[n])},", paths[n]), data)
            else:
                records[n] = records[n] | {self.fields[0]: data}
        return records

    def place(self, index: int) -> Place:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return Place(self.parts[part].path, self.parts[part].row_name(int(index - self.starts[part])))

    def _row(self, index: int) -> Record | BadSample:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        place = self.place(index)
        try:
            row = self.parts[part].row(int(index - self.starts[part]))
        except UnicodeDecodeError as error:
            return BadSample("wrong encoding", f"{place}: expected UTF-8 ({error}); mend or remove this row")
        except (ValueError, RecursionError) as error:
            return BadSample("bad row", f"{place}: {error}")
        row = {name: value for name, value in row.items() if value is not None}
        if self.fields[0] not in row:
            return missing_field(place, self.fields[0], list(row))
        picture = row[self.fields[0]]
        if isinstance(picture, dict):  # as the datasets library stores a picture
            picture = picture.get("bytes") or picture.get("path")
        if not isinstance(picture, (str, bytes)) or not picture:
            return BadSample("missing field", f"{place} field {self.fields[0]!r}: expected a path or a picture, found {picture!r:.60}")
        return row | {self.fields[0]: picture}

    @staticmethod
    def _path(table: str, picture: str) -> str:
        return picture if not is_local(picture) else posixpath.join(posixpath.dirname(table), picture)


class Delimited:
    """CSV or TSV, by the place in the file where each row begins; quoted values may hold line breaks."""

    def __init__(self, path: str, delimiter: str):
        self.path, self.delimiter, self.broken = path, delimiter, []
        self.data = _bytes(path).removeprefix(b"\xef\xbb\xbf")
        lines = _line_starts(self.data)
        self.starts = lines[self._first_lines(lines)] if b'"' in self.data else lines
        try:
            header = self._values(0) if len(self.starts) else []
        except UnicodeDecodeError as error:
            raise UserError(f"data set {path}: expected a header in UTF-8 ({error}); save it in UTF-8") from error
        if len(header) < 2:
            raise UserError(f"data set {path}: expected a header with the names of at least two columns, found {header}")
        self.columns = header
        self.starts = self.starts[1:] if len(self.starts) else self.starts

    def _first_lines(self, lines: np.ndarray) -> list[int]:
        """Which lines begin a row, where quoted values may go on in the next."""
        ends, starts, first = [*lines[1:].tolist(), len(self.data)], lines.tolist(), []
        line = 0
        while line < len(starts):
            text = (self.data[s:e].decode("latin-1") for s, e in zip(starts[line:], ends[line:]))
            reader, begun = csv.reader(text, delimiter=self.delimiter), line
            first.append(line)
            try:
                for _ in reader:
                    line = begun + reader.line_num
                    first.append(line)
                first.pop()
                return first
            except csv.Error:  # a quote that nobody closed: its own line is lost, and the next is a row again
                line += 1
        return first

    def __len__(self) -> int:
        return len(self.starts)

    def _values(self, row: int) -> list[str]:
        end = self.starts[row + 1] if row + 1 < len(self.starts) else len(self.data)
        text = self.data[self.starts[row] : end].decode("utf-8")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter), [])

    def row(self, row: int) -> dict[str, Any]:
        try:
            values = self._values(row)
        except csv.Error as error:
            raise ValueError(f"not {posixpath.splitext(self.path)[1]} ({error})") from error
        if len(values) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} values, found {len(values)}")
        return dict(zip(self.columns, values))

    def row_name(self, row: int) -> str:
        return f"row {row + 1}"


class JSONLines:
    """A JSON object a line."""

    def __init__(self, path: str):
        self.path, self.broken = path, []
        self.data = _bytes(path).removeprefix(b"\xef\xbb\xbf")
        self.starts = _line_starts(self.data)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, row: int) -> dict[str, Any]:
        end = self.starts[row + 1] if row + 1 < len(self.starts) else len(self.data)
        value = json.loads(self.data[self.starts[row] : end])
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {value!r:.60}")
        return value

    def row_name(self, row: int) -> str:
        return f"object {row + 1}"


class Parquet:
    """A row group is read when a row of it is needed, and the last few are kept."""

    def __init__(self, path: str, fields: Sequence[str]):
        fs, own = filesystem(path)
        try:
            self.file = pyarrow.parquet.ParquetFile(own, filesystem=fs)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data set {path}: expected a Parquet file ({error})") from error
        self.path, self.fields, self.broken = path, fields, []
        names = self.file.schema_arrow.names
        self.columns = [name for name in names if name in fields] or names
        groups = range(self.file.num_row_groups)
        self.starts = np.cumsum([0] + [self.file.metadata.row_group(group).num_rows for group in groups])
        self.group = functools.lru_cache(maxsize=8)(self._group)

    def __reduce__(self):
        return Parquet, (self.path, self.fields)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        try:
            table = self.group(number)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"row group {number} cannot be read ({error})") from error
        return {name: table.column(name)[row - int(self.starts[number])].as_py() for name in self.columns}

    def _group(self, number: int) -> pyarrow.Table:
        return self.file.read_row_group(number, columns=self.columns)

    def row_name(self, row: int) -> str:
        return f"row {row + 1}"


def _bytes(path: str) -> bytes:
    [data] = read_ranges([(path, 0, None)])
    if isinstance(data, Exception):
        raise UserError(f"data set {path}: cannot be read ({data})")
    return data


def _line_starts(data: bytes) -> np.ndarray:
    """The first byte of every line that is not empty."""
    array = np.frombuffer(data, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(array == ord("\n")) + 1]).astype(np.int64)
    starts = starts[starts < len(data)]
    return starts[~np.isin(array[starts], [ord("\n"), ord("\r")])]
