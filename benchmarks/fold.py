"""What a fold costs against copying the checkpoint, and how much memory it takes.

    python benchmarks/fold.py                   # 2 GB, then 8 GB; needs 20 GB of disk
    python benchmarks/fold.py --sizes 2 --rounds 3

Ways take turns in one run; wall time and peak memory of whole processes, interpreter included.
`cp -r` and the fold are compared as they leave the page cache, and both synced: a published
fold always is. The checkpoint is a random bfloat16 Llama in four shards, three units of every
layer's attention output are steered; with links, of every layer in the first shard. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from austeer.adapters import SteeredSite, SteeringAdapter, Strength
from austeer.adapters.architectures import architecture_of
from austeer.adapters.config import AdapterConfig
from austeer.adapters.fingerprint import checkpoint_reader, fingerprint
from austeer.adapters.sites import Component, Site
from austeer.adapters.weights import INDEX, Checkpoint

SHARDS, LAYERS, WORDS = 4, 32, 32000
UNITS = np.array([1, 50, 100])
# What `merge` does before it publishes; like `cp`, it leaves writing to disk for later.
UNSYNCED = """
import os, sys
os.__dict__.pop("posix_fadvise", None)
from pathlib import Path
from austeer.adapters.adapter import SteeringAdapter
from austeer.exporter.merge import verify_fold_structure, write_folded
from austeer.exporter.settings import StoredAs
base, adapter, out = map(Path, sys.argv[1:4])
out.mkdir()
adapter = SteeringAdapter.from_pretrained(adapter)
write_folded(base, adapter, out, stored=StoredAs(link="--link" in sys.argv))
verify_fold_structure(base, out, adapter, touched_only=True)
"""


def shapes(width: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each shard."""
    inner = width * 8 // 3
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    for layer in range(LAYERS):
        path, shard = f"model.layers.{layer}", shards[layer * SHARDS // LAYERS]
        for name in "qkvo":
            shard[f"{path}.self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shard[f"{path}.mlp.{name}_proj.weight"] = (inner, width)
        shard[f"{path}.mlp.down_proj.weight"] = (width, inner)
    shards[0]["model.embed_tokens.weight"] = (WORDS, width)
    shards[-1]["model.norm.weight"] = (width,)
    return shards


def generate(root: Path, gigabytes: float) -> None:
    """A checkpoint of about this size, and adapters of all layers and of the first shard's."""
    width = 128 * round((gigabytes * 1e9 / (2 * 12 * LAYERS)) ** 0.5 / 128)
    base = root / "base"
    base.mkdir(parents=True)
    rng, index = np.random.default_rng(0), {}
    for number, shard in enumerate(shapes(width), 1):
        name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        _write_shard(base / name, shard, rng)
        index |= dict.fromkeys(shard, name)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": width}
    (base / "config.json").write_text(json.dumps(config))
    for name, layers in (("adapter", LAYERS), ("first", LAYERS // SHARDS)):
        _make_adapter(base, layers).save_pretrained(root / name)


def _make_adapter(base: Path, layers: int) -> SteeringAdapter:
    sites = [
        SteeredSite(Site(layer, Component.ATTENTION), UNITS, np.full(3, 0.5, np.float32))
        for layer in range(layers)
    ]
    architecture = architecture_of("llama")
    read = checkpoint_reader(architecture, Checkpoint(base))
    described = AdapterConfig(
        base_model_name_or_path="",
        base_model_fingerprint=fingerprint(architecture, [s.site for s in sites], read),
        model_type="llama",
        components=(Component.ATTENTION,),
        strength=Strength.FITTED,
        alpha=None,
        k=len(UNITS) * layers,
        rank=0,
        fit={},
    )
    return SteeringAdapter(described, sites)


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            # The bits of finite numbers: the top bit of the exponent stays 0.
            bits = rng.integers(0, 1 << 16, int(np.prod(shape)), dtype=np.uint16) & 0xBFFF
            file.write(bits.tobytes())


def measure(command: Sequence[str], out: Path, *, sync: bool) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a command that writes `out`, which goes afterwards."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    if sync:
        subprocess.run(["sync", *map(str, [*out.iterdir(), out])], check=True)
    seconds = time.monotonic() - started
    shutil.rmtree(out)
    return seconds, used.ru_maxrss / 1024


def compare(root: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, MB) of every way in every round."""
    base, adapter, first, out = (str(root / n) for n in ("base", "adapter", "first", "out"))
    program = str(Path(sys.executable).with_name("austeer-export"))
    ways = {
        "cp": (["cp", "-r", base, out], False),
        "fold": ([sys.executable, "-c", UNSYNCED, base, adapter, out], False),
        "link": ([sys.executable, "-c", UNSYNCED, base, first, out, "--link"], False),
        "cp, synced": (["cp", "-r", base, out], True),
        "fold, synced": (
            [program, "merge", base, adapter, "-o", out, "--no-verify", "--no-sums"],
            False,
        ),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds):
        order = list(ways)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            command, sync = ways[name]
            found[name].append(measure(command, Path(out), sync=sync))
    return found


def row(size: int, found: dict[str, list[tuple[float, float]]]) -> str:
    """One line of the table."""
    cells = [f"{statistics.median(s for s, _ in found['cp']):.2f}"]
    for way, copy in (("fold", "cp"), ("link", "cp"), ("fold, synced", "cp, synced")):
        ratios = sorted(
            mine / theirs
            for (mine, _), (theirs, _) in zip(found[way], found[copy], strict=True)
        )
        middle = statistics.median(ratios)
        cells.append(f"{middle:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    cells.append(f"{max(mb for way in found if 'fold' in way for _, mb in found[way]):.0f}")
    return f"| {size / 1e9:.2f} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[2.0, 8.0], help="GB")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to write; the temporary one else")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        generate(options.generate, *options.sizes)
        return
    print(f"{datetime.date.today()}, {os.cpu_count()} × {platform.machine()} cores,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}, {options.rounds} rounds, median [least, most]\n")
    print("| GB | `cp -r`, s | fold : `cp -r` | links | both synced | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for gigabytes in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            # A process inherits the peak memory of the one that starts it.
            command = [sys.executable, __file__, "--generate", folder, "--sizes"]
            subprocess.run([*command, str(gigabytes)], check=True)
            size = sum(path.stat().st_size for path in (Path(folder) / "base").iterdir())
            print(row(size, compare(Path(folder), options.rounds)), flush=True)


if __name__ == "__main__":
    main()
