"""The search behind a fit: candidates of a strength, and the choice among them."""

from __future__ import annotations

from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters._progress import Progress
from austeer.adapters.fitting.candidates import Candidate, FitOptions
from austeer.adapters.fitting.trained import trained_candidates
from austeer.adapters.fitting.untrained import untrained_candidates
from austeer.adapters.localization.run import Ranking
from austeer.adapters.measurement.measure import Share


def find_candidates(
    model: PreTrainedModel,
    ranking: Ranking,
    options: FitOptions,
    fit: Share,
    validation: Share,
    progress: Progress,
) -> list[Candidate]:
    """Every candidate of the strength, judged on validation data.

    Args:
        model: base model.
        ranking: the units' scores.
        options: see `FitOptions`.
        fit: split that gains are trained on.
        validation: split that choices are made on.
        progress: called with (stage, done, total).

    Raises:
        FitError: more units asked for than exist.
    """
    sizes = {c: ranking.beta(c).size for c in options.components}
    # Trained units may come from all components together, untrained ones from one.
    most = sum(sizes.values()) if options.strength.trained else max(sizes.values())
    if options.max_units > most:
        known = ", ".join(f"{c.value} has {size}" for c, size in sizes.items())
        raise FitError(
            f"max_units {options.max_units}: more than exist ({known}); ask for fewer"
        )
    if options.strength.trained:
        return list(trained_candidates(model, ranking, options, fit, validation, progress))
    return list(untrained_candidates(model, ranking, options, validation, progress))
