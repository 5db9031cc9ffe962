"""Marks: what is good and bad in the numbers of a training, and what to do about it. Metrics rows in, sentences out.

Every mark is computed from metrics that the training wrote (ops/trained.py `read_metrics`) and the settings that its
recipe holds. A threshold stands beside its reason. May not live here: reading files, drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Kind = Literal["good", "note", "bad"]
Row = Mapping[str, Any]
Points = list[tuple[float, float]]

RISE_SHARE = 0.03
"""A held-out number that ends this share worse than its best is no noise: each evaluation is of the same pictures."""
COLLAPSE = 0.1
"""A perplexity below this share of its peak, or a codebook of which less is in use, is a collapse."""
CODES_A_WORD = 4.0
"""Fewer codes than this for each of the codebook can't show that it lies idle."""
GAIN_SHARE = 0.01
"""A caption that saves less than this share of a picture's nats tells it nothing."""
GAP_NATS = 0.1
"""Hard codes may differ from relaxed ones by so many nats a dimension (the demo's gate as well)."""
SPIKE = 10.0
"""A jump of so many robust deviations; the noise of sound runs reaches 7.4 (220 rows, DIARY.md)."""
SPIKE_RANGE = 0.1
"""… and of this share of the range that the loss went through."""
CLIPPED_SHARE = 0.8
"""Clipping now and then is what a clip is for."""
WAITED_SHARE = 0.2
"""More is time that a better supply of data would give back."""
STILL_SHARE = 0.01
"""An evaluation that is better by this share than the one before says that more updates would help."""
FALLING = {"image_nats_per_code", "text_nats_per_token", "bits_per_dim"}
RISING = {"psnr_db", "perplexity", "used_fraction", "information_gain_nats_per_code"}


@dataclass(frozen=True)
class Mark:
    """One observation. `chart` is the metric it belongs to; `step` and `value` are its place there, if it has one.

    `settings` are `--set` lines worth trying.
    """

    chart: str
    kind: Kind
    text: str
    advice: str = ""
    step: float | None = None
    value: float | None = None
    settings: tuple[str, ...] = ()


def marks_of(
    rows: Sequence[Row], section: str, training: Mapping[str, Any], codes_a_word: float = math.inf
) -> list[Mark]:
    """The marks of a training, what is bad first. `section` is the name of its settings (`transformer_training`),
    `training` holds their values; `codes_a_word` is the codes of a picture over those of the codebook.
    """
    found = [
        *_over_fitting(rows, section, training),
        *_collapse(rows, codes_a_word),
        *_caption(rows),
        *_hard_and_relaxed(rows),
        *_spikes(rows, section, training),
        *_clipped(rows, section, training),
        *_waiting(rows),
        *_bests(rows),
    ]
    order: list[Kind] = ["bad", "note", "good"]
    return sorted(found, key=lambda mark: order.index(mark.kind))


def series(rows: Sequence[Row], name: str, kind: str, part: str = "right") -> Points:
    """(step, value) of one number in rows of `kind`; of a table of numbers, its `part`. Only finite ones."""
    points = []
    for row in rows:
        value = row.get(name) if row["kind"] == kind else None
        if isinstance(value, dict):
            value = value.get(part)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(row["step"]), float(value)))
    return points


def evaluated_on(rows: Sequence[Row]) -> str:
    """What the last evaluation looked at: "held_out" or "train"; "" without one."""
    return next((str(row.get("on", "")) for row in reversed(rows) if row["kind"] == "evaluation"), "")


def _over_fitting(rows: Sequence[Row], section: str, training: Mapping[str, Any]) -> Iterator[Mark]:
    for name, learned, unit in (
        ("image_nats_per_code", "image_nats_per_code", "nats a code"),
        ("bits_per_dim", "nats_per_dim", "bits a dimension"),
    ):
        measured = [point for point in series(rows, name, "evaluation") if point[0] > 0]
        trained = series(rows, learned, "train")
        if len(measured) < 2 or not trained:
            continue
        if evaluated_on(rows) != "held_out":
            why = "The evaluation is on training pictures, so over-fitting can't be seen."
            yield Mark(name, "note", why, "More pairs, or a larger plan.held_out, set pictures aside.")
            continue
        best_step, best = min(measured, key=lambda point: point[1])
        step, last = measured[-1]
        if last <= best + RISE_SHARE * abs(best) or not _mean_near(trained, step) < _mean_near(trained, best_step):
            continue
        text = (
            f"Over-fitting from {best_step:,.0f} updates on: held-out {unit} rise from {best:.3g} to {last:.3g} while "
            "training's fall."
        )
        advice = (
            f"The model learns its pictures by heart. More pairs help most; else stop near {best_step:,.0f} updates, "
            f"or raise {section}.weight_decay."
        )
        gains = series(rows, "information_gain_nats_per_code", "evaluation")
        if name == "image_nats_per_code" and gains and gains[-1][1] > dict(gains).get(best_step, math.inf):
            advice += " What the captions tell still rises, though: judge by the samples."
        decay = float(training.get("weight_decay") or 0.01)
        lines = (f"{section}.steps={best_step:.0f}", f"{section}.weight_decay={2 * decay:.2g}")
        yield Mark(name, "bad", text, advice, best_step, best, lines)


