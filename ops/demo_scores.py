"""Scores of the demo that need no download: does a sample show what its prompt says, by measures that are not learned.

Lives here: descriptors and retrieval among all real pictures (concept@k, exact@k, near-copies), the tone of skin, and
the information gain, as pure functions over arrays and labels. May not live here: models, files of a run, thresholds.

Every score stands beside its ceiling (the tokenizer's own reconstruction of the right picture) and its chance (the
same samples, scored against captions of other concepts). Blind spots: descriptors see layout and colour at 32 × 32,
not fine detail; a set that training shows once can be memorised, so held-out compositions are scored apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ops.openmoji import TONES, DemoPicture, pixels

SIDE_PX = 32
SPREAD_OVER = 500
"""Real pictures over which the two parts of the distance are brought to one scale."""
SHIFT = 11
"""A sample's wrong caption is the one so many places on."""
TIE = 1e-6
"""Distances closer than this are equal: two names of one drawing must not compete by rounding."""


# --- descriptors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descriptors:
    """`colour_NF`: RGB in [0, 1] averaged to 16 × 16 (F = 768). `edges_NF`: F = 512, see `describe`."""

    colour_NF: np.ndarray
    edges_NF: np.ndarray


def reduce(picture_HWC: np.ndarray, side_px: int = SIDE_PX) -> np.ndarray:
    """A square RGB picture (uint8, or float in [0, 1]) at side_px by area, as float32 in [0, 1]."""
    scale = 255.0 if picture_HWC.dtype == np.uint8 else 1.0
    small_HWC: np.ndarray = picture_HWC.astype(np.float32) / scale
    if small_HWC.shape[:2] != (side_px, side_px):
        small_HWC = cv2.resize(small_HWC, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return small_HWC


def describe(pictures: Iterable[np.ndarray]) -> Descriptors:
    """Descriptors of RGB pictures [H, W, 3], reduced to 32 × 32 first.

    Edges are √ of the gradient's magnitude of mean RGB in 8 unsigned orientations, averaged over 8 × 8 cells.
    """
    colour, edges = [], []
    for picture in pictures:
        small_HWC = reduce(picture)
        colour.append(small_HWC.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).ravel())
        edges.append(_edges(small_HWC.mean(axis=2)).ravel())
    return Descriptors(np.array(colour, np.float64), np.array(edges, np.float64))


