"""What a training takes: the published figures, what torch counts, and the memory of real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.attention import mask
from models.dvae import DvaeSettings
from models.transformer import TransformerSettings
from ops.errors import UsageError
from ops.estimate import GPUS, AliveBytes, Sizes, counted_flops, estimate, flops, parameters, pass_bytes
from ops.jobs import TokenizerTrainSettings, TransformerTrainSettings

REPO = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"text_positions": 32, "text_vocabulary": 512, "grid": 16, "image_vocabulary": 512}
SMALL |= {"width": 128, "layers": 6, "heads": 4}
LARGER = SMALL | {"text_vocabulary": 4096, "image_vocabulary": 2048, "width": 256, "layers": 8, "heads": 8}
DVAE: dict[str, Any] = {"image_size": 64, "stem_unshuffle": 2, "stem_kernel": 3, "widths": (64, 128), "bottleneck": 2}
DVAE |= {"vocabulary": 512, "codebook_width": 64}
PUBLISHED = Sizes(TransformerSettings(), TransformerTrainSettings())


# Counted ----------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_while_they_are_alive_and_views_are_free():
    given = torch.zeros(1000)
    with AliveBytes([given]) as alive:
        made = torch.ones(500)
        assert alive.now == 2000
        view, of_given = made.view(5, 100).t(), given[:10]
        assert alive.now == 2000
        made.add_(1)
        more = made * 2
        assert alive.now == 4000
        del made, more
        assert alive.now == 2000  # the view keeps its memory
        del view, of_given
        assert alive.now == 0
    assert alive.most == 4000


def test_a_block_keeps_16_states_and_recomputed_one():
    def kept(layers: int, **how: Any) -> int:
        return pass_bytes(TransformerSettings(**SMALL | {"layers": layers}), 8, **how)

    state = 8 * 288 * 128  # numbers
    sums = 8 * 288 * 4 * 4 + 4 * 8 * 288 * 4  # fp32: one a head of attention, two of each norm
    assert kept(7, precision="fp32") - kept(6, precision="fp32") == 16 * 4 * state + sums
    # bf16: the states and what norms read stay fp32, of matrix products the inputs are bf16.
    assert kept(7) - kept(6) == (2 * 4 + 14 * 2) * state + sums
    assert kept(7, precision="fp32", recompute=True) - kept(6, precision="fp32", recompute=True) == 4 * state


def test_masked_sdpa_makes_numbers_of_its_mask_in_each_layer():
    settings = TransformerSettings(**SMALL)
    more = pass_bytes(settings, 8, precision="fp32", flex=False) - pass_bytes(settings, 8, precision="fp32")
    assert more == pytest.approx(6 * 4 * 288**2, rel=0.05)


def measured(kind: str, settings: dict[str, Any], pictures: int, *, recompute: bool, device: str) -> int:
    """The most memory of a process that trains it. Without the allocator's pools, freed memory goes back at once."""
    what = {"model": kind, "settings": settings, "pictures": pictures, "recompute": recompute, "device": device}
    command = [sys.executable, "-m", "tests.ops.peak_of_training", json.dumps(what)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


CASES = [
    ("transformer", SMALL, 16, False),
    ("transformer", SMALL, 16, True),
    ("transformer", LARGER, 4, False),
    ("transformer", LARGER, 4, True),
    ("dvae", DVAE, 16, False),
]


def foreseen(kind: str, settings: dict[str, Any], pictures: int, recompute: bool, *, flex: bool) -> int:
    """Weights, gradients, two moments and an average in fp32, and the pass."""
    model = DvaeSettings(**settings) if kind == "dvae" else TransformerSettings(**settings)
    passes = pass_bytes(model, pictures, recompute=recompute, precision="fp32", flex=flex)
    return 20 * sum(parameters(model).values()) + passes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings", "pictures", "recompute"), CASES)
def test_a_process_takes_the_memory_that_was_foreseen(
    kind: str, settings: dict[str, Any], pictures: int, recompute: bool
):
    taken = measured(kind, settings, pictures, recompute=recompute, device="cpu")
    # Within 15 %: above lie the libraries' buffers, which nobody can foresee.
    assert 0.95 < taken / foreseen(kind, settings, pictures, recompute, flex=False) < 1.15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "settings", "pictures", "recompute"), CASES)
