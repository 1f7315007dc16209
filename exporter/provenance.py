"""`austeer.json` of a product: what it was made from and with, enough to make it again.

It holds no time and no place of its own, so that what is made again has the same bytes.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from austeer.adapters._files import json_text, write_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.config import library_versions
from austeer.adapters.pairs import ContrastivePair, pairs_digest
from austeer.adapters.weights import Checkpoint
from austeer.exporter.checkpoint import source_files
from austeer.exporter.report import as_json
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling
from austeer.exporter.sums import SUMS_NAME, file_digests, write_sums

PROVENANCE_NAME = "austeer.json"
FORMAT_VERSION = 1
_WRITING = ("austeer", "ml_dtypes", "numpy", "safetensors")
_LIVE = ("tokenizers", "torch", "transformers")
_GRAPHS = ("onnx", "onnx-ir", "onnxruntime")
_EXPORTING = ("onnxscript",)
# Bytes of the base that are hashed, smallest files first: configs and small models.
_CHEAP = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class ProductFacts:
    """What decides the bytes of one product.

    Attributes:
        route: its kind.
        base: directory of the base model.
        adapter: what it is steered by.
        handling: how it was written.
        live: a live model took part: it wrote the product, or proved it.
    """

    route: Route
    base: Path
    adapter: SteeringAdapter
    handling: Handling = field(default_factory=Handling)
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What a product says of its own making, and whether it gets `SHA256SUMS`.

    Attributes:
        command: the command line, without the output's name; empty for a library call.
        model: the base as the user named it; its directory where empty.
        revision: Hub revision that was asked for.
        seed: of everything random, None where nothing is.
        sums: write `SHA256SUMS`.
    """

    command: str = ""
    model: str = ""
    revision: str | None = None
    seed: int | None = None
    sums: bool = True

    def close(self, folder: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Write `austeer.json` with `facts`, then `SHA256SUMS`, into a finished folder.

        Returns:
            Names of what was written.

        Raises:
            OutputError: one of them cannot be written.
        """
        own = {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "seed": self.seed,
            "system": f"{platform.system()} {platform.machine()}",
        }
        # A base that is a product itself had them: these are others.
        for name in (PROVENANCE_NAME, SUMS_NAME):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / PROVENANCE_NAME, as_json(own | dict(facts)))
        if not self.sums:
            return (PROVENANCE_NAME,)
        write_sums(folder)
        return (PROVENANCE_NAME, SUMS_NAME)

    def close_job(
        self,
        folder: Path,
        base: Path,
        adapter: SteeringAdapter | None,
        facts: Mapping[str, Any],
    ) -> None:
        """`close` with `facts` and those of what a live base gave; no adapter, no effect.

        Raises:
            OutputError: a file cannot be written.
        """
        found = {
            "adapter": adapter and adapter_facts(adapter),
            "base": self.base_facts(base, source_files(Checkpoint(base))),
            "versions": versions(None, live=True),
        }
        self.close(folder, dict(facts) | found | live_facts())

    def close_product(self, folder: Path, product: ProductFacts) -> tuple[str, ...]:
        """`close` with the facts of one product of a checkpoint.

        Returns:
            Names of what was written.

        Raises:
            OutputError: a file cannot be written.
        """
        handling = product.handling
        facts = {
            "route": product.route.value,
            "options": {
                "scale": handling.scale,
                "scale_as": handling.scale_as,
                "force": handling.force,
                # Links are the same bytes.
                "dtype": handling.stored.dtype,
                "max_shard_size": handling.stored.max_shard_size,
            },
            "adapter": adapter_facts(product.adapter),
            "base": self.base_facts(product.base, source_files(Checkpoint(product.base))),
            "versions": versions(product.route, live=product.live),
        }
        return self.close(folder, facts | (live_facts() if product.live else {}))

    def base_facts(self, base: Path, files: Sequence[Path]) -> dict[str, Any]:
        """Name, revision and files of the base; the commit where the Hub's cache names it."""
        stored = base.absolute()
        return {
            "model": self.model or str(base),
            "revision": self.revision,
            "commit": stored.name if stored.parent.name == "snapshots" else None,
            "files": _file_facts(base, files),
        }


def pairs_facts(pairs: Sequence[ContrastivePair]) -> dict[str, Any]:
    """How many pairs there were, and their digest."""
    return {"count": len(pairs), "digest": pairs_digest(pairs)}


def adapter_facts(adapter: SteeringAdapter) -> dict[str, str]:
    """The base that it was made for, and SHA-256 of the two files that it is saved as."""
    from safetensors.numpy import save

    tensors = save(adapter.tensors(), metadata={"format": "pt"})
    config = json_text(adapter.config.as_dict()).encode()
    return {
        "base_model_fingerprint": adapter.config.base_model_fingerprint,
        "adapter_config.json": hashlib.sha256(config).hexdigest(),
        "adapter_model.safetensors": hashlib.sha256(tensors).hexdigest(),
    }


def versions(route: Route | None, *, live: bool) -> dict[str, str]:
    """Versions of Python and of the packages that a product of this kind goes through."""
    names = [*_WRITING]
    if live or route is Route.CODE:
        names += _LIVE
    if route is Route.ONNX:
        names += (*_GRAPHS, *(_EXPORTING if live else ()))
    if live and route is not None and route.is_peft:
        names.append("peft")
    return library_versions(sorted(names)) | {"python": platform.python_version()}


def live_facts() -> dict[str, int]:
    """What else the last digits of a live model depend on; nothing without torch."""
    torch = sys.modules.get("torch")
    return {} if torch is None else {"torch_threads": torch.get_num_threads()}


def _file_facts(base: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size of each file, and its SHA-256 as long as hashing costs next to nothing."""
    sizes = sorted((path.stat().st_size, path) for path in files)
    hashed, total = [], 0
    for size, path in sizes:
        total += size
        if total <= _CHEAP:
            hashed.append(path)
    digests = dict(zip(hashed, file_digests(hashed), strict=True))
    facts: dict[str, dict[str, Any]] = {}
    for size, path in sizes:
        known = {"sha256": digests[path]} if path in digests else {}
        facts[path.relative_to(base).as_posix()] = {"size": size, **known}
    return facts
