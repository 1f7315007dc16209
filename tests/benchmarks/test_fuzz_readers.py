"""What fuzz.py starts from is read, and what it makes of that is read or refused."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from austeer.adapters import AusteerError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
READERS: dict[str, Any] = importlib.import_module("fuzz_readers").READERS


@pytest.mark.parametrize("name", READERS)
def test_seeds_are_read_and_changes_read_or_refused(name: str, tmp_path: Path) -> None:
    reader, rng = READERS[name], random.Random(0)
    tried = [seed for seed in reader.seeds() for _ in range(20)]
    refused = 0
    for number, seed in enumerate(tried):
        plain, changed = (tmp_path / f"{kind}-{number}" for kind in ("plain", "changed"))
        plain.mkdir()
        reader.use(seed, plain)
        changed.mkdir()
        try:
            reader.use(reader.change(seed, rng), changed)
        except AusteerError:
            refused += 1
    assert refused > 0
