"""Writes a steered checkpoint with code, for what no weight can absorb.

The base's weight files as they are, one more file with the adapter's tensors, and a modelling
file that transformers runs with `trust_remote_code`; no torch, no model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from austeer.adapters._errors import ModelError, RouteError
from austeer.adapters._files import publish_directory, read_json, write_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import skips_projections
from austeer.adapters.card import model_card
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.steered_format import (
    CODE_NAME,
    STEERING_NAME,
    code_file,
    steered_config,
    steering_tensors,
)
from austeer.adapters.steered_site import touched_tensors
from austeer.adapters.tensors import Tensors, write_tensors
from austeer.adapters.weights import INDEX, SINGLE, Checkpoint
from austeer.exporter.checkpoint import (
    copy_checkpoint,
    index_metadata,
    refuse_unwritable,
)
from austeer.exporter.merge import is_own_base, open_base, read_model_config, refuse_quantized
from austeer.exporter.proofs.code_check import verify_code_structure
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.routes import Route, check_gains
from austeer.exporter.settings import Handling

# transformers reads no second file beside one of the usual name.
_ONLY_SHARD = "model-00001-of-00001.safetensors"


def export_code(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    link: bool = False,
    seal: Seal | None = None,
) -> None:
    """Write `base` steered by `adapter` in code, check its files, publish it at `out`.

    Args:
        base: directory with config.json and safetensors weights.
        adapter: any strength, any component.
        out: new or empty directory.
        scale: factor on every γ; config.json keeps it as `steering_scale`.
        force: accept a base with another fingerprint.
        link: hard link the base's weight files instead of copying them.
        seal: what `austeer.json` says besides.

    Raises:
        RouteError: a base that is quantized or brings code of its own, or no effect.
        ModelError: `base` is malformed.
        AdapterError: the adapter belongs to another base.
        SiteError: a unit or layer that the base does not have.
        OutputError: `out` is taken or cannot be written.
        VerificationError: the files are not those of the base and the adapter.
    """
    with publish_directory(out) as work:
        write_code(base, adapter, work, scale=scale, force=force, link=link)
        verify_code_structure(base, work, adapter, scale)
        facts = ProductFacts(Route.CODE, base, adapter, Handling(scale=scale, force=force))
        (seal or Seal()).close_product(work, facts)


def write_code(
    base: Path,
    adapter: SteeringAdapter,
    folder: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    link: bool = False,
    own_base: bool | None = None,
) -> None:
    """Write the steered checkpoint into `folder`, an existing empty directory.

    Arguments and errors as in `export_code`; nothing is published or verified. `own_base` is
    what `is_own_base` said, if it was asked already.
    """
    config = read_model_config(base)
    check_code_base(base, config)
    check_gains([adapter], scale)
    checkpoint = open_base(base, adapter, force=force)
    for path in map(folder.joinpath, copy_checkpoint(checkpoint, folder, link=link).names):
        if path.suffix == ".py":
            path.unlink()
    steering = steering_tensors(adapter, _is_bare(checkpoint, adapter))
    write_tensors(folder / STEERING_NAME, steering, {"format": "pt"})
    _write_index(checkpoint, steering, folder)
    write_json(folder / "config.json", steered_config(config, adapter, scale))
    _name_tokenizer(config, folder)
    shutil.copyfile(code_file(), folder / CODE_NAME)
    if own_base is None:
        own_base = is_own_base(checkpoint, adapter, force=force)
    card = model_card(
        adapter.config, "finetune", "transformers", _usage(), scale=scale, own_base=own_base
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_code_base(base: Path, config: Mapping[str, Any]) -> None:
    """Refuse a base that no modelling file of ours can steer.

    Raises:
        RouteError: quantized, with code of its own, or with projections that are not called.
        ModelError: its config cannot be written.
    """
    refuse_quantized(
        base, "and steering in code was not proved on those; steer the unquantized model"
    )
    tokenizer = base / "tokenizer_config.json"
    own = config.get("auto_map") or (
        tokenizer.is_file() and read_json(tokenizer, ModelError, "").get("auto_map")
    )
    if own:
        raise RouteError(
            f"{base}: brings code of its own (auto_map), which a second modelling file cannot "
            "extend; export it to ONNX or attach it to the live model"
        )
    refuse_unwritable(config, base)
    if skips_projections(config.get):
        raise RouteError(
            f"{base}: slow_but_exact with pretraining_tp calls no projection, so that no hook "
            "runs; set slow_but_exact to false in its config.json"
        )


def _is_bare(checkpoint: Checkpoint, adapter: SteeringAdapter) -> bool:
    """Whether the stored names lack the decoder's prefix; then all names must."""
    read = checkpoint_reader(adapter.architecture, checkpoint)
    name, _, _ = next(touched_tensors(adapter.sites, adapter.architecture, read))
    row = adapter.architecture
    entry = checkpoint.find(row.disk_names(name))
    return entry is not None and entry.name == name.removeprefix(f"{row.prefix}.")


def _write_index(checkpoint: Checkpoint, steering: Tensors, folder: Path) -> None:
    """List the base's files and the steering in one index."""
    if (folder / SINGLE).is_file():
        (folder / SINGLE).rename(folder / _ONLY_SHARD)
        shards = dict.fromkeys(checkpoint, _ONLY_SHARD)
    else:
        shards = {name: entry.file.name for name, entry in checkpoint.items()}
    metadata = index_metadata(folder)
    sizes = [entry.size for entry in checkpoint.values()]
    metadata["total_size"] = sum(sizes) + sum(tensor.nbytes for tensor in steering.values())
    shards |= dict.fromkeys(steering, STEERING_NAME)
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": shards})


def _name_tokenizer(config: Mapping[str, Any], folder: Path) -> None:
    """Write down the tokenizer's class where only the base's model type said it."""
    path = folder / "tokenizer_config.json"
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*")):
        return
    found = read_json(path, ModelError, "") if path.is_file() else {}
    if found.get("tokenizer_class"):
        return
    name = config.get("tokenizer_class") or _usual_tokenizer(config["model_type"])
    if name:
        path.write_text(json.dumps({**found, "tokenizer_class": name}, indent=2) + "\n")


def _usual_tokenizer(model_type: str) -> str | None:
    """Class name that transformers takes for a model type, without a `Fast` at its end."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # transformers 4 gives (slow, fast), 5 gives one name.
    found = TOKENIZER_MAPPING_NAMES.get(model_type)
    names = [found] if isinstance(found, str) else list(found or ())
    known = [name.removesuffix("Fast") for name in names if name]
    return known[-1] if known else None


def _usage() -> str:
    return f"""The steering is code: `{CODE_NAME}`, beside the base model's own weights. It
needs torch and transformers, nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this/model", trust_remote_code=True)
model.steering_scale = 0.5  # 0 is the base model
```

Without running code from here: `austeer.adapters.load_steered("this/model")`."""
