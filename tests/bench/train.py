"""Benchmark of the transformer's training: forward and backward, against nanoGPT's own file and transformers' GPT-2.

    NANOGPT=FILE make bench STAGE=train      (FILE: model.py of github.com/karpathy/nanoGPT, fetched for the run)

Three shapes, the paper's masks on our side, causal ones on theirs. All sides have the same width, layers, heads and
positions; theirs have one vocabulary, the union of our two, and score each token against all of it: what our two heads
save is in the ratios. They take turns in one process: on a CPU in fp32 and one thread, on a GPU in bf16, all compiled.
On a CPU ratios are of CPU-seconds, on a GPU of time, and the device's share of its peak (MFU) is told both ways.
`ratios` has each rival's worst shape. transformers (extra: learn) may be absent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.blocks import compile_each
from models.text import BOS
from models.transformer import Transformer, TransformerSettings
from ops.estimate import GPUS, flops
from tests.bench.harness import ROUNDS, Measured, alternate, cpu_s, device, measured, print_last_line, print_table

Step = Callable[[], Tensor]
"""A forward and backward pass; gives the mean loss in nats a token."""


def _shape(text: int, grid: int, vocabularies: tuple[int, int], width: int, layers: int, heads: int) -> dict[str, int]:
    names = ("text_positions", "grid", "text_vocabulary", "image_vocabulary", "width", "layers", "heads")
    return dict(zip(names, (text, grid, *vocabularies, width, layers, heads), strict=True))


SHAPES: dict[str, list[tuple[dict[str, int], int, int]]] = {
    "cpu": [
        (_shape(16, 8, (1024, 512), 160, 4, 5), 24, 4),
        (_shape(64, 16, (4096, 2048), 256, 4, 4), 4, 2),
        (_shape(128, 32, (8192, 8192), 384, 3, 6), 1, 1),
    ],
    "cuda": [
        (_shape(128, 32, (16384, 8192), 768, 12, 12), 16, 10),
        (_shape(256, 32, (16384, 8192), 1024, 24, 16), 8, 10),
        (_shape(256, 32, (16384, 8192), 2048, 12, 32), 8, 10),
    ],
}
"""Settings, pictures of a step, steps of a round: the laptop preset's, a middle one, and the paper's grid."""


def sides_of(settings: TransformerSettings, pictures: int, on: str) -> dict[str, Step]:
    """A step of each side, on the same tokens; theirs are ours in one sequence, codes after the text's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(2, settings.text_vocabulary, (pictures, settings.text_positions), generator=generator)
    text_BT[:, 0] = BOS
    N = settings.image_positions
    codes_BN = torch.randint(settings.image_vocabulary, (pictures, N), generator=generator)
    text_BT, codes_BN = text_BT.to(on), codes_BN.to(on)
    tokens_BS = torch.cat([text_BT, codes_BN + settings.text_vocabulary], dim=1)
    targets_BS = torch.cat([tokens_BS[:, 1:], torch.full_like(tokens_BS[:, :1], -1)], dim=1)
    torch.manual_seed(0)
    sides = {"ours": _ours(settings, text_BT, codes_BN)}
    if path := os.environ.get("NANOGPT"):
        sides["nanogpt"] = _nanogpt(Path(path), settings, tokens_BS, targets_BS)
    if importlib.util.find_spec("transformers"):
        sides["gpt2_transformers"] = _gpt2(settings, tokens_BS)
    return sides


def _step(model: torch.nn.Module, loss: Callable[[], Tensor], on: torch.device) -> Step:
    is_gpu = on.type == "cuda"

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if is_gpu else contextlib.nullcontext():
            nats = loss()
        nats.backward()
        return nats.detach()

    return step


def _ours(settings: TransformerSettings, text_BT: Tensor, codes_BN: Tensor) -> Step:
    model = Transformer(settings).to(text_BT.device)
    if text_BT.is_cuda:
        compile_each(model.blocks)
    tokens = text_BT.shape[0] * (settings.text_positions - 1)

    def loss() -> Tensor:
        # The text's share of the tokens as its weight: the mean over all, as theirs.
        share = (settings.text_positions - 1) / (settings.text_positions - 1 + settings.image_positions)
        return model(text_BT, codes_BN).objective(share, tokens, len(text_BT))

    return _step(model, loss, text_BT.device)


