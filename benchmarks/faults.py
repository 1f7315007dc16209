"""Kills, full disks and read errors: what is left, and whether the same command then works.

    python benchmarks/faults.py                          # about half an hour on one core
    python benchmarks/faults.py --kills 20 --operations 20 --sizes 8 --reads 1

`merge`, `onnx` and `run` (with a small sample of neutral text) on the demo model, forked
from one process. After every fault there
must be no output, or one with the digest of an undisturbed run, which was verified; the base
must have its bytes; and the same command, given again, must complete and leave nothing else
in the output's folder. Prints Markdown; exits with 1 if anything else was found.

A kill is `kill -9` at a random moment, or just before a random operation on files of the
output. A disk of each size is a tmpfs (root mounts it; others get RLIMIT_FSIZE, a limit on
one file); the second row lets the command believe in free space. Read errors need no FUSE:
shards are cut, missing, folders, links to nothing, unreadable, cut while they are read (by an
audit hook), or the kernel's copy fails with EIO (by a wrapped call).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fault_children as children
from fault_children import Ended, Job, Prepare, digests, fresh

REPO = Path(__file__).resolve().parents[1]
MODEL = REPO / "examples" / "demo_model"
PAIRS = REPO / "examples" / "pairs" / "mood_train.jsonl"
COLUMNS = ("nothing", "complete", "other", "not one line", "base changed", "rerun failed")
RUN = (
    *("--to", "safetensors", "--strength", "oriented", "--component", "neuron"),
    *("--kl-budget", "2"),
)
COMMANDS = ("merge", "merge, verified", "onnx", "run")
Undo = Callable[[], object]


class Faults:
    """Jobs on one base in a scratch folder, and what was counted.

    Args:
        scratch: an empty folder.
        names: jobs to make: `merge`, `onnx`, `run`.
        seed: of the moments.
    """

    def __init__(self, scratch: Path, names: tuple[str, ...], seed: int) -> None:
        self.scratch, self.rng = scratch, random.Random(seed)
        self.base = scratch / "base"
        _shard(MODEL, self.base)
        self.digests = digests(self.base)
        self.place = fresh(scratch / "place")
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.said: dict[tuple[str, str], str] = {}
        self.deadline = math.inf
        self.jobs = [self._job(name) for name in names]

    def _job(self, name: str) -> Job:
        adapter, pairs = self.scratch / "adapter", self.scratch / "pairs.jsonl"
        if not adapter.exists():
            _adapter(self.base, adapter)
            pairs.write_text("".join(PAIRS.read_text().splitlines(keepends=True)[:60]))
        given = {
            "merge": ("merge", "BASE", str(adapter), "--no-verify"),
            "merge, verified": ("merge", "BASE", str(adapter)),
            "onnx": ("onnx", "BASE", str(adapter)),
            "run": ("run", "BASE", str(pairs), *RUN),
        }[name]
        # Paths are part of what a run records, so all runs have the same.
        out = self.place / "out"
        bare = Job(name, tuple(given), {}, 0.0, 0)
        counter = self.scratch / "operations"
        counter.write_text("")

        def note() -> None:
            with counter.open("a") as stream:
                stream.write(".")

        ended = children.run(bare.command(out, self.base), self.scratch)
        if ended.code:
            raise SystemExit(f"{name}: exit code {ended.code}: {' '.join(ended.errors)}")
        _check_independently(out)
        wanted = digests(out)
        shutil.rmtree(out)
        counted = children.counting(self.place, note)
        children.run(bare.command(out, self.base), self.scratch, prepare=counted)
        shutil.rmtree(out)
        operations = len(counter.read_text())
        print(f"{name}: {ended.seconds:.1f} s, {operations} file operations", file=sys.stderr)
        return Job(name, tuple(given), wanted, ended.seconds, operations)

    def fault(
        self,
        kind: str,
        job: Job,
        *,
        kill_after: float | None = None,
        prepare: Prepare | None = None,
        place: Path | None = None,
        repair: Undo | None = None,
    ) -> Ended:
        """One fault: count what is left, repair, run again, count that."""
        found = self.counts.setdefault((kind, job.name), Counter())
        found["times"] += 1
        out = (place or self.place) / "out"
        ended = children.run(
            job.command(out, self.base), self.scratch, kill_after=kill_after, prepare=prepare
        )
        left = digests(out)
        kind_left = "nothing" if not out.exists() else "other"
        found["complete" if left and left == job.wanted else kind_left] += 1
        shutil.rmtree(out, ignore_errors=True)
        if ended.code > 0:
            self.said.setdefault((kind, job.name), ended.errors[-1] if ended.errors else "")
            told = len(ended.errors) == 1 and ended.errors[0].startswith("error: ")
            found["not one line"] += not told or ended.code == 70
        if repair is not None:
            repair()
        found["base changed"] += digests(self.base) != self.digests
        again = children.run(job.command(out, self.base), self.scratch)
        alone = [path.name for path in out.parent.iterdir()] == ["out"]
        whole = again.code == 0 and alone and digests(out) == job.wanted
        found["rerun failed"] += not whole
        if not whole:
            beside = sorted(path.name for path in out.parent.iterdir())
            print(f"{kind}, {job.name}: {again} beside {beside}", file=sys.stderr)
        for path in (place or self.place).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return ended

    def _until(self, times: int) -> Iterator[int]:
        """Numbers from 0 on, until the time is up."""
        for number in range(times):
            if time.monotonic() > self.deadline:
                print(f"the time is up after {number} of {times}", file=sys.stderr)
                return
            yield number

    def kills(self, times: int) -> None:
        """At random moments, the jobs in turn."""
        for number in self._until(times):
            job = self.jobs[number % len(self.jobs)]
            self.fault("kill -9", job, kill_after=self.rng.uniform(0, 1.02 * job.seconds))

    def operations(self, times: int) -> None:
        """Just before random operations on files of the output, the jobs in turn."""
        for number in self._until(times):
            job = self.jobs[number % len(self.jobs)]
            at = self.rng.randint(1, job.operations)
            prepare = children.at_operation(self.place, at, children.die)
            self.fault("kill -9 before a file operation", job, prepare=prepare)

    def sizes(self, count: int) -> None:
        """Disks from nothing to a little more than the output, the jobs in turn."""
        for number in self._until(count):
            job = self.jobs[number % len(self.jobs)]
            size = int((number + 0.5) / count * 1.2 * _size(self.scratch, job, self.base))
            for kind, prepare in (
                ("disk too small", None),
                ("disk fills up meanwhile", children.space_seems_free),
            ):
                with _disk(self.scratch / "disk", size) as (place, limited, repair):
                    both = partial(_both, prepare, limited)
                    self.fault(kind, job, prepare=both, place=place, repair=repair)

    def reads(self, times: int) -> None:
        """Everything that can be wrong with a base's file, each so many times for each job."""
        for job in self.jobs:
            for kind, spoil in _SPOILS.items():
                for _ in self._until(times):
                    shard = self.rng.choice(sorted(self.base.glob("*.safetensors")))
                    whole = shard.read_bytes()
                    prepare = spoil(self, shard)
                    mend = partial(_mend, shard, whole)
                    self.fault(f"read error: {kind}", job, prepare=prepare, repair=mend)

    def rows(self) -> Iterator[str]:
        """The table."""
        yield "| fault | command | times | " + " | ".join(COLUMNS) + " |"
        yield "|---" * (3 + len(COLUMNS)) + "|"
        for (kind, name), found in self.counts.items():
            cells = (str(found[column]) for column in COLUMNS)
            yield f"| {kind} | `{name}` | {found['times']} | " + " | ".join(cells) + " |"

    @property
    def failed(self) -> bool:
        """Whether anything was found that must not be."""
        return any(found[name] for found in self.counts.values() for name in COLUMNS[2:])