def test_a_gpu_gives_out_the_memory_that_was_foreseen(
    kind: str, settings: dict[str, Any], pictures: int, recompute: bool
):
    taken = measured(kind, settings, pictures, recompute=recompute, device="cuda")
    assert 0.9 < taken / foreseen(kind, settings, pictures, recompute, flex=True) < 1.2


# Published --------------------------------------------------------------------------------------------------------


def test_the_published_transformer_has_its_parameters_and_flops():
    assert PUBLISHED.counts["blocks"] == pytest.approx(12.09e9, rel=5e-4)
    assert PUBLISHED.total == sum(PUBLISHED.counts.values()) == pytest.approx(12.293e9, rel=1e-4)
    found = flops(TransformerSettings())
    used = PUBLISHED.counts["blocks"] + PUBLISHED.counts["norm"] + 24_576 * 3968
    assert found.conventional == pytest.approx(1280 * (6 * used + 12 * 64 * 62 * 64 * 1280))
    # Keys seen in the mean, over all positions: row 256, column 243, conv 275, instead of 1,280.
    keys = (47 * 256.2 + 16 * 243.4 + 275.4) / 64
    attention = 12 * 64 * 3968 * keys * 1280
    heads = 6 * 3968 * (255 * 16_384 + 1024 * 8192)
    assert found.mask_aware == pytest.approx(6 * PUBLISHED.counts["blocks"] * 1280 + heads + attention, rel=1e-4)


def test_flops_are_those_that_torch_counts():
    settings = TransformerSettings(**LARGER)
    forward = counted_flops(settings, backward=False)  # without attention
    shown = sum(
        int(mask(kind, 32, 16).sum()) for kind in ("row", "column", "row", "row", "row", "column", "row", "conv")
    )
    assert flops(settings).mask_aware == pytest.approx(
        3 * forward + 12 * 256 * shown, rel=0.01
    )  # biases are no products
    small = DvaeSettings(**DVAE)
    # The first convolution's input needs no gradient: not quite three passes.
    assert 2.9 < flops(small).conventional / counted_flops(small, backward=False) <= 3


@pytest.mark.slow
def test_the_published_model_is_trained_in_shares_and_gathered_to_be_scored():
    told = estimate(*published(), gpus=64, kind="h100")["models"]["transformer"]
    assert told["tokens"] == 430_000 * 1024 * 1280
    ways = {(way["sharded"], way["recompute"]): way for way in told["ways"]}
    assert [ways[key]["fits"] for key in ((False, False), (False, True), (True, False), (True, True))] == [0, 0, 1, 1]
    copies, shares = ways[False, False]["bytes"], ways[True, True]["bytes"]
    assert copies["weights"] == copies["gradients"] == copies["average"] == copies["AdamW"] / 2 == 4 * PUBLISHED.total
    assert {name: shares[name] * 64 for name in ("weights", "AdamW")} == {n: copies[n] for n in ("weights", "AdamW")}
    # Outside the blocks 0.2 G parameters in bf16, of the blocks of 189 M two in bf16, and a gradient.
    assert shares["gathered"] == pytest.approx(2 * 0.1973e9 + 10 * 0.18899e9, rel=1e-3)
    assert ways[True, True]["parts_of_a_batch"] == 1
    assert ways[True, True]["pictures_at_once"] == 16
    assert ways[True, False]["pictures_at_once"] * ways[True, False]["parts_of_a_batch"] >= 16
    evaluation = next(one for one in told["evaluation"] if one["sharded"])
    assert evaluation["bytes"]["gathered"] == 2 * PUBLISHED.total == pytest.approx(24.6e9, rel=1e-3)
    # 4.34e22 FLOPs at 0.35 of 64 · 989e12; recomputed a third more.
    assert ways[True, False]["days"] == pytest.approx(4.343e22 / (64 * 989e12 * 0.35) / 86_400, rel=1e-3)
    assert ways[True, True]["days"] == pytest.approx(4 / 3 * ways[True, False]["days"])