def _nanogpt(path: Path, settings: TransformerSettings, tokens_BS: Tensor, targets_BS: Tensor) -> Step:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=tokens_BS.shape[1],
        vocab_size=settings.text_vocabulary + settings.image_vocabulary,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_embd=settings.width,
        dropout=0.0,
        bias=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its parameters
        model = module.GPT(config).to(tokens_BS.device)
    run = torch.compile(model) if tokens_BS.is_cuda else model
    return _step(model, lambda: run(tokens_BS, targets_BS)[1], tokens_BS.device)


def _gpt2(settings: TransformerSettings, tokens_BS: Tensor) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=settings.text_vocabulary + settings.image_vocabulary,
        n_positions=tokens_BS.shape[1],
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(tokens_BS.device)
    run = torch.compile(model) if tokens_BS.is_cuda else model
    return _step(model, lambda: run(input_ids=tokens_BS, labels=tokens_BS).loss, tokens_BS.device)


def check(losses: Mapping[str, float], settings: TransformerSettings) -> None:
    """Every side really scores the tokens: an untrained model pays about its whole vocabulary."""
    text, image = settings.text_positions - 1, settings.image_positions
    ours = (text * math.log(settings.text_vocabulary) + image * math.log(settings.image_vocabulary)) / (text + image)
    union = math.log(settings.text_vocabulary + settings.image_vocabulary)
    for side, nats in losses.items():
        expected = ours if side == "ours" else union
        assert abs(nats - expected) < 0.1 * expected, f"{side} pays {nats:.2f} nats a token, not about {expected:.2f}"


def seconds(turns: Sequence[Measured], on: str) -> float:
    """Median of a side's rounds: of its CPU, or on a GPU of the clock."""
    return cpu_s(turns) if on == "cpu" else statistics.median(turn.wall_s for turn in turns)


def compare(settings: TransformerSettings, pictures: int, steps: int, on: str) -> dict[str, Any]:
    """All sides in turn on one shape."""
    sides = sides_of(settings, pictures, on)
    check({name: float(step()) for name, step in sides.items()}, settings)  # and all is compiled

    def work(step: Step) -> float:
        for _ in range(steps):
            nats = step()
        return float(nats)  # waits for the device

    turns = alternate({name: lambda step=step: measured(work, step) for name, step in sides.items()})
    positions, done = settings.text_positions + settings.image_positions, steps * pictures
    print(f"\n{settings.layers} layers of {settings.width}, {pictures} pictures of {positions} positions a step")
    print_table(turns, done, "picture")
    took = {name: seconds(rounds, on) for name, rounds in turns.items()}
    told: dict[str, Any] = {
        "width": settings.width,
        "layers": settings.layers,
        "positions": positions,
        "tokens_a_second": {name: done * positions / second for name, second in took.items()},
        "ratios": {name: second / took["ours"] for name, second in took.items() if name != "ours"},
    }
    if on == "cuda":
        told["mfu"] = _mfu(settings, done / took["ours"])
    return told


def _mfu(settings: TransformerSettings, pictures_a_second: float) -> dict[str, float]:
    name = torch.cuda.get_device_name()
    peak = next((card.bf16_flops for kind, card in GPUS.items() if kind in name), math.nan)
    each = flops(settings)
    return {
        "conventional": each.conventional * pictures_a_second / peak,
        "mask_aware": each.mask_aware * pictures_a_second / peak,
    }


def main() -> None:
    if not os.environ.get("NANOGPT"):
        raise SystemExit("NANOGPT is not set: fetch model.py of github.com/karpathy/nanoGPT and name the file in it")
    on = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    packages = ["torch", *(["transformers"] if importlib.util.find_spec("transformers") else [])]
    where = device(*packages) + (f", {torch.cuda.get_device_name()}" if on == "cuda" else ", 1 thread")
    print(where)
    print(f"forward and backward, medians of {ROUNDS} alternating rounds")
    shapes = [compare(TransformerSettings(**shape), pictures, steps, on) for shape, pictures, steps in SHAPES[on]]
    worst = {rival: min(shape["ratios"][rival] for shape in shapes) for rival in shapes[0]["ratios"]}
    print_last_line("train", where, worst, shapes=shapes)


if __name__ == "__main__":
    main()
