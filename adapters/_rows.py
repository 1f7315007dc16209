"""Rows of a pairs file (JSONL, CSV, Parquet) or Hub dataset, one by one, with their place."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from austeer.adapters._errors import PairsError

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_FORMATS = (*_JSON_LINES, ".csv", ".parquet")


def read_rows(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Stream `(where, row)` of a file or of one split of a Hub dataset, unchecked.

    Raises:
        PairsError: unreadable; names file and line.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in _JSON_LINES:
            return _json_rows(path)
        if suffix == ".csv":
            return _csv_rows(path)
        if suffix == ".parquet":
            return _dataset_rows(source, "parquet", data_files=source, split="train")
        raise PairsError(f"{source}: expected a file ending in {', '.join(_FORMATS)}")
    local = suffix in _FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1
    if path.exists() or local or not source:
        found = "a directory" if source and path.is_dir() else "nothing there"
        raise PairsError(
            f"{source or '(empty)'}: expected a pairs file, found {found}; check the path"
        )
    return _dataset_rows(f"{source}[{split}]", source, split=split)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PairsError(
                f"{where}: expected one JSON object per line, not valid JSON ({error})"
            ) from error
        if not isinstance(row, dict):
            raise PairsError(f"{where}: expected a JSON object, found {kind_of(row)}")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for cells in reader:
            where, number = f"{path}:{number}", reader.line_num + 1
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
        row["messages"] = json.loads(row["messages"])
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{where}: messages: not valid JSON ({error})") from error
    return {name: cell for name, cell in row.items() if name != "prompt" or cell}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers; only a line feed ends a line, as in JSONL."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise PairsError(
                        f"{path}:{number}: not UTF-8 (byte {error.start} of the line is "
                        f"0x{raw[error.start]:02x}); save the file as UTF-8"
                    ) from error
    except OSError as error:
        raise PairsError(f"{path}: cannot read it ({error.strerror})") from error


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
