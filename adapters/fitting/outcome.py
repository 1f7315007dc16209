"""What came out of a fit: whether it helps, and what was selected."""

from __future__ import annotations

from typing import Any

from austeer.adapters.config import Strength
from austeer.adapters.fitting.candidates import Candidate, FitOptions
from austeer.adapters.predictor import PHI_MAX

_NOTABLE = 1.0  # nats of margin that count as help even where no pair changes sides


def no_effect_reason(
    best: Candidate, validation: dict[str, Any], options: FitOptions
) -> str | None:
    """Why nothing within the budget helps, None where something does.

    Args:
        best: the candidate chosen.
        validation: its figures on the validation split.
        options: budgets and strength.
    """
    if not best.within:
        return _over_budget(best, options)
    flips = validation["accuracy"] > validation["base_accuracy"]
    notable = flips or validation["margin_gain"] >= _NOTABLE
    if notable and validation["margin_gain_ci95"][0] > 0:
        return None
    base, steered = (
        f"margin {validation[kind + 'margin']:+.2f}, "
        f"accuracy {validation[kind + 'accuracy']:.2f}"
        for kind in ("base_", "")
    )
    return (
        f"strength {options.strength} does not help within the KL budget of "
        f"{options.kl_budget:g} nats/token: validation {base} → {steered}; raise --kl-budget, "
        "add pairs or try another strength"
    )


def _over_budget(best: Candidate, options: FitOptions) -> str:
    budget, found = f"the KL budget of {options.kl_budget:g} nats/token", best.judgement
    if found.fluency is None:
        return (
            f"no candidate keeps {budget} (the gentlest has {found.kl:.3g}); raise --kl-budget"
        )
    return (
        f"no candidate keeps {budget} and the fluency limit of {options.fluency_limit:g} (the "
        f"gentlest has KL {found.kl:.3g}, fluency {found.fluency:.3g}); raise --kl-budget or "
        "--fluency-limit"
    )


def selected_facts(best: Candidate, options: FitOptions) -> dict[str, Any]:
    """`selected` of the report (DESIGN §5)."""
    adaptive = options.strength is Strength.ADAPTIVE
    limit = -1.0 / (PHI_MAX if adaptive else 1.0)
    return {
        "component": "+".join(best.components),
        "components": [component.value for component in best.components],
        "k": best.k,
        "alpha": best.alpha,
        "strength": options.strength.value,
        "rank": options.rank if adaptive else 0,
        "sites": len(best.sites),
        "units_that_can_flip_sign": int(sum((s.gamma < limit).sum() for s in best.sites)),
    }
