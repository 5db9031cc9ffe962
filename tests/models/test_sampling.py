"""Sampling: the cache is the full forward pass, draws have their probabilities, a picture is its own seed's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.sampling import SampleSettings, draw, sample
from models.text import empty_caption
from models.transformer import Cache, Transformer
from tests.models.test_transformer import batch, build

LAYERS = [("dense", 2), ("paper", 1), ("paper", 2), ("paper", 3), ("paper", 7)]  # conv; row, conv; row, column, conv; …
GREEDY = SampleSettings(temperature=0.0)


@pytest.mark.parametrize(("attention", "layers"), LAYERS)
def test_cached_logits_are_those_of_the_full_forward_pass(attention, layers):
    model = build(attention=attention, layers=layers)
    text, codes = batch(model)
    with torch.no_grad():
        full_BNV = model.image_logits(text, codes)
        cache = Cache(model, 3)
        cached = [model.prefill(text, cache), *(model.step(codes[:, n], n, cache) for n in range(15))]
    assert full_BNV.std() > 0.5  # there is something to be equal to
    assert torch.allclose(torch.stack(cached, dim=1), full_BNV, atol=1e-4)


@pytest.mark.parametrize(("attention", "layers"), LAYERS)
def test_the_most_probable_picture_is_the_one_a_full_forward_pass_finds(attention, layers):
    model = build(attention=attention, layers=layers)
    text, _ = batch(model)
    codes = torch.zeros(3, 16, dtype=torch.int64)
    with torch.no_grad():
        for n in range(16):
            codes[:, n] = model.image_logits(text, codes)[:, n].argmax(dim=1)
    assert torch.equal(sample(model, text, GREEDY, [0, 1, 2]), codes)


def test_under_autocast_the_cache_has_its_precision_and_the_picture_is_the_full_forward_pass_s():
    model = build(layers=7)
    text, codes = batch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = Cache(model, 3)
        assert {layer.dtype for layer in cache.layers} == {torch.bfloat16}
        cached = [model.prefill(text, cache), *(model.step(codes[:, n], n, cache) for n in range(15))]
        full_BNV = model.image_logits(text, codes)
        drawn = sample(model, text, SampleSettings(guidance=0.5), [0, 1, 2])
    assert torch.allclose(torch.stack(cached, dim=1).float(), full_BNV.float(), atol=0.25)  # 8 bits of logits up to 10
    assert drawn.shape == (3, 16)
    assert Cache(model, 3).layers[0].dtype == torch.float32


def test_guidance_moves_away_from_the_prediction_without_a_caption():
    model = build()
    text, _ = batch(model)
    empty = empty_caption(7).expand(3, 7)
    codes = torch.zeros(3, 16, dtype=torch.int64)
    with torch.no_grad():
        for n in range(16):
            right, none = (model.image_logits(caption, codes)[:, n] for caption in (text, empty))
            codes[:, n] = (right + 2.0 * (right - none)).argmax(dim=1)
    assert torch.equal(sample(model, text, SampleSettings(temperature=0.0, guidance=2.0), [0, 1, 2]), codes)
    assert not torch.equal(codes, sample(model, text, GREEDY, [0, 1, 2]))


def test_a_picture_is_decided_by_its_own_seed():
    model = build()
    text, _ = batch(model, 4)
    codes = sample(model, text, SampleSettings(), [10, 11, 12, 13])
    assert torch.equal(codes, sample(model, text, SampleSettings(), [10, 11, 12, 13]))
    others = sample(model, text, SampleSettings(), [20, 11, 22, 23])
    assert torch.equal(codes[1], others[1])
    assert not torch.equal(codes[0], others[0])
    assert torch.equal(sample(model, text[2:3], SampleSettings(), [12])[0], codes[2])


def test_one_caption_with_several_seeds_gives_several_pictures():
    model = build()
    text, _ = batch(model, 1)
    codes = sample(model, text.expand(8, -1), SampleSettings(), range(8))
    assert len({tuple(row.tolist()) for row in codes}) == 8
    assert (int(codes.min()) >= 0, int(codes.max()) < 50) == (True, True)


def test_every_caption_needs_its_seed():
    model = build()
    text, _ = batch(model, 3)
    with pytest.raises(ValueError, match="2 seeds for 3 captions"):
        sample(model, text, SampleSettings(), [1, 2])


def test_sampling_keeps_no_graph_and_leaves_the_model_as_it_was():
    model = build()
    model.train()
    text, _ = batch(model, 1)
    codes = sample(model, text, SampleSettings(), [1])
    assert model.training
    model.loss(text, codes).image_nats_B.sum().backward()  # and its codes may be trained on


# One draw --------------------------------------------------------------------------------------------------------


def frequencies(logits_V: torch.Tensor, **change) -> torch.Tensor:
    """The exact shares that the draw gives each code: a fine grid of uniform numbers, no randomness."""
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    codes = draw(logits_V.expand(100_000, -1), SampleSettings(**change), uniform)
    return torch.bincount(codes, minlength=len(logits_V)) / 100_000


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5])


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
def test_codes_are_drawn_with_the_probabilities_of_the_softmax(temperature: float):
    drawn = frequencies(LOGITS, temperature=temperature)
    assert torch.allclose(drawn, (LOGITS / temperature).softmax(dim=0), atol=2e-5)


def test_top_k_keeps_the_k_most_probable_in_proportion():
    expected = LOGITS.softmax(dim=0) * torch.tensor([1, 0, 1, 0, 1])
    assert torch.allclose(frequencies(LOGITS, top_k=3), expected / expected.sum(), atol=2e-5)
    assert torch.allclose(frequencies(LOGITS, top_k=99), LOGITS.softmax(dim=0), atol=2e-5)


def test_top_p_keeps_the_fewest_codes_that_hold_the_share():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2])
    kept = {share: frequencies(probabilities.log(), top_p=share) for share in (0.1, 0.41, 0.69, 0.71, 0.95)}
    assert [(drawn > 0).tolist() for drawn in kept.values()] == [
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, False],
        [True, False, True, True],
        [True, True, True, True],
    ]
    assert torch.allclose(kept[0.41], torch.tensor([4, 0, 3, 0]) / 7, atol=2e-5)


def test_temperature_zero_takes_the_most_probable():
    assert draw(LOGITS[None], SampleSettings(temperature=0.0), torch.tensor([0.999])).tolist() == [2]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e-12, 0.5, 1 - 2**-53]),
    st.integers(0, 4),
    st.floats(0.01, 1.0),
)
def test_no_draw_leaves_what_the_filters_keep(logits: list[float], uniform: float, top_k: int, top_p: float):
    logits_1V = torch.tensor([logits])
    chosen = int(
        draw(logits_1V, SampleSettings(top_k=top_k, top_p=top_p), torch.tensor([uniform], dtype=torch.float64))
    )
    assert 0 <= chosen < len(logits)
    assert logits_1V[0].double().softmax(dim=0)[chosen] > 0
    if top_k:
        assert sum(value > logits[chosen] for value in logits) < top_k


def test_the_cache_is_allocated_once():
    model: Transformer = build()
    cache = Cache(model, 2)
    places = [layer.data_ptr() for layer in cache.layers]
    text, codes = batch(model, 2)
    with torch.no_grad():
        model.prefill(text, cache)
        for n in range(16):
            model.step(codes[:, n], n, cache)
    assert [layer.data_ptr() for layer in cache.layers] == places
    assert sum(layer.numel() for layer in cache.layers) == 3 * 2 * 2 * 23 * 32
