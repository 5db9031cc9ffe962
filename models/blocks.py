"""What can be done to a model's blocks, one by one, without a change of its results, names or state.

Both models have `blocks`: modules that hold most of the weights, each called through its `forward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.attention import keep_compiled_forms


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Each block keeps only what it is given for the backward pass, and runs again there: a third more work.

    To be called before FSDP2 wraps a block: its shares are put together once for the backward pass then, not twice.
    """
    for block in blocks:  # nothing in them is random: no state of a generator has to be brought back
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_each(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compiles each block where it stands; equal blocks share their compiled form. With FSDP2, shard first.

    For training: a step of sampling would be compiled for each length.
    """
    keep_compiled_forms()
    for block in blocks:
        block.compile(backend=backend)
