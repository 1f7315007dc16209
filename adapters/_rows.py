"""Rows of a pairs file (JSONL, CSV, Parquet) or Hub dataset, one by one, with their place."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from austeer.adapters._errors import PairsError
from austeer.adapters._json import parse_json

JSON_LINES = (".jsonl", ".ndjson", ".json")
_FORMATS = (*JSON_LINES, ".csv", ".parquet")
_MAX_ROW = 1 << 24
_MAX_GROUP = 1 << 28
_MOST_ROWS = 1024


def read_rows(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Stream `(where, row)` of a file or of one split of a Hub dataset, unchecked.

    Raises:
        PairsError: unreadable; names file and line.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in JSON_LINES:
            return _json_rows(path)
        if suffix == ".csv":
            return _csv_rows(path)
        if suffix == ".parquet":
            return _parquet_rows(source)
        raise PairsError(f"{source}: expected a file ending in {', '.join(_FORMATS)}")
    local = suffix in _FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1
    if path.exists() or local or not source:
        found = "a directory" if source and path.is_dir() else "nothing there"
        raise PairsError(
            f"{source or '(empty)'}: expected a pairs file, found {found}; check the path"
        )
    return _dataset_rows(f"{source}[{split}]", source, split=split)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise PairsError(
                f"{where}: expected one JSON object per line, not valid JSON ({error})"
            ) from error
        if not isinstance(row, dict):
            raise PairsError(f"{where}: expected a JSON object, found {kind_of(row)}")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    header: list[str] | None = None
    number, taken = 1, 0

    def lines() -> Iterator[str]:
        nonlocal taken
        for _, line in read_lines(path):
            taken += len(line)
            if taken > _MAX_ROW:  # quoted, a row has any number of lines
                raise _too_long(f"{path}:{number}")
            yield line

    reader = csv.reader(lines(), strict=True)
    try:
        for cells in reader:
            where, number, taken = f"{path}:{number}", reader.line_num + 1, 0
            if not cells:
                continue
            if header is None:
                header = _csv_header(where, cells)
                continue
            if len(cells) != len(header):
                raise PairsError(
                    f"{where}: expected {len(header)} cells like the header, found {len(cells)}"
                )
            yield where, _csv_row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise PairsError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error


def _csv_header(where: str, cells: list[str]) -> list[str]:
    lacking = [name for name in ("positive", "negative") if name not in cells]
    if lacking or not {"prompt", "messages"} & set(cells):
        raise PairsError(
            f"{where}: expected a header with prompt (or messages), positive and negative, "
            f"found {', '.join(cells)[:120]!r}"
        )
    return cells


def _csv_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """A cell cannot be absent: an empty one of prompt and messages, beside a filled one, is."""
    if not row.get("messages"):
        return {name: cell for name, cell in row.items() if name != "messages"}
    try:
        row["messages"] = parse_json(row["messages"])
    except ValueError as error:
        raise PairsError(f"{where}: messages: not valid JSON ({error})") from error
    return {name: cell for name, cell in row.items() if name != "prompt" or cell}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers; only a line feed ends a line, as in JSONL.

    Raises:
        PairsError: unreadable, too long, or not UTF-8; names file and line.
    """
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(iter(partial(stream.readline, _MAX_ROW + 1), b""), 1):
                if len(raw) > _MAX_ROW:
                    raise _too_long(f"{path}:{number}")
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise PairsError(
                        f"{path}:{number}: not UTF-8 (byte {error.start} of the line is "
                        f"0x{raw[error.start]:02x}); save the file as UTF-8"
                    ) from error
    except OSError as error:
        raise PairsError(f"{path}: cannot read it ({error.strerror})") from error


def _too_long(where: str) -> PairsError:
    return PairsError(f"{where}: a row of more than {_MAX_ROW} bytes; is it the right file?")


def _parquet_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """As the rows of a dataset, so few at once that what they unpack to has an end."""
    try:
        metadata = import_module("pyarrow.parquet").read_metadata(source)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
    except Exception:  # no pyarrow, or no Parquet file: datasets says it better
        largest = 0
    if largest > _MAX_GROUP:
        raise PairsError(
            f"{source}: a row group of {largest} bytes once unpacked, at most {_MAX_GROUP} are "
            "read; write it with smaller row groups, or as .jsonl"
        )
    # A value may stand in a group once, and in each of its rows.
    few = max(1, min(_MOST_ROWS, _MAX_GROUP // max(largest, 1)))
    yield from _dataset_rows(
        source, "parquet", data_files=source, split="train", batch_size=few
    )


def _dataset_rows(
    label: str, name: str, **options: Any
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise PairsError(
            f"{label}: Parquet files and Hub datasets need the datasets package; "
            "pip install 'austeer[data]'"
        ) from error
    log = logging.getLogger("datasets")
    level = log.level
    # It logs what it also raises.
    log.setLevel(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(name, streaming=True, **options)
        for number, row in enumerate(rows, 1):
            if sum(len(value) for value in row.values() if isinstance(value, str)) > _MAX_ROW:
                raise _too_long(f"{label}:{number}")
            absent = [key for key in ("prompt", "messages") if row.get(key) is None]
            yield f"{label}:{number}", {k: v for k, v in row.items() if k not in absent}
    except PairsError:
        raise
    except Exception as error:  # datasets, pyarrow and the Hub each have their own family
        reason = " ".join(str(error).split())[:200]
        raise PairsError(
            f"{label}: datasets cannot read it ({type(error).__name__}: {reason})"
        ) from error
    finally:
        log.setLevel(level)


def kind_of(value: Any) -> str:
    """A value in the words of an error message."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, float)):
        return json.dumps(value)
    names: dict[type[Any], str] = {dict: "object", list: "list", str: "text"}
    name = names.get(type(value), type(value).__name__)
    return name if value else f"empty {name}"
