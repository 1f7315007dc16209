"""Adapters saved by earlier releases still load, value for value, and save unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from austeer.adapters import SteeringAdapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("name", ["v1-fitted", "v1-adaptive"])
def test_golden_adapter_loads_and_saves_unchanged(name: str, tmp_path: Path) -> None:
    adapter = SteeringAdapter.from_pretrained(GOLDEN / name)
    first, second = adapter.sites
    assert [first.site.key, second.site.key] == ["layers.0.attention", "layers.3.ffn"]
    assert first.index.tolist() == [1, 5, 7]
    assert second.gamma.tolist() == [-0.5, 0.25]
    assert adapter.config.base_model_name_or_path == "owner/base"
    assert adapter.config.fit == {"kl_budget": 0.1}
    if name == "v1-adaptive":
        assert first.predictor is not None
        assert np.allclose(first.predictor.V[:, 0], [0.126, -0.132, 0.640], atol=1e-6)
    again = adapter.save_pretrained(tmp_path / "again")
    for path in (GOLDEN / name).iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
