"""Encoding with bfloat16: how far it is trusted, and when not. On a CPU, and on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.store import open_store
from models.dvae import Dvae, DvaeSettings
from ops.attempts import list_attempts, read_attempt
from ops.encoder import AGREEMENT, ENCODE_BATCH, SAMPLE_BATCHES, Encoding, encode_batch
from ops.learning import images_of
from ops.shards import read_receipts
from ops.tokenize import pending_tasks, start_tokens, tokenize_shard
from tests.bench.photographs import draw_photograph
from tests.ops.conftest import Learned
from tests.small_runs import TOKENS, write_pair_shard

SETTINGS = DvaeSettings(image_size=32, widths=(16, 32, 64, 128), stem_kernel=3, vocabulary=512)
"""The published blocks, gain and all, but small."""


def _dvae(settings: DvaeSettings = SETTINGS) -> Dvae:
    torch.manual_seed(0)
    return Dvae(settings).requires_grad_(False).eval()


def _pictures(count: int) -> np.ndarray:
    return np.stack([draw_photograph(number, 32, 32) for number in range(count)])


def test_residual_paths_in_bfloat16_give_the_codes_of_float32() -> None:
    dvae, images = _dvae(), images_of(_pictures(256))
    exact_logits, exact = dvae.logits(images), dvae.encode(images)
    dvae.run_residuals_in(torch.bfloat16)
    logits, codes = dvae.logits(images), dvae.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        all_of_it = dvae.encode(images)
    dvae.run_residuals_in(None)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact_logits), "nothing ran in bfloat16"
    assert (codes == exact).double().mean() >= AGREEMENT
    assert (all_of_it == exact).double().mean() < AGREEMENT, "plain autocast would have done"
    assert torch.equal(dvae.logits(images), exact_logits)


def test_the_sample_is_encoded_in_float32_and_the_rest_in_bfloat16() -> None:
    dvae, pixels = _dvae(), _pictures(4)
    exact = dvae.encode(images_of(pixels))
    encoding = Encoding(dvae, torch.bfloat16)
    assert encoding.agreement is None
    dtypes = []
    dvae.encoder.groups[0][0].conv_1.register_forward_hook(lambda conv, given, made: dtypes.append(made.dtype))
    for _ in range(SAMPLE_BATCHES):
        assert torch.equal(encoding(pixels), exact)
    assert dtypes == [torch.float32, torch.bfloat16] * SAMPLE_BATCHES
    assert encoding.agreement is not None
    assert encoding.agreement >= AGREEMENT
    assert encoding.half == torch.bfloat16
    dtypes.clear()
    encoding(pixels)
    assert dtypes == [torch.bfloat16]


def test_a_tokenizer_whose_codes_bfloat16_changes_stays_in_float32() -> None:
    """A gain of 8 puts the residual paths before the stream; its logits are as rough as bfloat16 is."""
    dvae, pixels = _dvae(DvaeSettings(**{**vars(SETTINGS), "post_gain": 8.0})), _pictures(16)
    exact = dvae.encode(images_of(pixels))
    encoding = Encoding(dvae, torch.bfloat16)
    made = [encoding(pixels) for _ in range(SAMPLE_BATCHES + 1)]
    assert encoding.agreement is not None
    assert encoding.agreement < AGREEMENT
    assert encoding.half is None
    assert all(torch.equal(codes, exact) for codes in made)


def test_a_batch_on_a_cpu_is_as_small_as_its_layers_are_large() -> None:
    assert encode_batch(DvaeSettings(), "cpu") == 1, "67 MB a picture"
    assert encode_batch(DvaeSettings(), "cuda") == encode_batch(SETTINGS, "cpu") == ENCODE_BATCH


def test_float32_compares_nothing() -> None:
    encoding = Encoding(_dvae(), None)
    encoding(_pictures(2))
    assert encoding.agreement is None


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_a_shard_tells_how_far_bfloat16_was_to_be_trusted(device: str, learned: Learned, tmp_path: Path) -> None:
    pairs, tokens = tmp_path / "pairs", tmp_path / "tokens"
    write_pair_shard(pairs, 0, list(range(120)))
    start_tokens(str(pairs), str(learned.tokenizer), str(tokens), TOKENS)
    (task,) = pending_tasks(str(pairs), str(tokens), TOKENS)
    outcome = tokenize_shard(task, threads=2, device=device, half=True)
    assert outcome.agreement is not None
    assert outcome.agreement > 0.9
    used = "bfloat16" if outcome.agreement >= AGREEMENT else "float32"
    store = open_store(str(tokens))
    assert read_receipts(store)[0].versions["encoder"] == f"{device}, {used}"
    (record,) = (read_attempt(store, name) for name in list_attempts(store))
    assert record["agreement"] == outcome.agreement


@pytest.mark.gpu
@GPU
def test_on_a_gpu_the_codes_are_those_of_a_cpu() -> None:
    dvae, pixels = _dvae(), _pictures(4 * ENCODE_BATCH)
    exact = dvae.encode(images_of(pixels))
    encoding = Encoding(dvae.to("cuda"), torch.bfloat16)
    made = [encoding(pixels[first : first + ENCODE_BATCH]) for first in range(0, len(pixels), ENCODE_BATCH)]
    assert encoding.half == torch.bfloat16
    assert (torch.cat(made).cpu() == exact).double().mean() >= AGREEMENT
