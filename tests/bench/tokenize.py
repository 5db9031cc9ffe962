"""Benchmark of tokenizing: a whole shard as `tokenize` does it, against plain loops with our encoder and OpenAI's.

    make bench STAGE=tokenize           PICTURES=400 THREADS=2 make bench STAGE=tokenize
    python -m tests.bench.tokenize --tried          what else was tried: batches, threads, layouts, a compiler

All read the same JPEGs (drawn photographs, 512 × 384, quality 90) from the same tar, make the same crops and encode
them with the same weights: random ones of OpenAI's architecture at a quarter of its width, 64 pixels, 8,192 codes.

    ours          `tokenize_shard`: decodes in threads ahead of the encoder; its time also holds the check of the pair
                  shard's digests, the Parquet file, and the commit
    plain_loop    decode, crop, and for every 64 pictures our encoder, one after another; the codes stay in memory
    openai        the same loop with the encoder of the package DALL-E 0.1 (extra `oracles`; without the lock: `pip
                  install --no-deps --target DIR DALL-E==0.1 attrs requests`, and DIR on PYTHONPATH)
    …_small       the same two in batches as small as ours on this device

The ratios are of CPU time, as in every benchmark here: what is overlapped saves none, so on a CPU they tell what the
batches and the layout do. Those of the wall clock stand beside them, and mean something on a quiet machine only. The
codes of all sides must be the same.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.cluster import quiet_environment
from infra.store import LocalStore, open_store
from models.dvae import Dvae, DvaeSettings
from models.likelihood import map_pixels
from models.openai_weights import openai_state_dict
from ops.encoder import ENCODE_BATCH, Encoding, encode_batch
from ops.learning import images_of
from ops.pictures import decode_stored, transformer_crop
from ops.recipes import file_sha256
from ops.seeds import derived_seed
from ops.shards import FileRef, read_receipts, read_table
from ops.tokenize import TokenizeTask, TokensSettings, tokenize_shard
from ops.trained import FORMAT, FROZEN_TOKENIZER, save_weights
from tests.bench.harness import ROUNDS, Measured, alternate, cpu_s, device, measured, print_last_line, print_table
from tests.bench.photographs import draw_photograph
from tests.small_runs import write_pair_shard

SETTINGS = DvaeSettings(image_size=64, widths=(64, 128, 256, 512))
OTHERS = ("plain_loop", "openai", "plain_loop_small", "openai_small")
PICTURES = int(os.environ.get("PICTURES", "256"))
THREADS = int(os.environ.get("THREADS", str(os.cpu_count() or 1)))


def encoders() -> tuple[Dvae, torch.nn.Module]:
    """Ours and OpenAI's, with one set of weights."""
    import dall_e

    torch.manual_seed(0)
    theirs = dall_e.Encoder(n_hid=SETTINGS.widths[0], vocab_size=SETTINGS.vocabulary)
    decoder = dall_e.Decoder(n_hid=SETTINGS.widths[0], vocab_size=SETTINGS.vocabulary)
    dvae = Dvae(SETTINGS)
    dvae.load_state_dict(openai_state_dict(theirs.state_dict(), decoder.state_dict()))
    return dvae.requires_grad_(False).eval(), theirs.requires_grad_(False).eval()


