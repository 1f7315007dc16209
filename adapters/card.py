"""The model card (`README.md`) of an adapter or of a steered checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from austeer.adapters.config import AdapterConfig, figures_of_test

_TITLES = {
    "adapter": "Steering adapter",
    "finetune": "Steered model",
    "quantized": "Steered model",
}


def adapter_card(config: AdapterConfig) -> str:
    """Model card of the adapter itself."""
    usage = """```python
from austeer.adapters import SteeringAdapter

adapter = SteeringAdapter.from_pretrained("this/adapter")
with adapter.attached(model):
    model.generate(**inputs)
```"""
    return model_card(config, "adapter", "austeer", usage)


def model_card(
    config: AdapterConfig,
    relation: str,
    library: str,
    usage: str,
    *,
    scale: float = 1.0,
    own_base: bool = True,
) -> str:
    """A model card with the Hub's metadata block, the adapter's facts and its figures.

    The figures are the fit's, and left out where the product is another thing.

    Args:
        config: the adapter's config.
        relation: the Hub's `base_model_relation` (`adapter`, `finetune`, …).
        library: the Hub's `library_name`.
        usage: Markdown that shows how to load the files.
        scale: factor on every γ.
        own_base: whether the product's base is that of the adapter.
    """
    name = config.base_model_name_or_path
    base = {"base_model": name} if own_base and _is_hub_id(name) else {}
    fitted = own_base and scale == 1.0
    metadata = {
        "library_name": library,
        **base,
        "base_model_relation": relation,
        "tags": ["austeer", "steering"],
    }
    # JSON values are valid YAML, quoting included.
    front = "\n".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()
    )
    return f"""---
{front}
---

# {_TITLES[relation]}

{config.k} activation units of {_base(name, own_base)} rescaled at
{", ".join(config.components)}, strength `{config.strength}`,
made with austeer (AUSteer, arXiv 2602.04428).

{usage}
{_figures(figures_of_test(config.fit)) if fitted else ""}"""


def _base(name: str, own_base: bool) -> str:
    called = f"`{name}`" if name else "a model in memory"
    return called if own_base else f"another model than {called}, for which they were chosen,"


def _is_hub_id(name: str) -> bool:
    """The Hub refuses a card whose base is a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).is_dir()


def _figures(test: Mapping[str, Any]) -> str:
    if not test:
        return ""
    rows = "\n".join(
        f"| {name} | {value:.4g} |"
        for name, value in sorted(test.items())
        if isinstance(value, float)
    )
    return f"""
## Held-out figures

Of the adapter, attached at its fitted strength to the model that it was fitted on.

| figure | value |
|---|---|
{rows}
"""
