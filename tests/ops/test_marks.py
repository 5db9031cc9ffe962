"""Marks: each is made where its series has the trouble, and not where it has not; and what real trainings get."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from infra.store import LocalStore
from ops.marks import marks_of, spikes
from ops.recipes import read_json
from ops.trained import read_metrics

TRAINING = {"clip": 4.0, "learning_rate": 1e-3, "weight_decay": 0.01}


def trained(steps: int = 1000, **numbers: Any) -> list[dict[str, Any]]:
    """A row each ten updates; a number is a value or a function of the share of the training that is done."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(10, steps + 1, 10):
        row = {"loss": lambda x: 4 * math.exp(-3 * x), "gradient_norm": 1.0, "waited_share": 0.01} | numbers
        values = {name: value(step / steps) if callable(value) else value for name, value in row.items()}
        rows.append({"kind": "train", "step": step, **values, "loss": values["loss"] + 0.02 * rng.normal()})
    return rows


def evaluated(name: str, values: list[Any], on: str = "held_out", steps: int = 1000) -> list[dict[str, Any]]:
    """An evaluation before the training and then at equal distances, with this number."""
    every = steps // (len(values) - 1)
    return [
        {"kind": "evaluation", "step": place * every, "on": on, "pictures": 100, name: value}
        for place, value in enumerate(values)
    ]


def found(rows: list[dict[str, Any]], chart: str, kind: str, training: Any = TRAINING, **more: Any) -> list[str]:
    marks = marks_of(rows, "transformer_training", training, **more)
    return [mark.text for mark in marks if mark.chart == chart and mark.kind == kind]


def nats(values: list[float]) -> list[dict[str, Any]]:
    return evaluated("image_nats_per_code", [{"right": value, "shuffled": value + 1} for value in values])


def falling(x: float) -> float:
    return 4 - 3 * x


def test_held_out_that_rises_while_training_falls_is_over_fitting_from_its_best_step_on():
    rows = trained(image_nats_per_code=falling) + nats([5.0, 3.0, 2.0, 2.3, 2.6])
    (mark,) = [m for m in marks_of(rows, "transformer_training", TRAINING) if m.text.startswith("Over-fitting")]
    assert (mark.kind, mark.chart, mark.step, mark.value) == ("bad", "image_nats_per_code", 500, 2.0)
    assert "2 to 2.6" in mark.text
    assert mark.settings == ("transformer_training.steps=500", "transformer_training.weight_decay=0.02")


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        ([5.0, 3.0, 2.5, 2.2, 2.1], falling),
        ([5.0, 3.0, 2.0, 2.01, 2.02], falling),  # 1 % is no rise
        ([5.0, 3.0, 2.0, 2.3, 2.6], lambda x: 2 + x),  # training rises too: something else is wrong
    ],
)
def test_what_does_not_rise_or_rises_with_training_is_no_over_fitting(held_out, training):
    rows = trained(image_nats_per_code=training) + nats(held_out)
    assert not found(rows, "image_nats_per_code", "bad")


def test_over_fitting_of_a_tokenizer_is_seen_in_its_bits():
    rows = trained(nats_per_dim=lambda x: 1 - x) + evaluated("bits_per_dim", [6.0, 4.0, 4.5])
    assert found(rows, "bits_per_dim", "bad")


def test_without_held_out_pictures_over_fitting_is_said_to_be_unseen():
    rows = trained(nats_per_dim=lambda x: 1 - x) + evaluated("bits_per_dim", [6.0, 4.0, 4.5], on="train")
    assert not found(rows, "bits_per_dim", "bad")
    assert "can't be seen" in found(rows, "bits_per_dim", "note")[0]


@pytest.mark.parametrize(
    ("values", "bad", "note"),
    [([90, 120, 60, 8], 1, 0), ([90, 120, 8, 60], 0, 1), ([133, 18.9, 36, 47], 0, 0), ([90, 27, 1, 3], 1, 0)],
)
def test_a_perplexity_below_a_tenth_of_its_peak_is_a_collapse(values, bad, note):
    rows = trained() + evaluated("perplexity", values)
    assert len(found(rows, "perplexity", "bad")) == bad
    assert len(found(rows, "perplexity", "note")) == note