def _mean_near(points: Points, step: float) -> float:
    """Mean of the eighth of a training that ends at `step`."""
    reach = max(points[-1][0] / 8, 1.0)
    near = [y for x, y in points if step - reach < x <= step]
    return sum(near) / len(near) if near else math.inf


def _collapse(rows: Sequence[Row], codes_a_word: float) -> Iterator[Mark]:
    perplexity = series(rows, "perplexity", "evaluation")
    used = series(rows, "used_fraction", "evaluation")
    advice = (
        "Pictures are told apart by few codes, and the transformer can't bring back what they lose. Raise dvae.usage, "
        "or lower dvae.beta or the learning rate."
    )
    lines = ("dvae.usage=0.1",)
    if perplexity:
        peak_step, peak = max(perplexity, key=lambda point: point[1])
        low_step, low = min((point for point in perplexity if point[0] >= peak_step), key=lambda point: point[1])
        step, last = perplexity[-1]
        has_come_back = last >= 2 * COLLAPSE * peak
        if last < COLLAPSE * peak or (low < COLLAPSE * peak and not has_come_back):
            text = f"The codes collapsed: their perplexity fell from {peak:.3g} to {last:.3g}."
            yield Mark("perplexity", "bad", text, advice, step, last, lines)
        elif low < COLLAPSE * peak:
            text = f"The codes nearly collapsed (perplexity {low:.3g}) and came back to {last:.3g}."
            yield Mark("perplexity", "note", text, "A little more dvae.usage makes this safer.", low_step, low)
    if used:
        step, last = used[-1]
        seen = next(row["pictures"] for row in reversed(rows) if row["kind"] == "evaluation" and "used_fraction" in row)
        if last < COLLAPSE and seen * codes_a_word >= CODES_A_WORD:
            text = f"Only {last:.1%} of the codebook is in use."
            yield Mark("used_fraction", "bad", text, advice, step, last, lines)
        elif last >= 0.5:
            yield Mark("used_fraction", "good", f"{last:.0%} of the codebook is in use.", "", step, last)


def _caption(rows: Sequence[Row]) -> Iterator[Mark]:
    gains = [point for point in series(rows, "information_gain_nats_per_code", "evaluation") if point[0] > 0]
    nats = series(rows, "image_nats_per_code", "evaluation")
    if not gains or not nats:
        return
    step, gain = gains[-1]
    share = gain / nats[-1][1] if nats[-1][1] > 0 else 0.0
    name = "information_gain_nats_per_code"
    if share < GAIN_SHARE:
        text = f"The captions tell it nothing: the right one saves {gain:.2g} nats a code."
        advice = (
            "It is early, the captions do not describe the pictures, or words are cut into too many tokens: train "
            "longer, look at the captions below, lower transformer.bpe_dropout."
        )
        yield Mark(name, "bad", text, advice, step, gain, ("transformer.bpe_dropout=0.0",))
    else:
        text = f"The captions are used: the right one saves {gain:.3g} nats a code against a wrong one."
        yield Mark(name, "good", text, "", step, gain)


def _hard_and_relaxed(rows: Sequence[Row]) -> Iterator[Mark]:
    name = "hard_minus_relaxed_nats_per_dim"
    gaps = [point for point in series(rows, name, "evaluation") if point[0] > 0]
    if not gaps:
        return
    step, gap = gaps[-1]
    if abs(gap) > GAP_NATS:
        text = f"Hard codes are {gap:.2g} nats a dimension off the relaxed ones it trained with."
        advice = "The transformer only gets hard codes: let tau fall further, or sooner (dvae.tau_end, dvae.tau_steps)."
        yield Mark(name, "bad", text, advice, step, gap, ("dvae.tau_end=0.0625",))
    else:
        yield Mark(name, "good", "Hard codes are as good as the relaxed ones it trained with.", "", step, gap)


