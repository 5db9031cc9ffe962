"""A whole run that learns in seconds: drawn pairs, committed as ingestion commits, and settings of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from infra.store import open_store
from models.dvae import DvaeSettings
from models.transformer import TransformerSettings
from ops.jobs import Job, TokenizerTrainSettings, TransformerTrainSettings
from ops.pictures import PictureSettings, encode_jpeg
from ops.recipes import start_stage
from ops.shards import Receipt, publish, sidecar_schema, write_table, write_tar
from ops.tokenize import TokensSettings, pending_tasks, start_tokens, tokenize_shard

DVAE = DvaeSettings(
    image_size=16,
    stem_unshuffle=2,
    stem_kernel=3,
    widths=(16, 32),
    blocks_per_group=1,
    bottleneck=2,
    post_gain=0.5,
    vocabulary=32,
    codebook_width=16,
    codebook_std=1.0,
    logit_std=1.5,
    ln_b_min=-1.5,
    beta=0.5,
    beta_steps=5,
    tau_steps=15,
    usage=0.05,
)
TOKENIZER_TRAINING = TokenizerTrainSettings(
    steps=20,
    batch=8,
    learning_rate=4e-3,
    final_learning_rate=1e-4,
    warmup_steps=3,
    decay_share=1.0,
    clip=1.0,
    ema=0.9,
    ema_warmup=True,
    checkpoint_every=10,
    log_every=5,
    evaluate_pictures=8,
)
TOKENS = TokensSettings(crops=2)
TRANSFORMER = TransformerSettings(
    text_positions=8,
    text_vocabulary=300,
    grid=4,
    image_vocabulary=32,
    width=32,
    layers=3,
    heads=2,
    caption_dropout=0.1,
)
TRANSFORMER_TRAINING = TransformerTrainSettings(
    steps=20,
    batch=8,
    learning_rate=5e-3,
    final_learning_rate=1e-4,
    warmup_steps=3,
    ema=0.9,
    ema_every=1,
    ema_warmup=True,
    checkpoint_every=10,
    log_every=5,
    evaluate_pictures=8,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "bar", "pole", "frame")


def drawn(number: int, side: int) -> tuple[str, np.ndarray]:
    """Caption and pixels of a coloured shape on white, a little different for each number."""
    rng = np.random.default_rng(number)
    colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
    pixels = np.full((side, side, 3), 255, np.uint8)
    a, b = side // 4 + int(rng.integers(0, 3)), side - side // 4 + int(rng.integers(-2, 1))
    rows, columns = {"bar": ((a, b), (0, side)), "pole": ((0, side), (a, b))}.get(shape, ((a, b), (a, b)))
    pixels[slice(*rows), slice(*columns)] = COLOURS[colour]
    if shape == "frame":
        pixels[a + 2 : b - 2, a + 2 : b - 2] = 255
    return f"a {colour} {shape}", pixels


def write_pair_shard(
    location: Path,
    shard: int,
    numbers: list[int],
    side: int = 32,
    generation: int = 0,
    weight: float = 1.0,
    damaged: int | None = None,
    draw: Callable[[int, int], tuple[str, np.ndarray]] = drawn,
) -> Receipt:
    """Commits a pair shard of drawn pictures. Every fifth row is a rejected one, every eighth kept one is held out. The
    JPEG of the number `damaged` is cut."""
    store = open_store(str(location))
    start_stage(store, "pairs", {"picture": asdict(PictureSettings(short_side_px=32))}, {}, "")
    rows, members, statuses = [], [], []
    for row, number in enumerate(numbers):
        caption, pixels = draw(number, side)
        key, uid = f"{shard:05d}{row:04d}", f"{number:032x}"
        statuses.append("timeout" if row % 5 == 4 else "success")
        rows.append({"key": key, "uid": uid, "url": f"http://example.org/{number}", "caption": caption})
        if statuses[-1] == "success":
            jpeg = encode_jpeg(pixels, 90)[: 100 if number == damaged else None]
            members += [(f"{key}.jpg", jpeg), (f"{key}.json", json.dumps({"uid": uid}).encode())]
            members.append((f"{key}.txt", caption.encode()))
    scratch = location.parent / f"scratch-{shard}-{generation}"
    scratch.mkdir()
    offsets = write_tar(scratch / "tar", members)
    sizes = {name: len(data) for name, data in members}
    for row, (record, status) in enumerate(zip(rows, statuses, strict=True)):
        name = f"{record['key']}.jpg"
        record |= {
            "status": status,
            "split": "held_out" if row % 8 == 7 else "train",
            "weight": weight,
            "tar_offset": offsets.get(name),
            "jpg_size": sizes.get(name),
            "colour": record["caption"].split()[1],
        }
    schema = sidecar_schema().append(pa.field("colour", pa.string()))
    groups = write_table(scratch / "parquet", pa.Table.from_pylist(rows, schema=schema))
    kept = statuses.count("success")
    receipt = Receipt(
        "pairs",
        shard,
        generation,
        {"work_order": f"{shard:064x}"},
        rows=len(rows),
        kept=kept,
        rejected={"timeout": len(rows) - kept},
        row_groups=groups,
    )
    committed = publish(store, receipt, {"tar": scratch / "tar", "parquet": scratch / "parquet"})
    assert committed is not None
    return committed


def tokenizer_job(pairs: Path, into: Path, training: TokenizerTrainSettings = TOKENIZER_TRAINING) -> Job:
    """Training of the tiny dVAE."""
    return Job("tokenizer", str(pairs), str(into), DVAE, training)


def transformer_job(tokens: Path, into: Path, training: TransformerTrainSettings = TRANSFORMER_TRAINING) -> Job:
    """Training of the tiny transformer."""
    return Job("transformer", str(tokens), str(into), TRANSFORMER, training)


def tokenize_here(pairs: Path, tokenizer: Path, tokens: Path, settings: TokensSettings = TOKENS) -> list[str]:
    """Tokenizes what is pending, without Ray; the states of the shards."""
    start_tokens(str(pairs), str(tokenizer), str(tokens), settings)
    return [tokenize_shard(task).state for task in pending_tasks(str(pairs), str(tokens), settings)]