def _edges(grey_HW: np.ndarray) -> np.ndarray:
    down_HW, right_HW = np.gradient(grey_HW)
    orientation_HW = np.floor(np.arctan2(down_HW, right_HW) % np.pi / (np.pi / 8)).astype(int) % 8
    magnitude_HW8 = np.hypot(down_HW, right_HW)[..., None] * (orientation_HW[..., None] == np.arange(8))
    cells_YXO: np.ndarray = np.sqrt(magnitude_HW8.reshape(8, SIDE_PX // 8, 8, SIDE_PX // 8, 8).mean(axis=(1, 3)))
    return cells_YXO


def squared_distances(a_MF: np.ndarray, b_NF: np.ndarray) -> np.ndarray:
    """|a − b|² for every pair, [M, N], never below 0."""
    squares_MN: np.ndarray = np.square(a_MF).sum(1)[:, None] + np.square(b_NF).sum(1) - 2 * a_MF @ b_NF.T
    np.maximum(squares_MN, 0.0, out=squares_MN)
    return squares_MN


def spread(x_NF: np.ndarray) -> float:
    """Mean |x_i − x_j|² over pairs i ≠ j of at most 500 rows, taken evenly."""
    rows_NF = x_NF[np.linspace(0, len(x_NF) - 1, min(SPREAD_OVER, len(x_NF))).round().astype(int)]
    n = len(rows_NF)
    return float(squared_distances(rows_NF, rows_NF).sum() / (n * (n - 1)))


def distances(samples: Descriptors, real: Descriptors) -> np.ndarray:
    """D = |Δcolour|²/s_c + |Δedges|²/s_h, [M, N]; s is the spread among the real pictures."""
    colour_MN: np.ndarray = squared_distances(samples.colour_NF, real.colour_NF) / spread(real.colour_NF)
    edges_MN: np.ndarray = squared_distances(samples.edges_NF, real.edges_NF) / spread(real.edges_NF)
    total_MN: np.ndarray = colour_MN + edges_MN
    return total_MN


# --- retrieval -------------------------------------------------------------------------------------------------------


def exact_rank(distances_MN: np.ndarray, right_M: np.ndarray) -> np.ndarray:
    """How many real pictures are nearer to each sample than the right one, [M]. exact@k: rank < k."""
    own_M1 = np.take_along_axis(distances_MN, right_M[:, None], axis=1)
    rank_M: np.ndarray = np.count_nonzero(distances_MN < own_M1 - TIE, axis=1)
    return rank_M


def concept_rank(distances_MN: np.ndarray, right_M: Sequence[str], concepts_N: Sequence[str]) -> np.ndarray:
    """How many *distinct* other concepts have a picture nearer than any of the right concept, [M]. concept@k: rank < k.

    Raises ValueError if a right concept is not among the real pictures.
    """
    concepts, label_N = np.unique(np.asarray(concepts_N), return_inverse=True)
    order_N = np.argsort(label_N, kind="stable")
    starts_C = np.searchsorted(label_N[order_N], np.arange(len(concepts)))
    nearest_MC = np.minimum.reduceat(distances_MN[:, order_N], starts_C, axis=1)
    place_M = np.searchsorted(concepts, np.asarray(right_M))
    if (place_M == len(concepts)).any() or (concepts[place_M] != np.asarray(right_M)).any():
        raise ValueError("a right concept is not among the real pictures")
    own_M1 = np.take_along_axis(nearest_MC, place_M[:, None], axis=1)
    rank_M: np.ndarray = np.count_nonzero(nearest_MC < own_M1 - TIE, axis=1)
    return rank_M


def shifted(labels: Sequence[str], shift: int = SHIFT) -> np.ndarray:
    """For each place the place of a wrong label: `shift` on, and further where that one is equal by accident, [M].

    Raises ValueError if all labels are equal.
    """
    n = len(labels)
    if len(set(labels)) < 2:
        raise ValueError("all labels are equal: there is no wrong one")
    steps = (next(s for s in range(shift, shift + n) if labels[(i + s) % n] != labels[i]) for i in range(n))
    return np.array([(i + s) % n for i, s in enumerate(steps)])


def near_copies(distances_MN: np.ndarray, is_trained_N: np.ndarray, radius: float) -> np.ndarray:
    """Which samples lie within `radius` of a training picture, [M] bool.

    A natural radius is the distance that the tokenizer's own reconstructions have to their originals: a sample that
    is so near can't be told from a copy that went through the tokenizer.
    """
    return np.asarray(distances_MN[:, is_trained_N].min(axis=1) <= radius + TIE)


# --- tone ------------------------------------------------------------------------------------------------------------


def tone_of(picture_HWC: np.ndarray, in_tones_THWC: np.ndarray) -> str:
    """Which of the five tones of a person a picture looks most like: the nearest of `in_tones_THWC` (order of TONES).

    Only cells of the 32 × 32 reduction count in which the five differ, that is skin and hair. OpenMoji's skin colours
    are exact, but reading them off the skin fails as soon as black outlines are blurred into it: of true pictures
    blurred by 0.7 px that reading gets 36 % right and this one 95 %.
    """
    differs_HW = in_tones_THWC.std(axis=0).max(axis=2) > 0.02
    error_THW = np.square(in_tones_THWC - reduce(picture_HWC)).sum(axis=3)
    return TONES[int(error_THW[:, differs_HW].mean(axis=1).argmin())]


# --- information -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Information:
    """Image nats per code, teacher-forced, under three captions. Gains are differences to the right caption's."""

    right: float
    shuffled: float
    none: float

    @property
    def gain(self) -> float:
        """What the right caption tells against a wrong one."""
        return self.shuffled - self.right

    @property
    def gain_over_none(self) -> float:
        """What the right caption tells against no caption."""
        return self.none - self.right


def information(right_B: np.ndarray, shuffled_B: np.ndarray, none_B: np.ndarray, codes: int) -> Information:
    """From summed image nats per picture [B] under each caption, and the number of codes of a picture."""
    return Information(*(float(np.mean(nats_B)) / codes for nats_B in (right_B, shuffled_B, none_B)))


# --- the demo's table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """All real pictures, as what the scores need of them.

    `in_tones[(role, gender)]` is the person in the five tones, [5, 32, 32, 3] in the order of TONES.
    """

    pictures: tuple[DemoPicture, ...]
    descriptors: Descriptors
    in_tones: dict[tuple[str, str], np.ndarray]

    @property
    def concepts(self) -> list[str]:
        """The concept of each picture."""
        return [p.concept for p in self.pictures]

    def place_of(self, captions: Sequence[str]) -> np.ndarray:
        """The pictures that have these captions, [M]. Raises KeyError for a caption of no picture."""
        places = {p.caption: n for n, p in enumerate(self.pictures)}
        return np.array([places[caption] for caption in captions])


def gallery(pictures: Sequence[DemoPicture], cache: Path) -> Gallery:
    """Reads all pictures of the cache once (about 4 CPU-seconds for 3,913)."""

    def read(picture: DemoPicture) -> np.ndarray:
        return pixels((cache / picture.file).read_bytes())

    of_parts = {(p.role, p.gender, p.tone): p for p in pictures if p.gender}
    in_tones = {}
    for role, gender in {(p.role, p.gender) for p in pictures if p.gender}:
        toned = [of_parts[role, gender, tone] for tone in TONES if (role, gender, tone) in of_parts]
        if len(toned) == len(TONES):
            in_tones[role, gender] = np.stack([reduce(read(p)) for p in toned])
    return Gallery(tuple(pictures), describe(read(p) for p in pictures), in_tones)


@dataclass(frozen=True)
class Retrieval:
    """Shares of samples, between 0 and 1."""

    concept_at_1: float
    concept_at_5: float
    exact_at_1: float
    exact_at_5: float


def retrieval(distances_MN: np.ndarray, right_M: np.ndarray, concepts_N: Sequence[str]) -> Retrieval:
    """concept@1, @5 and exact@1, @5 of samples whose right pictures are `right_M`."""
    concept_M = concept_rank(distances_MN, [concepts_N[n] for n in right_M], concepts_N)
    exact_M = exact_rank(distances_MN, right_M)
    shares = (np.mean(rank_M < k) for rank_M in (concept_M, exact_M) for k in (1, 5))
    return Retrieval(*(float(share) for share in shares))


@dataclass(frozen=True)
class PromptScores:
    """One group of prompts: the samples, their ceiling and their chance."""

    prompts: int
    samples: Retrieval
    ceiling: Retrieval
    """The reconstructions of the right pictures in the samples' place."""
    shifted: Retrieval
    """The samples against the captions of other concepts."""
    near_copies: float
    """Share of samples no farther from some training picture than 9 of 10 reconstructions are from their original."""


def prompt_scores(
    real: Gallery, captions: Sequence[str], samples: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray]
) -> PromptScores:
    """Scores one sample a caption (RGB uint8 or float in [0, 1]) beside the reconstruction of the caption's picture."""
    right_M = real.place_of(captions)
    sample_MN = distances(describe(samples), real.descriptors)
    reconstruction_MN = distances(describe(reconstructions), real.descriptors)
    radius = float(np.quantile(np.take_along_axis(reconstruction_MN, right_M[:, None], axis=1), 0.9))
    is_trained_N = np.array([p.split == "train" for p in real.pictures])
    wrong_M = right_M[shifted([real.concepts[n] for n in right_M])]
    return PromptScores(
        prompts=len(captions),
        samples=retrieval(sample_MN, right_M, real.concepts),
        ceiling=retrieval(reconstruction_MN, right_M, real.concepts),
        shifted=retrieval(sample_MN, wrong_M, real.concepts),
        near_copies=float(near_copies(sample_MN, is_trained_N, radius).mean()),
    )


def tone_score(real: Gallery, captions: Sequence[str], pictures: Sequence[np.ndarray]) -> float:
    """Share of pictures that show the caption's tone, among captions of one person with one of the five tones.

    Chance is 1 in 5. Not a number (nan) where no caption has a tone.
    """
    hits = []
    for n, picture in zip(real.place_of(captions), pictures, strict=True):
        wanted = real.pictures[n]
        in_tones_THWC = real.in_tones.get((wanted.role, wanted.gender))
        if wanted.tone in TONES and in_tones_THWC is not None:
            hits.append(tone_of(picture, in_tones_THWC) == wanted.tone)
    return float(np.mean(hits)) if hits else float("nan")


def samples_summary(held_out: PromptScores, trained: PromptScores, tone: dict[str, float]) -> dict[str, object]:
    """The `samples` part of summary.json. `tone` holds generated, reconstructed and true; chance is added.

    `shifted_captions` is the higher of the two groups' and `ceiling` the lower: the honest ends of the scale.
    """
    return {
        "concept_at_5": {
            "held_out": held_out.samples.concept_at_5,
            "trained": trained.samples.concept_at_5,
            "shifted_captions": max(held_out.shifted.concept_at_5, trained.shifted.concept_at_5),
            "ceiling": min(held_out.ceiling.concept_at_5, trained.ceiling.concept_at_5),
        },
        "exact_at_1_trained": trained.samples.exact_at_1,
        "near_copies": {"held_out": held_out.near_copies, "trained": trained.near_copies},
        "tone": {**tone, "chance": 1 / len(TONES)},
    }