def _both(*steps: Prepare | None) -> None:
    for step in steps:
        if step is not None:
            step()


def _shard(model: Path, base: Path) -> None:
    """A copy of the demo model in several shards: its one file would hide mixed states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(base, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(model).save_pretrained(base)


def _adapter(base: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from austeer.adapters import SteeringAdapter

    model = AutoModelForCausalLM.from_pretrained(base)
    units: tuple[list[int], list[int], list[float]] = ([0, 2, 4], [3, 5, 7], [0.9, -0.5, 1.7])
    SteeringAdapter.from_units(model, "attention", *units).save_pretrained(folder)


def _check_independently(out: Path) -> None:
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def _size(scratch: Path, job: Job, base: Path) -> int:
    """Bytes of the undisturbed output, measured once."""
    known = scratch / f"size of {job.name}"
    if not known.exists():
        out = fresh(scratch / "sized") / "out"
        children.run(job.command(out, base), scratch)
        total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        known.write_text(json.dumps(total))
        shutil.rmtree(out.parent)
    return int(known.read_text())


@contextmanager
def _disk(mount: Path, size: int) -> Iterator[tuple[Path, Prepare | None, Undo]]:
    """A folder that holds so many bytes, what a child does besides, and how it gets room."""
    fresh(mount)
    size = max(4096, size)
    option = ["-o", f"size={size}"]
    if subprocess.run(["mount", "-t", "tmpfs", *option, "tmpfs", mount]).returncode:
        limits = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        yield mount, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits), lambda: None
        return
    more = ["mount", "-o", "remount,size=256m", str(mount)]
    try:
        yield mount, None, partial(subprocess.run, more, check=True)
    finally:
        subprocess.run(["umount", mount], check=True)


def _mend(shard: Path, data: bytes) -> None:
    if shard.is_symlink() or shard.is_file():
        shard.unlink()
    elif shard.is_dir():
        shard.rmdir()
    shard.write_bytes(data)


def _cut(faults: Faults, shard: Path) -> None:
    os.truncate(shard, faults.rng.randrange(shard.stat().st_size))


def _missing(_: Faults, shard: Path) -> None:
    shard.unlink()


def _folder(_: Faults, shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def _dangling(faults: Faults, shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(faults.scratch / "nowhere")


def _unreadable(_: Faults, shard: Path) -> Prepare | None:
    shard.chmod(0)
    return children.as_nobody if os.geteuid() == 0 else None


def _cut_meanwhile(faults: Faults, shard: Path) -> Prepare:
    length = faults.rng.randrange(shard.stat().st_size)
    action = partial(os.truncate, shard, length)
    # Headers are read first: most of these opens are later ones.
    return children.at_operation(shard, faults.rng.randint(1, 8), action)


def _bad_block(faults: Faults, _: Path) -> Prepare:
    return children.copies_fail(faults.rng.randint(1, 8))


_SPOILS: dict[str, Callable[[Faults, Path], Prepare | None]] = {
    "cut": _cut,
    "missing": _missing,
    "a folder": _folder,
    "a link to nothing": _dangling,
    "unreadable": _unreadable,
    "cut while it is read": _cut_meanwhile,
    "EIO in the kernel's copy": _bad_block,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--operations", type=int, default=100)
    parser.add_argument("--sizes", type=int, default=50)
    parser.add_argument("--reads", type=int, default=3, help="of each kind, for each command")
    parser.add_argument(
        "--commands", nargs="+", default=["merge", "merge, verified", "onnx", "run"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--folder", type=Path, help="where to write; the temporary one else")
    options = parser.parse_args()
    children.preload()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        Path(folder).chmod(0o755)
        faults = Faults(Path(folder), tuple(options.commands), options.seed)
        faults.deadline = started + 60 * options.minutes
        for stage in ("kills", "operations", "sizes", "reads"):
            getattr(faults, stage)(getattr(options, stage))
            print(f"{stage}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        cores = f"{os.cpu_count()} × {platform.machine()} cores"
        print(f"{datetime.date.today()}, {cores}, seed {options.seed}\n")
        print("\n".join(faults.rows()))
        print("\nThe first refusal of each kind:\n")
        for (kind, name), words in faults.said.items():
            print(f"- {kind}, `{name}`: {words.replace(folder, '')}")
    if faults.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
