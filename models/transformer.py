"""Stage two: one decoder-only transformer over a caption and its picture's codes (paper, §2.2 and App. B).

The sequence has S = T + N positions: text (BOS first, pads last), then the N = grid² codes in raster order. The output
at position i predicts what stands at i + 1: text positions 0 … T − 2 the next token (pads are predicted nowhere), the
last text position the first code, each code the next one; the last output is not used.

Pads are no tokens: each text position has a pad embedding of its own, and all positions attend to them (§2.2).
Text and codes have separate heads, so that neither spends logits, nor top-k, on the other's vocabulary.

Three switches of a model change its speed and memory, never its results but for their last bits: `flex`, `recompute`,
and `compile_blocks`. They are attributes, not settings: whoever trains knows the machine.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import (
    BLOCK,
    LEAST_HEAD_WIDTH,
    Kind,
    SparseMask,
    keep_compiled_forms,
    layer_kinds,
    mask,
    sparse_mask,
)
from models.attention import Attention as AttentionPattern
from models.text import PAD

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

LOGITS_AT_ONCE = 1 << 24
"""Most logits held at a time by the loss: 64 MiB in fp32. A published batch has 12.6 M a picture."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TransformerSettings:
    """Sizes and regularisation of the transformer. The defaults are the published model (App. B)."""

    text_positions: Annotated[int, Field(ge=2)] = 256
    """Positions of a caption, T: BOS, tokens, EOS, pads."""
    text_vocabulary: Annotated[int, Field(ge=258)] = 16_384
    """Text tokens, BOS, EOS and the 256 bytes included."""
    grid: Count = 32
    """Codes a side; the picture has grid² positions."""
    image_vocabulary: Annotated[int, Field(ge=2)] = 8_192
    """Codes of the picture tokenizer."""
    width: Count = 3_968
    """Width of the states, D."""
    layers: Count = 64
    """Blocks of attention and MLP."""
    heads: Count = 62
    """Attention heads, each width / heads wide (64 in the paper)."""
    mlp_ratio: Count = 4
    """Inner width of the MLP over the width."""
    attention: AttentionPattern = "paper"
    """"paper": row, column and, last, convolutional layers over the codes; "dense": all codes before."""
    conv_kernel: Count = 11
    """Side of the convolutional layer's window, codes, odd."""
    text_loss_share: Share = 1 / 8
    """Weight of the text's cross-entropy; the codes' has the rest (§2.2)."""
    bpe_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Probability that a possible BPE merge is skipped, in training (§2.2)."""
    caption_dropout: Share = 0.0
    """Share of captions replaced by "" in training, which guidance needs; not in the paper, hence 0."""

    @property
    def image_positions(self) -> int:
        """Codes of a picture, N."""
        return self.grid**2

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} is even: the window has its position in the middle")
        return self


class Cache:
    """Keys and values of every layer and position, allocated once: [2, B, K, S, E] a layer.

    In the precision that attention runs in: autocast's where it is on, else that of the weights.
    """

    def __init__(self, model: Transformer, batch: int) -> None:
        settings = model.settings
        positions = settings.text_positions + settings.image_positions
        shape = (2, batch, settings.heads, positions, settings.width // settings.heads)
        weight = model.codes.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.layers = [torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(settings.layers)]


class SelfAttention(nn.Module):
    """Multi-head attention under a mask; with a cache, over all positions up to the last one given."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.out = nn.Linear(settings.width, settings.width)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | SparseMask | None, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Same shape. `mask` is mask_SS, in blocks, or None: causal. With `cache` (2BKSE), which no mask in blocks goes
        with, `x_BSD` begins at position `start`."""
        B, S, D = x_BSD.shape
        if isinstance(mask, SparseMask):
            x_BSD = mask.arranged(x_BSD)
        q_BKSE, k_BKSE, v_BKSE = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = start + S
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k_BKSE, v_BKSE
            k_BKSE, v_BKSE = cache[:, :, :, :end]
        if isinstance(mask, SparseMask):
            attended = mask.attend(q_BKSE, k_BKSE, v_BKSE)
        else:
            attended = F.scaled_dot_product_attention(
                q_BKSE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None and S > 1
            )
        out_BSD: Tensor = self.out(attended.transpose(1, 2).reshape(B, S, D))
        return mask.arranged(out_BSD) if isinstance(mask, SparseMask) else out_BSD


class Block(nn.Module):
    """Pre-norm residual block: attention, then a GELU MLP."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.width)
        self.attention = SelfAttention(settings)
        self.mlp_norm = nn.LayerNorm(settings.width)
        self.mlp_in = nn.Linear(settings.width, settings.mlp_ratio * settings.width)
        self.mlp_out = nn.Linear(settings.mlp_ratio * settings.width, settings.width)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | SparseMask | None, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Same shape; see `SelfAttention.forward`."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask, cache, start)
        out_BSD: Tensor = x_BSD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BSD)), approximate="tanh"))
        return out_BSD


