"""Benchmark of sampling: with the cache of keys and values against a full forward pass for every code.

    make bench STAGE=sample

Both sides draw the same codes from the same numbers, in one process and one thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sampling import SampleSettings, draw, sample
from models.text import empty_caption
from models.transformer import Transformer
from pipelines.settings import resolve
from tests.bench.harness import ROUNDS, alternate, cpu_s, device, measured, print_last_line, print_table

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
    where = device("torch")
    print(where)
    turns = alternate(
        {
            "cache": lambda: measured(sample, model, text_BT, SampleSettings(), seeds),
            "full": lambda: measured(sample_without_cache, model, text_BT, uniform_BN),
        }
    )
    for cached, full in zip(turns["cache"], turns["full"], strict=True):
        assert (cached.made == full.made).double().mean() > 0.99, "the two sides draw different pictures"
    print(f"{PICTURES} pictures of {settings.image_positions} codes, 1 thread, medians of {ROUNDS} alternating rounds")
    print_table(turns, PICTURES, "picture")
    print_last_line("sample", where, {"full_forward": cpu_s(turns["full"]) / cpu_s(turns["cache"])})


if __name__ == "__main__":
    main()
