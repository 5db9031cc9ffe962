"""What the demo reached: scores of a finished demo run, its sheet, and the gates they are held against.

Reads the stages of the run as anybody would, from receipts and checkpoints. May not live here: the scores' definitions
(ops/demo_scores.py), the order of the demo (pipelines/demo.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.store import open_store
from models.dvae import Dvae, evaluate_batch, perplexity_and_used, psnr_db
from models.sampling import SampleSettings, sample
from models.text import CaptionTokenizer
from models.transformer import Transformer
from ops.demo_scores import Gallery, information, prompt_scores, samples_summary, shifted, tone_score
from ops.generate import SAMPLE_BATCH
from ops.openmoji import LICENCE, DemoPicture
from ops.pictures import decode_stored, tokenizer_crop
from ops.reader import Row, codes_reader, pictures_reader
from ops.seeds import derived_seed
from ops.sheets import Cell, draw_sheet, to_pixels
from ops.snapshot import HELD_OUT, TRAIN, read_snapshot, take_snapshot
from ops.trained import load_tokenizer, load_transformer

SAMPLES_HELD_OUT = 4
"""Pictures drawn of each held-out composition: 84 alone would make a score that varies by five points."""
SHOWN = (
    "the flag of Japan",
    "the flag of France",
    "the flag of Germany",
    "red apple",
    "blue heart",
    "grinning face",
    "crying face",
    "pizza",
    "banana",
    "sunflower",
    "black cat",
    "firefighter, medium-dark skin tone",
)
"""Trained prompts on the sheet: what a reader can judge at a glance."""


@dataclass(frozen=True)
class Gate:
    """A bound that a figure of the summary must keep. `path` leads to it."""

    path: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, summary: dict[str, Any]) -> bool:
        """Whether the figure keeps the bound; one that is no number does not."""
        value = self.value(summary)
        if not math.isfinite(value):
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def value(self, summary: dict[str, Any]) -> float:
        """The figure."""
        found: Any = summary
        for name in self.path:
            found = found[name]
        return float(found)

    def __str__(self) -> str:
        bound = f">= {self.at_least}" if self.at_least is not None else f"<= {self.at_most}"
        return f"{'.'.join(self.path)} {bound}"


GATES = (
    Gate(("tokenizer", "psnr_db"), at_least=17.0),
    Gate(("tokenizer", "bits_per_dim"), at_most=4.6),
    Gate(("tokenizer", "perplexity"), at_least=25.0),
    Gate(("tokenizer", "hard_minus_relaxed_nats_per_dim"), at_least=-0.10),
    Gate(("tokenizer", "hard_minus_relaxed_nats_per_dim"), at_most=0.10),
    Gate(("samples", "concept_at_5", "ceiling"), at_least=0.9),
    Gate(("transformer", "information_gain_nats_per_code"), at_least=1.0),
    Gate(("transformer", "none_minus_right_nats_per_code"), at_least=0.3),
    Gate(("samples", "concept_at_5", "held_out"), at_least=0.70),
    Gate(("samples", "concept_at_5", "trained"), at_least=0.60),
    # Held-out compositions are all people, who look alike: their chance is reported, and no gate (DIARY.md).
    Gate(("retrieval", "trained", "shifted", "concept_at_5"), at_most=0.10),
    Gate(("seconds", "training_cpu"), at_most=450.0),
    Gate(("seconds", "sampling_cpu_a_picture"), at_most=0.02),
)


@dataclass(frozen=True)
class Scored:
    """The learned parts of summary.json, and the sheet that goes beside them."""

    tokenizer: dict[str, Any]
    transformer: dict[str, Any]
    samples: dict[str, Any]
    retrieval: dict[str, Any]
    """All of what `samples` is the digest of, for held-out and for trained prompts."""
    sheet: bytes
    sampling_cpu_a_picture: float


def score_demo(
    pairs: str, tokens: str, model: str, real: Gallery, sampling: SampleSettings, seed: int, threads: int = 1
) -> Scored:
    """Scores the models on pictures and prompts that training saw and did not see."""
    torch.set_num_threads(threads)
    transformer, captions, _, _ = load_transformer(model)
    dvae, codes_of = load_tokenizer(model)  # the frozen one that made the codes
    by_caption = {picture.caption: picture for picture in real.pictures}
    token_rows = _token_rows(tokens, model, codes_of)
    compositions = [row for row in token_rows[HELD_OUT] if by_caption[row.caption].held == "composition"]
    scored = {"held_out": compositions * SAMPLES_HELD_OUT, "trained": token_rows[TRAIN]}
    started = time.process_time()
    drawn = {
        name: _draw(transformer, captions, dvae, [row.caption for row in rows], sampling, seed)
        for name, rows in scored.items()
    }
    sampling_cpu = (time.process_time() - started) / sum(map(len, scored.values()))
    rebuilt = {name: _rebuilt(dvae, rows) for name, rows in scored.items()}
    names = {name: [row.caption for row in rows] for name, rows in scored.items()}
    scores = {name: prompt_scores(real, names[name], drawn[name], rebuilt[name]) for name in names}
    true = _true_pictures(pairs, dvae.image_size)
    tone = {
        "generated": tone_score(real, names["held_out"], drawn["held_out"]),
        "reconstructed": tone_score(real, names["held_out"], rebuilt["held_out"]),
        "true": tone_score(real, names["held_out"], [true[caption] for caption in names["held_out"]]),
    }
    return Scored(
        tokenizer=_tokenizer_scores(dvae, [p for p in real.pictures if p.held == "concept"], true, seed),
        transformer=_transformer_scores(transformer, captions, compositions, real),
        samples=samples_summary(scores["held_out"], scores["trained"], tone),
        retrieval={name: asdict(found) for name, found in scores.items()},
        sheet=_sheet(transformer, captions, dvae, token_rows[TRAIN], compositions, true, sampling, seed),
        sampling_cpu_a_picture=sampling_cpu,
    )


def _token_rows(tokens: str, model: str, tokenizer: str) -> dict[str, list[Row[Any]]]:
    """What the transformer was trained on, and the held-out pairs of the same selection."""
    reader = codes_reader(open_store(tokens), read_snapshot(open_store(model)), 0, tokenizer)
    everything = 1 << 31
    return {TRAIN: list(reader.in_file_order(TRAIN, everything)), HELD_OUT: list(reader.held_out(everything))}


def _true_pictures(pairs: str, size_px: int) -> dict[str, np.ndarray]:
    """Caption -> stored picture at the models' size."""
    reader = pictures_reader(open_store(pairs), take_snapshot(open_store(pairs), "pictures", {}), 0)
    everything = 1 << 31
    rows = [*reader.in_file_order(TRAIN, everything), *reader.held_out(everything)]
    rng = np.random.default_rng(0)  # a central square draws nothing from it
    return {
        row.caption: tokenizer_crop(decode_stored(row.payload), size_px, rng, crop=False, flip=False) for row in rows
    }


