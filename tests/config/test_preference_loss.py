"""Keys of the preference losses that have no meaning together."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.config.preference_loss import PreferenceLossConfig


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss_type": "sigmoid"}, "did you mean dpo?"),
        ({"loss_type": "dpo_norm"}, "loss.loss_type=dpo_norm: must be one of dpo, cdpo"),
        ({"loss_type": "cdpo"}, "loss.label_smoothing=0.0: loss_type=cdpo needs the share of wrong labels"),
        ({"loss_type": "robust"}, "loss.label_smoothing=0.0: loss_type=robust needs"),
        ({"loss_type": "exo_pair"}, "loss.label_smoothing=0.0: loss_type=exo_pair needs"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, "loss.label_smoothing=0.5: must be at least 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "loss.label_smoothing=-0.1: must be at least 0 and below 0.5"),
        ({"label_smoothing": 0.1}, "loss.label_smoothing=0.1: is read by loss_type=cdpo, robust, exo_pair"),
        ({"beta": 0.0}, "loss.beta=0.0: must be above 0"),
        ({"beta": float("nan")}, "loss.beta=nan: must be above 0"),
        ({"simpo_gamma": 1.0}, "loss.simpo_gamma=1.0: is read by loss_type=simpo; leave it at 0.5"),
        ({"desirable_weight": 2.0}, "loss.desirable_weight=2.0: is read by loss_type=kto; leave it at 1.0"),
        ({"loss_type": "ipo", "undesirable_weight": 2.0}, "loss.undesirable_weight=2.0: is read by loss_type=kto"),
        ({"loss_type": "kto", "rpo_alpha": 1.0}, "loss.rpo_alpha=1.0: is read by pairs"),
        ({"loss_type": "orpo", "rpo_alpha": 1.0}, "not by orpo, which has that term itself; leave it at null"),
        ({"loss_type": "cpo"}, "loss.rpo_alpha=null: loss_type=cpo holds the chosen's likelihood up"),
        ({"loss_type": "hinge", "f_divergence_type": "forward_kl"}, "loss.f_divergence_type=forward_kl: is read by"),
        ({"f_divergence_type": "jsd"}, "did you mean js_divergence?"),
        ({"f_alpha_divergence_coef": 0.7}, "is read by f_divergence_type=alpha_divergence; leave it at 0.5"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
            "loss.f_alpha_divergence_coef=1.0: must be above 0 and below 1",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(keys: dict[str, Any], message: str) -> None:
    (problem,) = PreferenceLossConfig(**keys).problems("loss.")
    assert message in str(problem)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rpo_alpha": 1.0},
        {"loss_type": "cdpo", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"loss_type": "simpo", "simpo_gamma": 1.0, "beta": 2.5, "rpo_alpha": 0.1},
        {"loss_type": "cpo", "rpo_alpha": 1.0},
        {"loss_type": "kto", "desirable_weight": 1.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ],
)
def test_what_has_a_meaning_is_taken(keys: dict[str, Any]) -> None:
    assert PreferenceLossConfig(**keys).problems() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_files": []}, "data.train_files=[]: must name at least one file"),
        ({"max_tokens_per_device": 7}, "data.max_tokens_per_device=7: must be at least max_length=8"),
        ({"truncation": "keep_start"}, "did you mean right?"),
        ({"train_on": "user"}, "must be one of all_assistant, last_assistant"),
        ({"max_length": 1}, "data.max_length=1: must be at least 2"),
    ],
)
def test_offline_data_that_cannot_work(keys: dict[str, Any], message: str) -> None:
    right = {
        "train_files": ["a.jsonl"],
        "val_files": [],
        "train_batch_size": 1,
        "max_length": 8,
        "max_tokens_per_device": 8,
    }
    (problem,) = OfflineDataConfig(**{**right, **keys}).problems("data.")
    assert message in str(problem)