def test_a_codebook_that_lies_idle_is_bad_unless_few_codes_were_looked_at():
    rows = trained() + evaluated("used_fraction", [0.9, 0.05, 0.04])
    assert found(rows, "used_fraction", "bad", codes_a_word=1.0) == ["Only 4.0% of the codebook is in use."]
    assert not found(rows, "used_fraction", "bad", codes_a_word=0.01)
    assert not found(trained() + evaluated("used_fraction", [0.9, 0.5]), "used_fraction", "bad")


@pytest.mark.parametrize(("gain", "kind"), [(0.0, "bad"), (-0.1, "bad"), (0.01, "bad"), (0.3, "good")])
def test_a_caption_that_saves_nothing_is_bad(gain, kind):
    name = "information_gain_nats_per_code"
    rows = [row | {name: gain if row["step"] else 0.0} for row in nats([5.0, 2.0, 1.9])]
    told = [text for text in found(rows, name, kind) if "aptions" in text]
    assert len(told) == 1
    assert ("tell it nothing" in told[0]) == (kind == "bad")


@pytest.mark.parametrize(("gap", "kind"), [(0.3, "bad"), (-0.3, "bad"), (0.02, "good")])
def test_hard_codes_that_differ_from_relaxed_ones_are_bad(gap, kind):
    name = "hard_minus_relaxed_nats_per_dim"
    assert len(found(evaluated(name, [0.5, gap]), name, kind)) == 1


def test_a_loss_that_jumps_is_marked_at_its_highest_point():
    rows = trained()
    for place, value in ((50, 3.0), (51, 4.0), (80, 2.0)):
        rows[place]["loss"] = value
    (mark,) = [m for m in marks_of(rows, "transformer_training", TRAINING) if m.chart == "loss"]
    assert (mark.kind, mark.step, mark.value) == ("bad", 520, 4.0)
    assert "2 times" in mark.text


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_fast_beginning_are_no_jumps(seed):
    noise = np.random.default_rng(seed).normal(size=300)
    assert spikes([(float(i), 6 * math.exp(-i / 2) + 1 + 0.001 * noise[i]) for i in range(28)]) == []
    assert spikes([(float(i), 6 * math.exp(-i / 5) + 1 + 0.1 * noise[i]) for i in range(300)]) == []


@pytest.mark.parametrize(("norm", "clip", "marked"), [(8.0, 4.0, 1), (2.0, 4.0, 0), (8.0, 0.0, 0)])
def test_a_gradient_that_is_clipped_nearly_always_is_told(norm, clip, marked):
    rows = trained(gradient_norm=norm)
    assert len(found(rows, "gradient_norm", "note", TRAINING | {"clip": clip})) == marked


@pytest.mark.parametrize(("share", "marked"), [(0.5, 1), (0.1, 0)])
def test_waiting_for_data_is_bad_from_a_fifth_of_the_time_on(share, marked):
    assert len(found(trained(waited_share=share), "waited_share", "bad")) == marked


def test_the_last_value_is_held_against_the_best():
    (note,) = found(evaluated("psnr_db", [6.0, 18.0, 17.0]), "psnr_db", "note")
    assert note == "Best after 500 updates (18); 17 at the end."
    (good,) = found(evaluated("psnr_db", [6.0, 17.0, 18.0]), "psnr_db", "good")
    assert "More updates would help" in good
    assert found(evaluated("psnr_db", [6.0, 18.0, 18.05]), "psnr_db", "good") == ["Best at the end: 18.1."]


@pytest.mark.parametrize("rows", [[], trained(10), evaluated("psnr_db", [1.0, None]), [{"kind": "train", "step": 3}]])
def test_few_numbers_or_none_give_no_false_alarm(rows):
    assert [mark for mark in marks_of(rows, "tokenizer_training", {}) if mark.kind == "bad"] == []


@pytest.mark.parametrize(("name", "section"), [("tokenizer", "tokenizer_training"), ("model", "transformer_training")])
def test_a_real_training_is_marked_by_its_own_numbers(learned, name, section):
    store = LocalStore(getattr(learned, name))
    rows, training = read_metrics(store), read_json(store, "recipe.json")["identity"][section]
    marks = marks_of(rows, section, training, codes_a_word=0.5)
    assert marks
    for mark in marks:
        if mark.step is not None and mark.kind != "note":
            steps = {row["step"] for row in rows}
            assert mark.step in steps
    assert not [mark for mark in marks if mark.chart in ("loss", "waited_share") and mark.kind == "bad"]