def photograph(number: int, side: int) -> tuple[str, np.ndarray]:
    return "a photograph", draw_photograph(number, side * 4 // 3, side)


@dataclass(frozen=True)
class Shard:
    """A pair shard, and a token stage that carries the tokenizer."""

    task: TokenizeTask
    tar: Path
    rows: list[dict[str, Any]]

    @classmethod
    def new(cls, room: Path, dvae: Dvae) -> Shard:
        pairs, tokens = room / "pairs", room / "tokens"
        (tokens / "tokenizer").mkdir(parents=True)
        weights = tokens / "tokenizer" / "weights.safetensors"
        save_weights(weights, dvae.state_dict(), {"settings": asdict(dvae.settings)})
        digest = file_sha256(weights)
        ref = FileRef("tokenizer/weights.safetensors", weights.stat().st_size, digest)
        frozen = LocalStore(tokens)
        frozen.put(FROZEN_TOKENIZER, _json({"format": FORMAT, "file": asdict(ref)}))
        # Every fifth row is a rejected one.
        receipt = write_pair_shard(pairs, 0, list(range(PICTURES * 5 // 4)), side=384, draw=photograph)
        task = TokenizeTask(str(pairs), str(tokens), 0, 0, 0, receipt.digest, digest, TokensSettings())
        rows = [row for row in read_table(open_store(str(pairs)), receipt).to_pylist() if row["status"] == "success"]
        return cls(task, pairs / receipt.files["tar"].key, rows)

    def forget_codes(self) -> None:
        for name in ("data", "receipts", "attempts"):
            shutil.rmtree(Path(self.task.tokens, name), ignore_errors=True)

    def codes(self) -> np.ndarray:
        store = open_store(self.task.tokens)
        return np.array(read_table(store, read_receipts(store)[0])["codes"].to_pylist())


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()


def plain_loop(shard: Shard, encode: Callable[[np.ndarray], Tensor], size: int = ENCODE_BATCH) -> np.ndarray:
    """Decode, crop, encode, one after another."""
    codes, batch = [], []
    with shard.tar.open("rb") as file:
        for row in shard.rows:
            file.seek(row["tar_offset"])
            picture = decode_stored(file.read(row["jpg_size"]))
            rng = np.random.default_rng(derived_seed("crop", 0, row["uid"], 0))
            batch.append(transformer_crop(picture, SETTINGS.image_size, rng, crop=True)[0])
            if len(batch) == size:
                codes.append(encode(np.stack(batch)).numpy())
                batch.clear()
    if batch:
        codes.append(encode(np.stack(batch)).numpy())
    return np.concatenate(codes)


def with_openai(theirs: torch.nn.Module, pixels_BHWC: np.ndarray) -> Tensor:
    """As their notebook does."""
    from dall_e import map_pixels

    with torch.no_grad():
        images_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().div(255).contiguous()
        return theirs(map_pixels(images_BCHW)).argmax(dim=1).flatten(1)


def main() -> None:
    if "OMP_WAIT_POLICY" not in os.environ:  # it is read when torch is imported, and the commands set it before
        quiet_environment()
        os.execv(sys.executable, [sys.executable, "-m", "tests.bench.tokenize", *sys.argv[1:]])
    torch.set_num_threads(THREADS)
    where = device("torch", "simplejpeg", "opencv-python-headless")
    print(where)
    dvae, theirs = encoders()
    if "--tried" in sys.argv:
        tried(dvae)
        return
    with tempfile.TemporaryDirectory() as scratch:
        shard = Shard.new(Path(scratch), dvae)
        pictures = len(shard.rows)

        def ours() -> Measured:
            shard.forget_codes()
            return measured(tokenize_shard, shard.task, max(1, THREADS // 4))

        sides = {
            "ours": ours,
            "plain_loop": lambda: measured(plain_loop, shard, lambda pixels: dvae.encode(images_of(pixels))),
            "openai": lambda: measured(plain_loop, shard, partial(with_openai, theirs)),
        }
        small = encode_batch(SETTINGS, "cpu")
        sides["plain_loop_small"] = lambda: measured(plain_loop, shard, lambda p: dvae.encode(images_of(p)), small)
        sides["openai_small"] = lambda: measured(plain_loop, shard, partial(with_openai, theirs), small)
        for side in sides.values():
            side()  # the first use of a library is in no round
        turns = alternate(sides)
        for name in OTHERS:
            agreement = float((turns[name][-1].made == shard.codes()).mean())
            print(f"codes of {name} that are ours: {agreement:.4%}")
            assert agreement > 0.999, f"{name} makes other codes"
    print(f"{pictures} pictures, {THREADS} threads, medians of {ROUNDS} alternating rounds")
    print_table(turns, pictures, "picture")
    wall_s = {name: statistics.median(turn.wall_s for turn in rounds) for name, rounds in turns.items()}
    for name, seconds in wall_s.items():
        print(f"{name:18}{pictures / seconds:8.1f} pictures/s")
    ratios = {name: cpu_s(turns[name]) / cpu_s(turns["ours"]) for name in OTHERS}
    wall = {name: wall_s[name] / wall_s["ours"] for name in OTHERS}
    speed = {name: pictures / seconds for name, seconds in wall_s.items()}
    print_last_line("tokenize", where, ratios, wall_ratios=wall, pictures_per_s=speed, threads=THREADS)


def tried(dvae: Dvae) -> None:
    """CPU-milliseconds and wall ones a picture, of the encoder alone; variants in turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, SETTINGS.image_size, SETTINGS.image_size, 3), np.uint8)
    last = Dvae(SETTINGS).requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last.load_state_dict(dvae.state_dict())
    compiled = torch.compile(dvae.logits)
    example = images_of(pixels[:ENCODE_BATCH])
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(dvae.encoder, map_pixels(example))))

    def encode(model: Dvae, batch: int, threads: int, half: torch.dtype | None = None) -> Tensor:
        torch.set_num_threads(threads)
        encoding = Encoding(model, None)
        model.run_residuals_in(half)
        if half:
            with torch.inference_mode():
                return torch.cat([model.encode(images_of(pixels[i : i + batch])) for i in range(0, 128, batch)])
        return torch.cat([encoding(pixels[i : i + batch]) for i in range(0, 128, batch)])

    def encode_with(logits: Callable[[Tensor], Tensor]) -> Tensor:
        torch.set_num_threads(THREADS)
        dvae.run_residuals_in(None)
        with torch.inference_mode():
            batches = [images_of(pixels[i : i + ENCODE_BATCH]) for i in range(0, 128, ENCODE_BATCH)]
            return torch.cat([logits(images).argmax(dim=1).flatten(1) for images in batches])

    variants: dict[str, Callable[[], Tensor]] = {
        f"batch {batch}": partial(encode, dvae, batch, THREADS) for batch in (1, 2, 4, 8, 16, 32, 64, 128)
    }
    variants["1 thread"] = partial(encode, dvae, ENCODE_BATCH, 1)
    variants["weights channels last"] = partial(encode, last, ENCODE_BATCH, THREADS)
    variants["bfloat16 residual paths"] = partial(encode, dvae, ENCODE_BATCH, THREADS, torch.bfloat16)
    variants["torch.compile"] = partial(encode_with, compiled)
    variants["torch.jit, frozen"] = partial(encode_with, lambda images: frozen(map_pixels(images)))
    for name, work in list(variants.items()):
        try:
            work()
        except Exception as error:  # a compiler that is not there
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del variants[name]
    turns = alternate({name: partial(measured, work) for name, work in variants.items()}, 3)
    print_table(turns, 128, "picture")
    for name, rounds in turns.items():
        same = float((rounds[-1].made == turns["batch 64"][-1].made).double().mean())
        print(f"{name:26}{same:.4%} of the codes of batch 64")


if __name__ == "__main__":
    main()
