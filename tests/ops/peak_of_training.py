"""Trains a model for two updates of two parts each and prints the most memory that its process took for it, bytes.

    python -m tests.ops.peak_of_training JSON

JSON: {"model": "dvae" or "transformer", "settings": {…}, "pictures": of a part, "recompute": …, "device": …}. On a CPU
the process's resident memory, less what it was before the model; on a GPU what torch's allocator gave out.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.dvae import Dvae, DvaeSettings
from models.transformer import Transformer, TransformerSettings


def resident(name: str) -> int:
    """VmRSS: now, or VmHWM: at its height, of this process; bytes. (getrusage's would be the parent's before exec.)"""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def train(model: Any, pictures: int, device: str) -> None:
    """With AdamW and an average, as a run does."""
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = model.settings
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            objective(model, settings, pictures, device).backward()
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)


def objective(model: nn.Module, settings: Any, pictures: int, device: str) -> Any:
    if isinstance(settings, DvaeSettings):
        images = torch.rand(pictures, 3, settings.image_size, settings.image_size, device=device)
        return model(images, list(range(pictures)), 0).loss_B.sum()
    text = torch.randint(settings.text_vocabulary, (pictures, settings.text_positions), device=device)
    codes = torch.randint(settings.image_vocabulary, (pictures, settings.image_positions), device=device)
    return model(text, codes).objective(1 / 8, text.numel(), pictures)


def main() -> None:
    what = json.loads(sys.argv[1])
    kinds = {"dvae": (Dvae, DvaeSettings), "transformer": (Transformer, TransformerSettings)}
    make, make_settings = kinds[what["model"]]
    settings = make_settings(**what["settings"])
    small = {"dvae": {"image_size": 16, "widths": (8, 8), "vocabulary": 8}}.get(what["model"], SMALL)
    train(make(make_settings(**small)), 1, what["device"])  # libraries and threads take their memory
    before = resident("VmRSS")
    if what["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = make(settings)
    model.recompute = what["recompute"]
    train(model, what["pictures"], what["device"])
    print((torch.cuda.max_memory_allocated() if what["device"] == "cuda" else resident("VmHWM")) - before)


SMALL = {
    "text_positions": 4,
    "text_vocabulary": 300,
    "grid": 2,
    "image_vocabulary": 8,
    "width": 8,
    "layers": 3,
    "heads": 1,
}

if __name__ == "__main__":
    main()
