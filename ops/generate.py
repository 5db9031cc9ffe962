"""Pictures from prompts: sample codes, decode them, order them best first, write a sheet and what made it.

May not live here: how a code is drawn (models/sampling.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.metrics import Tell, untold
from infra.store import absolute, join, open_store, parent
from models.dvae import Dvae
from models.sampling import SampleSettings, sample
from models.text import EOS, PAD, CaptionTokenizer
from models.transformer import Transformer
from ops.errors import UsageError
from ops.seeds import derived_seed
from ops.sheets import Cell, Pixels, draw_sheet, png, to_pixels
from ops.trained import load_tokenizer, load_transformer

FORMAT = 1
SAMPLE_BATCH = 64
"""Pictures sampled at once, by default: memory of the cache grows with it, and the pictures do not depend on it."""


@dataclass(frozen=True)
class Model:
    """All that turns a prompt into a picture, and the digests that name it."""

    transformer: Transformer
    captions: CaptionTokenizer
    tokenizer: Dvae
    digest: str
    tokenizer_digest: str


@dataclass(frozen=True)
class Drawn:
    """One picture (HWC), what it was drawn from, and its score: higher is better, nats a code."""

    prompt: str
    pixels: Pixels
    codes_N: np.ndarray[Any, np.dtype[np.int64]]
    seed: int
    score: float


def load_model(model: str, tokenizer: str | None = None) -> Model:
    """MODEL with the tokenizer that it carries. Raises UsageError if `tokenizer` names another one."""
    transformer, captions, recipe, digest = load_transformer(model)
    dvae, found = load_tokenizer(tokenizer if tokenizer is not None else model)
    wanted = recipe["inputs"]["tokenizer"]
    if found != wanted:
        raise UsageError(
            f"{model} was trained on codes of tokenizer {wanted[:16]}, and {tokenizer} is {found[:16]}.",
            "Leave the tokenizer out: the model carries its own.",
        )
    return Model(transformer, captions, dvae, digest, found)


def generate(
    model: str,
    prompts: Sequence[str],
    n: int = 9,
    seed: int = 0,
    into: str | None = None,
    tokenizer: str | None = None,
    settings: SampleSettings | None = None,
    tell: Tell = untold,
) -> dict[str, Any]:
    """Draws `n` pictures of each prompt and writes, for each prompt, a sheet, the pictures and a JSON beside it.

    `into` is the PNG file of the sheet (with several prompts a number is put before its suffix); None: a name made of
    the prompt, in MODEL/../pictures. Returns {"sheets", "prompts": [what each JSON holds], "seed", "model",
    "tokenizer", "settings", "seconds"}. Raises UsageError for no prompt or an empty one.
    """
    started_s = time.monotonic()
    if not prompts or n < 1:
        raise UsageError("there is nothing to draw.", 'Give a prompt: armchair generate MODEL "a prompt" -n 9')
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("the prompt is empty.", "Say what the picture should show.")
    settings = settings or SampleSettings()
    loaded = load_model(model, tokenizer)
    told = []
    for number, prompt in enumerate(prompts):
        place = _place(model, prompt, into, number if len(prompts) > 1 else None)
        begun_s = time.monotonic()
        drawn = draw_best_first(
            loaded, prompt, n, settings, [derived_seed("generate", seed, number, k) for k in range(n)]
        )
        about = {
            "format": FORMAT,
            "prompt": prompt,
            "note": _note(loaded, prompt),
            "seed": seed,
            "model": loaded.digest,
            "tokenizer": loaded.tokenizer_digest,
            "settings": asdict(settings),
            "seconds": round(time.monotonic() - begun_s, 3),
        }
        told.append(_write(place, drawn, about))
        tell("pictures", n * len(told), n * len(prompts))
    return {
        "sheets": [one["sheet"] for one in told],
        "prompts": told,
        "seed": seed,
        "model": loaded.digest,
        "tokenizer": loaded.tokenizer_digest,
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - started_s, 3),
    }


def draw_best_first(model: Model, prompt: str, n: int, settings: SampleSettings, seeds: Sequence[int]) -> list[Drawn]:
    """`n` pictures of one prompt, best first by `scores`.

    This order is the model's own opinion; one of a separately trained reranker (paper, §2.6) comes later.
    """
    codes_BN = sample_codes(model, [prompt] * n, settings, seeds)
    score_B = scores(model, [prompt] * n, codes_BN)
    pictures = decode_codes(model, codes_BN)
    order = torch.argsort(score_B, descending=True, stable=True).tolist()
    return [Drawn(prompt, pictures[i], codes_BN[i].numpy(), seeds[i], float(score_B[i])) for i in order]


def sample_codes(
    model: Model, prompts: Sequence[str], settings: SampleSettings, seeds: Sequence[int], batch: int = SAMPLE_BATCH
) -> Tensor:
    """codes_BN, one picture for each prompt and seed. A picture does not depend on its neighbours."""
    text_BT = model.captions.encode(prompts, model.transformer.settings.text_positions)
    parts = [
        sample(model.transformer, text_BT[first : first + batch], settings, seeds[first : first + batch])
        for first in range(0, len(prompts), batch)
    ]
    return torch.cat(parts)


def decode_codes(model: Model, codes_BN: Tensor, batch: int = SAMPLE_BATCH) -> Pixels:
    """uint8 pictures BHWC of codes."""
    return np.concatenate([to_pixels(model.tokenizer.decode(part_BN)) for part_BN in torch.split(codes_BN, batch)])


@torch.no_grad()
def scores(model: Model, prompts: Sequence[str], codes_BN: Tensor, batch: int = SAMPLE_BATCH) -> Tensor:
    """score_B, nats a code: how much more probable the codes are under the prompt than without a caption.

    That difference does not favour pictures that are probable under any prompt. A model that was trained without
    dropped captions knows no "no caption": then it is the log-probability under the prompt.
    """
    settings = model.transformer.settings
    text_BT = model.captions.encode(prompts, settings.text_positions)
    none_BT = model.captions.encode([""] * len(prompts), settings.text_positions)
    parts = []
    for first in range(0, len(prompts), batch):
        some = slice(first, first + batch)
        right_B = model.transformer(text_BT[some], codes_BN[some]).image_nats_B
        none_B = torch.zeros_like(right_B)
        if settings.caption_dropout:
            none_B = model.transformer(none_BT[some], codes_BN[some]).image_nats_B
        parts.append((none_B - right_B) / settings.image_positions)
    return torch.cat(parts)


def _note(model: Model, prompt: str) -> str:
    """What a person should know about how the prompt was read; empty if nothing."""
    positions = model.transformer.settings.text_positions
    notes = []
    longer_T = model.captions.encode([prompt], positions + 1)[0]
    if longer_T[-1] not in (EOS, PAD) or longer_T[-2] not in (EOS, PAD):
        read = model.captions.decode(model.captions.encode([prompt], positions)[0])
        notes.append(f"the prompt is longer than {positions} text positions; what was read of it: {read!r}")
    if unknown := model.captions.unknown_characters(prompt):
        shown = "".join(unknown[:20])
        notes.append(f"the captions that the model learned from do not hold {shown!r}: it can't know what they mean")
    return "; ".join(notes)


def _place(model: str, prompt: str, into: str | None, number: int | None) -> tuple[str, str]:
    """(directory, name without suffix) of a prompt's files."""
    if into is None:
        name = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "prompt"
        return join(parent(absolute(model)), "pictures"), name if number is None else f"{number}-{name}"
    directory, _, name = into.rpartition("/")
    name = name.removesuffix(".png") or "sheet"
    return directory or ".", name if number is None else f"{name}-{number}"


def _write(place: tuple[str, str], drawn: Sequence[Drawn], about: dict[str, Any]) -> dict[str, Any]:
    directory, name = place
    store = open_store(directory)
    pictures = []
    for rank, one in enumerate(drawn):
        key = f"{name}/{rank:03d}.png"
        store.put(key, png(one.pixels), if_absent=False)
        pictures.append({"path": join(directory, key), "seed": one.seed, "score": round(one.score, 4)})
    columns = int(np.ceil(np.sqrt(len(drawn))))
    cells = [Cell(one.pixels) for one in drawn]
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    store.put(f"{name}.png", draw_sheet(rows, about["prompt"]), if_absent=False)
    told = about | {"sheet": join(directory, f"{name}.png"), "pictures": pictures}
    store.put(f"{name}.json", json.dumps(told, indent=1, ensure_ascii=False).encode(), if_absent=False)
    return told