def _by_hash(rows: Sequence[Row[Any]], seed: int) -> list[Row[Any]]:
    return sorted(rows, key=lambda row: derived_seed("demo-prompt", seed, row.uid))


def _codes(rows: Sequence[Row[Any]]) -> Tensor:
    return torch.from_numpy(np.stack([row.payload for row in rows]).astype(np.int64))


def _rebuilt(dvae: Dvae, rows: Sequence[Row[Any]]) -> list[np.ndarray]:
    return list(to_pixels(dvae.decode(_codes(rows))))


def _draw(
    transformer: Transformer,
    captions: CaptionTokenizer,
    dvae: Dvae,
    prompts: Sequence[str],
    sampling: SampleSettings,
    seed: int,
) -> list[np.ndarray]:
    drawn = []
    for first in range(0, len(prompts), SAMPLE_BATCH):
        some = range(first, min(first + SAMPLE_BATCH, len(prompts)))
        text_BT = captions.encode([prompts[number] for number in some], transformer.settings.text_positions)
        seeds = [derived_seed("demo-sample", seed, number) for number in some]
        drawn += list(to_pixels(dvae.decode(sample(transformer, text_BT, sampling, seeds))))
    return drawn


def _tokenizer_scores(
    dvae: Dvae, pictures: Sequence[DemoPicture], true: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Measured on concepts that training never showed."""
    pixels_BHWC = np.stack([true[picture.caption] for picture in pictures])
    images_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().div_(255.0)
    seeds = [derived_seed("demo-relaxed", seed, number) for number in range(len(pictures))]
    measured = evaluate_batch(dvae, images_BCHW, dvae.settings.tau_end, seeds)
    perplexity, used = perplexity_and_used(measured.codes_BN, dvae.vocabulary)
    gap_B = measured.hard_nats_per_dim_B - measured.relaxed_nats_per_dim_B
    return {
        "pictures": len(pictures),
        "psnr_db": float(psnr_db(measured.mse_B).mean()),
        "bits_per_dim": float(measured.hard_bits_per_dim_B.mean()),
        "perplexity": perplexity,
        "used_fraction": used,
        "hard_minus_relaxed_nats_per_dim": float(gap_B.mean()),
    }


@torch.no_grad()
def _transformer_scores(
    transformer: Transformer, captions: CaptionTokenizer, rows: Sequence[Row[Any]], real: Gallery
) -> dict[str, Any]:
    """Image nats a code of held-out compositions under the right, a wrong and no caption, teacher-forced."""
    right = [row.caption for row in rows]
    concepts = [real.pictures[place].concept for place in real.place_of(right)]
    wrong = [right[place] for place in shifted(concepts)]
    codes_BN = _codes(rows)
    positions = transformer.settings.text_positions
    right_B, wrong_B, none_B = (
        transformer.loss(captions.encode(texts, positions), codes_BN).image_nats_B.double().numpy()
        for texts in (right, wrong, [""] * len(right))
    )
    found = information(right_B, wrong_B, none_B, codes_BN.shape[1])
    return {
        "compositions": len(rows),
        "image_nats_per_code": asdict(found),
        "information_gain_nats_per_code": found.gain,
        "none_minus_right_nats_per_code": found.gain_over_none,
    }


def _sheet(
    transformer: Transformer,
    captions: CaptionTokenizer,
    dvae: Dvae,
    trained: Sequence[Row[Any]],
    compositions: Sequence[Row[Any]],
    true: dict[str, np.ndarray],
    sampling: SampleSettings,
    seed: int,
) -> bytes:
    """Two blocks of three rows: the real picture, what is left of it in codes, and what the prompt alone gives."""
    by_caption = {row.caption: row for row in trained}
    shown = [by_caption[caption] for caption in SHOWN if caption in by_caption]
    shown += [row for row in _by_hash(trained, seed) if row.caption not in SHOWN][: len(SHOWN) - len(shown)]
    rows = []
    for name, block in (("", shown), ("never seen: ", _by_hash(compositions, seed)[: len(SHOWN)])):
        prompts = [row.caption for row in block]
        rows.append([Cell(true[prompt]) for prompt in prompts])
        rows.append([Cell(pixels) for pixels in _rebuilt(dvae, block)])
        drawn = _draw(transformer, captions, dvae, prompts, sampling, seed)
        rows.append([Cell(pixels, name + prompt) for pixels, prompt in zip(drawn, prompts, strict=True)])
    title = f"real / from its codes / drawn from the prompt. {LICENCE}"
    return draw_sheet(rows, title)
