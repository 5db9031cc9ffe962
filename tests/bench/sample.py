"""Benchmark of sampling: with the cache of keys and values against a full forward pass for every code.

    make bench STAGE=sample

Both sides draw the same codes from the same numbers and take turns in one run. Last line: one JSON object whose
`ratios` are above 1 where the cache is faster.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time

import torch
from torch import Tensor

from models.sampling import SampleSettings, draw, sample
from models.text import empty_caption
from models.transformer import Transformer
from pipelines.settings import resolve

ROUNDS = 5
PICTURES = 64


@torch.no_grad()
def sample_without_cache(model: Transformer, text_BT: Tensor, uniform_BN: Tensor) -> Tensor:
    """The same draws, each from a forward pass over the whole sequence."""
    codes_BN = torch.zeros(uniform_BN.shape, dtype=torch.int64)
    for n in range(uniform_BN.shape[1]):
        logits_BV = model.image_logits(text_BT, codes_BN)[:, n]
        codes_BN[:, n] = draw(logits_BV, SampleSettings(), uniform_BN[:, n])
    return codes_BN


def main() -> None:
    torch.set_num_threads(1)
    settings = resolve("demo").transformer
    model = Transformer(settings).eval()
    text_BT = empty_caption(settings.text_positions).expand(PICTURES, -1)
    seeds = list(range(PICTURES))
    uniform_BN = torch.stack(
        [
            torch.rand(settings.image_positions, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            for s in seeds
        ]
    )
    cpu: dict[str, list[float]] = {"cache": [], "full": []}
    for _ in range(ROUNDS):
        started = time.process_time()
        cached_BN = sample(model, text_BT, SampleSettings(), seeds)
        cpu["cache"].append(time.process_time() - started)
        started = time.process_time()
        full_BN = sample_without_cache(model, text_BT, uniform_BN)
        cpu["full"].append(time.process_time() - started)
        assert (cached_BN == full_BN).double().mean() > 0.99, "the two sides draw different pictures"
    medians = {side: statistics.median(values) for side, values in cpu.items()}
    print(f"{PICTURES} pictures of {settings.image_positions} codes, 1 thread, median of {ROUNDS} alternating rounds")
    for side, value in medians.items():
        print(f"{side:<8}{1000 * value / PICTURES:8.2f} CPU-ms a picture")
    device = f"{platform.machine()}, {os.cpu_count()} cores"
    print(
        json.dumps(
            {"stage": "sample", "device": device, "ratios": {"full_forward": medians["full"] / medians["cache"]}}
        )
    )


if __name__ == "__main__":
    main()
