"""`ParityReport`: how far a product is from its reference, and whether that is good enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from austeer.adapters._errors import VerificationError

FLOAT32_BOUND = 1e-4
"""Float32 logits computed in another order agree to this share of the largest logit.

About a thousand roundings (2^-24 each): what a deep network's reductions accumulate. Seen on
tiny models and on stories260K: 1e-6 or less.
"""

Logits = Callable[[Int[np.ndarray, "1 tokens"]], Float[np.ndarray, "tokens vocab"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """A product reloaded from disk against the attached model, over every prompt position.

    Attributes:
        route: `safetensors`, `onnx`, `lora`, `ia3` or `code`.
        path: name of the product's folder.
        max_logit_difference: largest |product − attached|.
        tolerance: what it may be.
        argmax_agreement: share of positions with the same most likely token.
        decided_agreement: the same where the reference's two best logits are further apart
            than twice the tolerance; elsewhere the most likely token is a near-tie.
        steered_vs_base: largest |product − base|.
        greedy_agreement: share of greedily decoded tokens (KV cache) that agree up to a
            near-tie; None where nothing was decoded.
        tokens: number of compared positions.
        prompts: number of prompts.
    """

    route: str
    path: str
    max_logit_difference: float
    tolerance: float
    argmax_agreement: float
    decided_agreement: float
    steered_vs_base: float
    greedy_agreement: float | None
    tokens: int
    prompts: int

    @property
    def passed(self) -> bool:
        """Whether the product may be published."""
        return not self.failures()

    def failures(self) -> list[str]:
        """What is wrong, with numbers; written so that NaN fails."""
        found = []
        if not self.max_logit_difference <= self.tolerance:
            found.append(
                f"logits differ by {self.max_logit_difference:.3g} from the attached model, "
                f"expected at most {self.tolerance:.3g}"
            )
        if self.decided_agreement != 1.0:
            found.append(
                f"the most likely token agrees at {self.decided_agreement:.2%} of the clearly "
                "decided positions, expected all"
            )
        if self.greedy_agreement is not None and self.greedy_agreement != 1.0:
            found.append(
                f"greedy decoding agrees at {self.greedy_agreement:.2%} of the tokens, "
                "expected all"
            )
        # A product within the tolerance of both would prove nothing.
        if not self.steered_vs_base > 2 * self.tolerance:
            found.append(
                f"steering has no effect: logits differ by {self.steered_vs_base:.3g} from the "
                f"base, expected more than {2 * self.tolerance:.3g}"
            )
        return found

    def require(self, consequence: str = "not published") -> None:
        """Raise unless the product passed.

        Args:
            consequence: what follows for the user.

        Raises:
            VerificationError: every failure in one line.
        """
        if failures := self.failures():
            raise VerificationError(
                f"{self.route} product {self.path}: {'; '.join(failures)} "
                f"({self.tokens} tokens of {self.prompts} prompts); {consequence}"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON values, `passed` included."""
        return {**dataclasses.asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Raw figures of `compare_logits`, one entry per position where they are arrays."""

    difference: float
    to_base: float
    peak: float
    agrees: Bool[np.ndarray, " positions"]
    margin: Float[np.ndarray, " positions"]

    def report(
        self,
        route: str,
        path: str,
        prompts: int,
        *,
        tolerance: float,
        greedy: float | None = None,
    ) -> ParityReport:
        """Judge the figures by `tolerance`."""
        decided = self.agrees[self.margin > 2 * tolerance]
        return ParityReport(
            route=route,
            path=path,
            max_logit_difference=self.difference,
            tolerance=tolerance,
            argmax_agreement=float(self.agrees.mean()),
            decided_agreement=float(decided.mean()) if len(decided) else 1.0,
            steered_vs_base=self.to_base,
            greedy_agreement=greedy,
            tokens=len(self.agrees),
            prompts=prompts,
        )


def compare_logits(
    prompts: Iterable[Int[np.ndarray, "1 tokens"]],
    product: Logits,
    steered: Logits,
    base: Logits,
) -> Comparison:
    """Run all three on every prompt; memory for one prompt's logits."""
    difference, to_base, peak = [], [], []
    agrees, margins = [], []
    for ids in prompts:
        found, wanted, plain = product(ids), steered(ids), base(ids)
        difference.append(np.abs(found - wanted).max())
        to_base.append(np.abs(found - plain).max())
        peak.append(np.abs(wanted).max())
        agrees.append(found.argmax(-1) == wanted.argmax(-1))
        margins.append(top_margin(wanted))
    return Comparison(
        difference=float(np.max(difference)),
        to_base=float(np.max(to_base)),
        peak=float(np.max(peak)),
        agrees=np.concatenate(agrees),
        margin=np.concatenate(margins),
    )


def top_margin(logits: Float[np.ndarray, "*tokens vocab"]) -> Float[np.ndarray, "*tokens"]:
    """Distance between the two largest logits."""
    best = np.partition(logits, -2, axis=-1)[..., -2:]
    return np.asarray(best[..., 1] - best[..., 0])


def float32_bound(peak: float) -> float:
    """Largest logit difference that float32 explains, for logits up to `peak`."""
    return FLOAT32_BOUND * max(1.0, peak)