def published() -> tuple[Any, ...]:
    return DvaeSettings(), TokenizerTrainSettings(), TransformerSettings(), TransformerTrainSettings()


# What fits --------------------------------------------------------------------------------------------------------


def test_a_batch_comes_in_as_few_parts_as_fit():
    sizes = Sizes(TransformerSettings(**SMALL), TransformerTrainSettings(batch=64, ema=0.0))
    fixed = sum(sizes.items(1, sharded=False).values())
    whole, half, one = (sizes.pass_bytes(pictures) for pictures in (64, 32, 1))
    for limit, pictures, parts in (
        (whole, 64, 1),
        (whole - 1, 32, 2),
        (half - 1, 16, 4),
        (one, 1, 64),
        (one - 1, 0, 0),
    ):
        found = sizes.memory(1, fixed + limit, sharded=False, recompute=False)
        assert (found.pictures, found.parts) == (pictures, parts)
        assert (found.peak <= fixed + limit) == (pictures > 0)
    assert "average" not in sizes.items(1, sharded=False)


def test_more_gpus_help_where_shares_do_and_not_where_the_whole_is_too_large():
    sizes = Sizes(TransformerSettings(**LARGER), TransformerTrainSettings(batch=8, evaluate_pictures=1))
    one = sizes.pass_bytes(1, recompute=True)

    def held(gpus: int) -> float:
        training = sum(sizes.items(gpus, sharded=True).values()) + one
        return max(training, sum(sizes.evaluation(gpus, sharded=True).values()))

    for gpus in (2, 8):
        assert sizes.least_gpus(held(gpus))["all"] == gpus
    # Where nothing is left beside a pass, no share is small enough; where a gathered model is too large, none scores.
    assert sizes.least_gpus(one) == {"training": None, "all": None}
    wide = Sizes(TransformerSettings(), TransformerTrainSettings(evaluate_pictures=0))
    assert wide.least_gpus(16e9) == {"training": 32, "all": None}
    # 16 pictures are drawn, two on each of 8 GPUs.
    assert wide.evaluation(8, sharded=True)["cache"] == 2 * 2 * 2 * 1280 * 3968 * 64


@pytest.mark.parametrize(
    ("kind", "words"), [("H10", "Did you mean H100"), ("b20", "Did you mean B200"), ("TPU", "Kinds: V100")]
)
def test_an_unknown_kind_is_refused_with_the_nearest(kind: str, words: str):
    with pytest.raises(UsageError) as refused:
        estimate(*published(), gpus=8, kind=kind)
    assert words in str(refused.value)


@pytest.mark.parametrize(("gpus", "mfu"), [(0, None), (1, 0.0), (1, 1.5)])
def test_no_gpus_and_impossible_rates_are_refused(gpus: int, mfu: float | None):
    with pytest.raises(UsageError, match="at least one GPU"):
        estimate(*published(), gpus=gpus, kind="H100", mfu=mfu)


def test_gpus_beyond_the_pictures_of_a_batch_save_no_day():
    small = DvaeSettings(**DVAE), TokenizerTrainSettings(batch=4), TransformerSettings(**SMALL)
    training = TransformerTrainSettings(batch=4)
    four, eight = (estimate(*small, training, gpus=gpus, kind="A100")["models"] for gpus in (4, 8))
    for model in ("tokenizer", "transformer"):
        assert four[model]["ways"][0]["days"] == eight[model]["ways"][0]["days"] > 0
    double = estimate(*small, replace(training, batch=8), gpus=8, kind="A100")["models"]["transformer"]
    assert double["ways"][0]["days"] == pytest.approx(four["transformer"]["ways"][0]["days"])  # twice the pictures


def test_kinds_are_ordered_by_what_they_can():
    rates = [card.bf16_flops for card in GPUS.values()]
    assert rates == sorted(rates)
    assert GPUS["H100"].bf16_flops == GPUS["H200"].bf16_flops  # the same processor with more memory