def _spikes(rows: Sequence[Row], section: str, training: Mapping[str, Any]) -> Iterator[Mark]:
    found = spikes(series(rows, "loss", "train"))
    if not found:
        return
    step, value = max(found, key=lambda point: point[1])
    many = f"{len(found)} times, most" if len(found) > 1 else "once,"
    rate, clip = float(training.get("learning_rate") or 0.0), training.get("clip") or 0.0
    lines = [f"{section}.learning_rate={rate / 2:.2g}"] if rate else []
    if not clip:
        lines.append(f"{section}.clip=1.0")
    advice = f"A lower learning rate, a longer warm-up{' or a clipped gradient' if not clip else ''} keeps it calm."
    yield Mark("loss", "bad", f"The loss jumps {many} after {step:,.0f} updates.", advice, step, value, tuple(lines))


def spikes(losses: Points) -> Points:
    """The highest point of each jump of the training loss over the medians around it, the first tenth left out."""
    if len(losses) < 20:
        return []
    values = [y for _, y in losses]
    around = [median(values[max(0, i - 5) : i + 6]) for i in range(len(values))]
    above = [value - middle for value, middle in zip(values, around, strict=True)]
    first = len(values) // 10
    deviation = 1.4826 * median(abs(part) for part in above[first:])
    ordered = sorted(values[first:])
    reached = ordered[int(0.95 * (len(ordered) - 1))] - ordered[int(0.05 * (len(ordered) - 1))]
    bound = max(SPIKE * deviation, SPIKE_RANGE * reached, 1e-9)
    found: list[int] = []
    for place in range(first, len(values)):
        before = values[max(0, place - 5) : place]  # a steep beginning lies above the median too, but does not rise
        if above[place] <= bound or values[place] - min(before) <= bound:
            continue
        if found and place - found[-1] <= 5:
            found[-1] = max(found[-1], place, key=lambda at: above[at])
        else:
            found.append(place)
    return [losses[place] for place in found]


def _clipped(rows: Sequence[Row], section: str, training: Mapping[str, Any]) -> Iterator[Mark]:
    norms, clip = series(rows, "gradient_norm", "train"), float(training.get("clip") or 0.0)
    if not clip or len(norms) < 10:
        return
    share = sum(norm > clip for _, norm in norms) / len(norms)
    if share >= CLIPPED_SHARE:
        text = f"The gradient is clipped nearly always ({share:.0%} of the time its norm is above {clip:.3g})."
        usual = median(norm for _, norm in norms)
        advice = f"So the clip sets the size of the steps, not the learning rate. The usual norm is {usual:.2g}."
        lines = (f"{section}.clip={2 * usual:.2g}",)
        yield Mark("gradient_norm", "note", text, advice, norms[-1][0], clip, lines)


def _waiting(rows: Sequence[Row]) -> Iterator[Mark]:
    shares = series(rows, "waited_share", "train")
    if not shares:
        return
    mean = sum(share for _, share in shares) / len(shares)
    if mean > WAITED_SHARE:
        advice = (
            "The data comes too slowly: give the worker more CPUs, store smaller pictures (picture.short_side_px), or "
            "train nearer to the data."
        )
        yield Mark("waited_share", "bad", f"{mean:.0%} of the time it waited for data.", advice, shares[-1][0], mean)


def _bests(rows: Sequence[Row]) -> Iterator[Mark]:
    """Where each number of the evaluations was best, and whether the last one still was better than the one before."""
    over_fitted = {mark.chart for mark in _over_fitting(rows, "", {}) if mark.kind == "bad"}
    unused = {mark.chart for mark in _caption(rows) if mark.kind == "bad"}
    for name in sorted((RISING | FALLING) - {"used_fraction", "perplexity"} - over_fitted - unused):
        points = [point for point in series(rows, name, "evaluation") if point[0] > 0]
        if len(points) < 2:
            continue
        best_step, best = (max if name in RISING else min)(points, key=lambda point: point[1])
        (_, before), (step, last) = points[-2:]
        better = (last - before) if name in RISING else (before - last)
        if best_step == step and better > STILL_SHARE * abs(before):
            text = f"Still getting better at the end: {before:.3g}, then {last:.3g}."
            text += "" if over_fitted else " More updates would help."
            yield Mark(name, "good", text, "", step, last)
        elif best_step == step:
            yield Mark(name, "good", f"Best at the end: {last:.3g}.", "", step, last)
        else:
            worse = f"Best after {best_step:,.0f} updates ({best:.3g}); {last:.3g} at the end."
            yield Mark(name, "note", worse, "", best_step, best)
