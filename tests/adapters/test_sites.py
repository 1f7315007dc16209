"""Sites, their names, tables of units."""

from __future__ import annotations

import numpy as np
import pytest

from austeer.adapters import Component, Refusal, Site, SiteError, UnitTable


@pytest.mark.parametrize("component", Component)
def test_key_round_trips(component: Component) -> None:
    site = Site(12, component)
    assert site.key == str(site) == f"layers.12.{component.value}"
    assert Site.parse(site.key) == site


@pytest.mark.parametrize(
    "key",
    [
        "layers.1",
        "layers.x.ffn",
        "layers.-1.ffn",
        "blocks.1.ffn",
        "layers.1.head",
        "",
        "a.b.c.d",
        "layers.01.ffn",
        "layers.٣.ffn",
        "layers.².ffn",
        "layers.1.ffn\n",
        "layers." + "9" * 5000 + ".ffn",
        "layers.1000000000.ffn",
    ],
)
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(SiteError, match=r"expected layers\.<number>"):
        Site.parse(key)


def test_only_the_layer_output_cannot_fold() -> None:
    assert [c.value for c in Component if not c.foldable] == ["layer"]


def table() -> UnitTable:
    return UnitTable(
        Component.FFN,
        layer=np.array([2, 0, 2, 1]),
        unit=np.array([9, 4, 3, 4]),
        beta=np.array([1.0, -1.0, 0.9, 0.5]),
    )


def test_head_keeps_the_best() -> None:
    assert len(table()) == 4
    best = table().head(2)
    assert best.layer.tolist() == [2, 0] and best.unit.tolist() == [9, 4]
    assert best.beta.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_units_than_exist(k: int) -> None:
    with pytest.raises(SiteError, match=f"{k} units asked for, 1 to 4 exist"):
        table().head(k)


def test_rows_by_site_ascend() -> None:
    rows = {site.key: found.tolist() for site, found in table().by_site().items()}
    assert rows == {"layers.0.ffn": [1], "layers.1.ffn": [3], "layers.2.ffn": [2, 0]}
    assert list(rows) == sorted(rows)


def test_refusal_reads_as_a_sentence() -> None:
    assert str(Refusal(Site(0, Component.LAYER), "why")) == "layers.0.layer: why"
    assert str(Refusal(None, "why")) == "why"
