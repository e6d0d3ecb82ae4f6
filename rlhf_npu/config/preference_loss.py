"""Which loss on preferences, and what only some of them need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, Range, key, spell

SMOOTHED = ("cdpo", "robust", "exo_pair")
"""Losses that know how often labels are wrong."""
WITH_DIVERGENCE = ("dpo", "cdpo", "robust")
"""Losses of a logistic margin, whose log-ratios another divergence than the reverse KL may replace."""
REFERENCE_FREE = ("simpo", "orpo", "cpo")
PAIR_LOSS_TYPES = (
    *WITH_DIVERGENCE,
    "ipo",
    "ipo_sum",
    "hinge",
    "apo_zero",
    "apo_down",
    "nca_pair",
    "exo_pair",
    "discopop",
    "sppo_hard",
    *REFERENCE_FREE,
)
UNPAIRED_LOSS_TYPES = ("kto",)
LOSS_TYPES_ELSEWHERE = {
    "sigmoid": "dpo",
    "ipo_avg": "ipo",
    "slic": "hinge",
    "rso": "hinge",
    "rdpo": "robust",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "sppo": "sppo_hard",
    "apo_zero_unpaired": "kto",
}
F_DIVERGENCE_TYPES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
F_DIVERGENCES_ELSEWHERE = {"kl": "reverse_kl", "jsd": "js_divergence", "js": "js_divergence"}


@dataclass
class PreferenceLossConfig(ConfigNode):
    """The loss on preferences; docs/algorithms.md has the formulas."""

    loss_type: str = key(
        "dpo = the logistic loss of DPO; kto learns from single answers; see docs/algorithms.md",
        "dpo",
        choices=(*PAIR_LOSS_TYPES, *UNPAIRED_LOSS_TYPES),
        elsewhere=LOSS_TYPES_ELSEWHERE,
    )
    beta: float = key("scale of the implicit reward; orpo: weight of the odds ratio", 0.1, within=POSITIVE)
    label_smoothing: float = key(
        "cdpo, robust, exo_pair: probability that chosen and rejected are swapped",
        0.0,
        within=Range(at_least=0, below=0.5),
    )
    f_divergence_type: str = key(
        "dpo, cdpo, robust: divergence from the reference that the reward pays for",
        "reverse_kl",
        choices=F_DIVERGENCE_TYPES,
        elsewhere=F_DIVERGENCES_ELSEWHERE,
    )
    f_alpha_divergence_coef: float = key(
        "alpha_divergence: its alpha; towards 0 = reverse KL, towards 1 = forward KL",
        0.5,
        within=Range(above=0, below=1),
    )
    simpo_gamma: float = key("simpo: margin between the rewards", 0.5, within=NOT_NEGATIVE)
    desirable_weight: float = key("kto: weight of desirable completions", 1.0, within=POSITIVE)
    undesirable_weight: float = key("kto: weight of undesirable completions", 1.0, within=POSITIVE)
    rpo_alpha: float | None = key(
        "pairs: weight of the chosen completion's negative log-likelihood a token; null = off", None, within=POSITIVE
    )

    def relations(self) -> Iterator[Problem]:
        yield from self._keys_of_other_losses()
        smoothed = self.loss_type in SMOOTHED
        if smoothed and not self.label_smoothing:
            yield Problem(
                "label_smoothing",
                self.label_smoothing,
                f"loss_type={self.loss_type} needs the share of wrong labels, above 0 and below 0.5, for example 0.1",
            )
        if self.loss_type == "cpo" and self.rpo_alpha is None:
            yield Problem("rpo_alpha", None, "loss_type=cpo holds the chosen's likelihood up; its paper's weight is 1")

    def _keys_of_other_losses(self) -> Iterator[Problem]:
        """Keys that the loss does not read, away from their defaults."""
        divergence = self.f_divergence_type == "alpha_divergence"
        owners = {
            "label_smoothing": (self.loss_type in SMOOTHED, f"loss_type={', '.join(SMOOTHED)}"),
            "f_divergence_type": (self.loss_type in WITH_DIVERGENCE, f"loss_type={', '.join(WITH_DIVERGENCE)}"),
            "f_alpha_divergence_coef": (divergence, "f_divergence_type=alpha_divergence"),
            "simpo_gamma": (self.loss_type == "simpo", "loss_type=simpo"),
            "desirable_weight": (self.loss_type == "kto", "loss_type=kto"),
            "undesirable_weight": (self.loss_type == "kto", "loss_type=kto"),
            "rpo_alpha": (self.loss_type not in ("kto", "orpo"), "pairs, but not by orpo, which has that term itself"),
        }
        for name, (is_read, readers) in owners.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if not is_read and value != default:
                yield Problem(name, value, f"is read by {readers}; leave it at {spell(default)}")
