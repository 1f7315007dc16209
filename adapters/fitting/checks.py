"""What a fit refuses before it starts, and what the names of its options stand for."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from austeer.adapters._errors import FitError, ModelError
from austeer.adapters.architectures import architecture_of
from austeer.adapters.config import Strength
from austeer.adapters.localization.run import Ranking
from austeer.adapters.measurement.measure import Splits
from austeer.adapters.sites import Component

_LEAST_VALIDATION = 5  # pairs below which choosing is left to chance


def chosen_strength(name: Strength | str) -> Strength:
    """The strength of a name, `adaptive` for "auto".

    Raises:
        FitError: unknown.
    """
    try:
        return Strength.ADAPTIVE if name == "auto" else Strength(name)
    except ValueError:
        known = ", ".join(strength.value for strength in Strength)
        raise FitError(f"strength {name!r}: expected auto, {known}") from None


def chosen_components(
    names: str | Sequence[Component | str] | None,
    ranking: Ranking | None,
    model: PreTrainedModel,
) -> tuple[Component, ...]:
    """Those named, or all that the ranking has; without a ranking, all that the model has.

    Raises:
        FitError: one of another name, or that was not ranked.
        ModelError: unsupported architecture.
    """
    row = architecture_of(model.config.model_type)
    known = tuple(row.components if ranking is None else ranking.components)
    names = [names] if isinstance(names, str) else names
    wanted = tuple(dict.fromkeys(names)) if names else known
    for name in wanted:
        if name not in known:
            where = "the ranking has" if ranking is not None else "expected"
            raise FitError(f"component {name!s}: {where} {', '.join(known)}; localize it first")
    return tuple(Component(name) for name in wanted)


def check_enough(splits: Splits) -> None:
    """Refuse to choose by so few pairs that chance would choose.

    Raises:
        FitError: as said.
    """
    found = len(splits.validation)
    if found < _LEAST_VALIDATION:
        raise FitError(
            f"pairs: {found} are left for validation, at least {_LEAST_VALIDATION} are needed; "
            f"give {5 * _LEAST_VALIDATION} pairs or more"
        )


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose tensors take no part in a backward pass.

    Raises:
        ModelError: as said.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "fit: the model was made under torch.inference_mode(), where nothing can be "
            "trained; load it outside"
        )
