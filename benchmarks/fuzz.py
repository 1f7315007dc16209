"""Fuzzes what reads strangers' files, with atheris: changed valid files, and random bytes.

    pip install atheris
    python benchmarks/fuzz.py --minutes 30 --reader all --out /tmp/fuzz

A finding is any of: an exception other than AusteerError; a message that is no short printable
line; a file that was read, and yet holds what it must not (see each reader's `use`); a file
outside the reader's folder; an input that takes more than 10 seconds; a process of more than
1024 MB. Each is written to OUT/READER/ (the input, and beside it the traceback), and inputs
that reached new code to OUT/READER/corpus/, where another run goes on. Exit status 1: findings.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from fuzz_readers import READERS, Reader

MEGABYTES, SECONDS, LONGEST_INPUT, LONGEST_MESSAGE = 1024, 10, 1 << 14, 2100


def attack(reader: Reader, raw: bytes) -> None:
    """Read one input.

    Raises:
        Exception: a finding.
    """
    from austeer.adapters import AusteerError

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        folder = Path(root) / "in"
        folder.mkdir()
        try:
            reader.use(raw, folder)
        except AusteerError as error:
            assert str(error).isprintable() and len(str(error)) <= LONGEST_MESSAGE
        assert os.listdir(root) == ["in"], "a file outside the folder"  # noqa: PTH208 - faster


def fuzz(name: str, out: Path, arguments: list[str]) -> None:
    """Attack one reader in this process until libFuzzer ends it; never returns."""
    import atheris

    with atheris.instrument_imports(include=["austeer"]):
        import austeer.adapters.pairs
        import austeer.exporter.describe  # noqa: F401 - and with it adapters, tensors, index
    reader, seen = READERS[name], set()

    def target(raw: bytes) -> None:
        try:
            attack(reader, raw)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = (type(error).__name__, frames[-1].filename, frames[-1].lineno)
            if place in seen:
                return
            seen.add(place)
            found = out / f"exception-{error.__class__.__name__}-{os.getpid()}-{len(seen)}"
            found.write_bytes(raw)
            found.with_suffix(".txt").write_text(traceback.format_exc(), "utf-8", "replace")

    def mutate(raw: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.6:
            try:
                made = reader.change(raw, rng)
            except (ValueError, RecursionError, csv.Error):
                made = b""  # no longer of that form
            if 0 < len(made) <= longest:
                return made
        return bytes(atheris.Mutate(raw, longest))

    atheris.Setup([sys.argv[0], *arguments], target, custom_mutator=mutate)
    atheris.Fuzz()


def rounds(name: str, out: Path, seconds: float, seed: int) -> Iterator[str]:
    """Logs of the processes that attack one reader, one after another until time is over."""
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(READERS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(raw)
    end = time.monotonic() + seconds
    while (left := int(end - time.monotonic())) > 0:
        flags = [
            f"-max_total_time={left}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-timeout={SECONDS}",
            f"-max_len={LONGEST_INPUT}",
            f"-seed={seed}",
            f"-artifact_prefix={out}/",
            "-print_final_stats=1",
            str(corpus),
        ]
        command = [sys.executable, __file__, "--child", name, "--out", str(out), "--", *flags]
        done = subprocess.run(command, capture_output=True, check=False)
        yield done.stderr.decode(errors="replace")
        seed += 1


def row(name: str, out: Path, seconds: float, seed: int) -> tuple[list[str], int]:
    """Attack one reader: its row of the table, and its number of findings."""
    started, executed, edges, peak, last = time.monotonic(), 0, 0, 0, ""
    for log in rounds(name, out, seconds, seed):
        executed += max((int(n) for n in re.findall(r"^#(\d+)\s", log, re.M)), default=0)
        edges = max([edges, *(int(n) for n in re.findall(r"\bcov: (\d+)", log))])
        peak = max([peak, *(int(n) for n in re.findall(r"\brss: (\d+)Mb", log))])
        last = log
    (out / "last.log").write_text(last, "utf-8")
    if executed == 0:
        sys.exit(f"{name}: did not start; see {out / 'last.log'}")
    names = ("exception-", "crash-", "timeout-", "oom-", "slow-unit-", "leak-")
    found = [
        path.name
        for path in sorted(out.iterdir())
        if path.name.startswith(names) and path.suffix != ".txt"
    ]
    took = time.monotonic() - started
    cells = [name, f"{took / 60:.1f}", str(executed), f"{executed / took:.0f}", str(edges)]
    cells += [str(len(list((out / "corpus").iterdir()))), str(peak), ", ".join(found) or "none"]
    return cells, len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="for each reader")
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, help="findings and corpora")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.child, options.out, options.flags)
        return
    total = 0
    header = (
        "reader",
        "minutes",
        "executions",
        "per second",
        "edges",
        "corpus",
        "MB",
        "findings",
    )
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for name in READERS if options.reader == "all" else [options.reader]:
        out = options.out.resolve() / name
        cells, findings = row(name, out, options.minutes * 60, options.seed)
        print("| " + " | ".join(cells) + " |", flush=True)
        total += findings
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