class Transformer(nn.Module):
    """The model of p(caption, codes). Weights are drawn from torch's default generator, on any device, meta too."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.settings = settings
        # FlexAttention under the paper's masks; None: on a GPU, for sizes that its kernels take and gain from.
        self.flex: bool | None = None
        # Keep only each block's input for the backward pass, and run the block again there: a third more work.
        self.recompute = False
        self._is_compiled = False
        D, T = settings.width, settings.text_positions
        self.tokens = nn.Embedding(settings.text_vocabulary, D)
        self.pads_TD = nn.Parameter(torch.empty(T, D))
        self.text_positions_TD = nn.Parameter(torch.empty(T, D))
        self.codes = nn.Embedding(settings.image_vocabulary, D)
        self.rows_hD = nn.Parameter(torch.empty(settings.grid, D))
        self.columns_wD = nn.Parameter(torch.empty(settings.grid, D))
        self.kinds = layer_kinds(settings.layers, settings.attention)
        self.blocks = nn.ModuleList(Block(settings) for _ in self.kinds)
        self.norm = nn.LayerNorm(D)
        self.text_head = nn.Linear(D, settings.text_vocabulary, bias=False)
        self.image_head = nn.Linear(D, settings.image_vocabulary, bias=False)
        for kind in set(self.kinds) - {"dense"}:  # one mask for all layers of a kind; the dense one is the kernel's own
            mask_SS = mask(kind, T, settings.grid, settings.conv_kernel)
            self.register_buffer(f"mask_{kind}", mask_SS, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's rule; the paper gives none. N(0, 0.02), the 2L projections back into the stream N(0, 0.02/√(2L))."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            elif name.endswith(("attention.out.weight", "mlp_out.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.settings.layers))
            else:
                nn.init.normal_(parameter, std=0.02)

    # The two halves of a sequence -----------------------------------------------------------------------------------

    def embed_text(self, text_BT: Tensor) -> Tensor:
        """states_BTD of tokens or, at −1, of the position's own pad."""
        is_pad_BT1 = (text_BT == PAD)[:, :, None]
        tokens_BTD = self.tokens(text_BT.clamp(min=0))
        return torch.where(is_pad_BT1, self.pads_TD, tokens_BTD) + self.text_positions_TD

    def embed_codes(self, codes_BN: Tensor, start: int = 0) -> Tensor:
        """states_BND of codes at raster positions start, start + 1, …: code + row + column."""
        positions_ND = (self.rows_hD[:, None] + self.columns_wD[None, :]).flatten(0, 1)
        states_BND: Tensor = self.codes(codes_BN) + positions_ND[start : start + codes_BN.shape[1]]
        return states_BND

    def _mask(self, kind: Kind) -> Tensor | None:
        return None if kind == "dense" else self.get_buffer(f"mask_{kind}")

    def _mask_of_all(self, kind: Kind, device: torch.device) -> Tensor | SparseMask | None:
        """The mask of a layer that sees the whole sequence. A dense one has a kernel of its own, the causal one."""
        if kind == "dense" or not self._uses_flex(device):
            return self._mask(kind)
        settings = self.settings
        return sparse_mask(kind, settings.text_positions, settings.grid, settings.conv_kernel, device)

    def _uses_flex(self, device: torch.device) -> bool:
        if self.flex is not None:
            return self.flex
        settings = self.settings
        has_blocks = settings.text_positions + settings.image_positions > BLOCK
        return device.type == "cuda" and has_blocks and settings.width // settings.heads >= LEAST_HEAD_WIDTH

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles each block where it stands: names and state stay. Equal blocks share their compiled form.

        With FSDP2, shard first. Steps of sampling stay uncompiled: each has a mask of its own length.
        """
        keep_compiled_forms()
        for block in self.blocks:
            block.compile(backend=backend)
        self._is_compiled = True

    def _uncompiled(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def states(self, text_BT: Tensor, codes_BN: Tensor) -> Tensor:
        """states_BSD after the last norm, over the whole sequence."""
        x_BSD = torch.cat([self.embed_text(text_BT), self.embed_codes(codes_BN)], dim=1)
        masks = {kind: self._mask_of_all(kind, x_BSD.device) for kind in set(self.kinds)}
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random: no state of a generator has to be brought back.
                x_BSD = checkpoint(block, x_BSD, masks[kind], use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD = block(x_BSD, masks[kind])
        normed_BSD: Tensor = self.norm(x_BSD)
        return normed_BSD

    # Training and scores --------------------------------------------------------------------------------------------

    def loss(self, text_BT: Tensor, codes_BN: Tensor) -> TransformerLoss:
        """Cross-entropies, summed over each caption and each picture."""
        T = self.settings.text_positions
        states_BSD = self.states(text_BT, codes_BN)
        targets_BT = text_BT[:, 1:]
        text_nats_BT = cross_entropy(states_BSD[:, : T - 1], self.text_head.weight, targets_BT)
        image_nats_BN = cross_entropy(states_BSD[:, T - 1 : -1], self.image_head.weight, codes_BN)
        return TransformerLoss(
            text_nats_B=text_nats_BT.sum(dim=1),
            text_tokens_B=(targets_BT != PAD).sum(dim=1),
            image_nats_B=image_nats_BN.sum(dim=1),
            image_codes=codes_BN.shape[1],
        )

    def forward(self, text_BT: Tensor, codes_BN: Tensor) -> TransformerLoss:
        """`loss`, so that a wrapper such as DDP sees a forward pass."""
        return self.loss(text_BT, codes_BN)

    def image_logits(self, text_BT: Tensor, codes_BN: Tensor) -> Tensor:
        """logits_BNV: entry n is of code n given the caption and codes before n. All at once, for tests and scores."""
        logits_BNV: Tensor = self.image_head(self.states(text_BT, codes_BN)[:, self.settings.text_positions - 1 : -1])
        return logits_BNV

    # Sampling -------------------------------------------------------------------------------------------------------

    def prefill(self, text_BT: Tensor, cache: Cache) -> Tensor:
        """Fills the cache with the caption and returns logits_BV of code 0. Text is causal in layers of every kind."""
        x_BTD = self.embed_text(text_BT)
        with self._uncompiled():
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x_BTD = block(x_BTD, None, layer)
        logits_BV: Tensor = self.image_head(self.norm(x_BTD[:, -1]))
        return logits_BV

    def step(self, codes_B: Tensor, position: int, cache: Cache) -> Tensor:
        """Adds the code at raster position `position` to the cache and returns logits_BV of the next one."""
        at = self.settings.text_positions + position
        x_B1D = self.embed_codes(codes_B[:, None], position)
        with self._uncompiled():
            for block, kind, layer in zip(self.blocks, self.kinds, cache.layers, strict=True):
                mask_SS = self._mask(kind)
                x_B1D = block(x_B1D, None if mask_SS is None else mask_SS[at : at + 1, : at + 1], layer, at)
        logits_BV: Tensor = self.image_head(self.norm(x_B1D[:, 0]))
        return logits_BV


@plain_dataclass(frozen=True)
class TransformerLoss:
    """Sums per caption and per picture, so that batches can be split, spread over workers and added up."""

    text_nats_B: Tensor
    """Cross-entropy of all tokens after BOS, EOS included."""
    text_tokens_B: Tensor
    """How many those are."""
    image_nats_B: Tensor
    """Cross-entropy of all codes."""
    image_codes: int
    """Codes of each picture, N."""

    def objective(self, text_loss_share: float, text_tokens: Tensor | int, pictures: int) -> Tensor:
        """What is minimised: share · nats per token + (1 − share) · nats per code, each kind over its own tokens.

        `text_tokens` and `pictures` count the *whole* batch, over all its parts and workers: the gradients of the
        parts then add up to that of the batch.
        """
        text_nats = self.text_nats_B.sum() / text_tokens
        image_nats = self.image_nats_B.sum() / (pictures * self.image_codes)
        return text_loss_share * text_nats + (1.0 - text_loss_share) * image_nats


def cross_entropy(states_BND: Tensor, weight_VD: Tensor, targets_BN: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """nats_BN of `targets_BN` under softmax(states · weightᵀ), 0 where the target is −1.

    At most about `at_once` logits exist at a time: more are taken in chunks of rows, each computed again in the
    backward pass. The values do not change.
    """
    states_MD, targets_M = states_BND.flatten(0, 1), targets_BN.flatten()
    rows = max(1, at_once // weight_VD.shape[0])
    if rows >= len(targets_M):
        nats_M = _cross_entropy(states_MD, weight_VD, targets_M)
    else:
        chunks = zip(states_MD.split(rows), targets_M.split(rows), strict=True)
        parts = [
            checkpoint(_cross_entropy, states, weight_VD, targets, use_reentrant=False) for states, targets in chunks
        ]
        nats_M = torch.cat(parts)
    return nats_M.view_as(targets_BN)


def _cross_entropy(states_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    logits_MV = F.linear(states_MD, weight_VD).float()
    return F.cross_entropy(logits_MV, targets_M, ignore_index=PAD, reduction="none")
