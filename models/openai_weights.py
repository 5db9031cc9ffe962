"""OpenAI's published dVAE weights under our names. No file is read here: state dicts in, a state dict out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def openai_state_dict(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's two state dicts (published as encoder.pkl and decoder.pkl) under our names, for `Dvae.load_state_dict`.

    `blocks.group_2.block_1.res_path.conv_3.w` becomes `encoder.groups.1.0.conv_3.weight`. Raises ValueError for a name
    that is none of theirs. Their files are whole pickled modules that fail on torch ≥ 1.11: take `.state_dict()` of
    them under an older torch, or rebuild the modules with the `dall_e` package.
    """
    ours = {}
    for half, state in (("encoder", encoder), ("decoder", decoder)):
        for name, tensor in state.items():
            ours[f"{half}.{_our_name(name)}"] = tensor
    return ours


_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.(?:res_path\.(conv_[1-4])|(id_path))\.([wb])")
_END = re.compile(r"blocks\.(?:(input)|(output)\.conv)\.([wb])")


def _our_name(name: str) -> str:
    kinds = {"w": "weight", "b": "bias"}
    if match := _BLOCK.fullmatch(name):
        group, block, convolution, _, kind = match.groups()
        return f"groups.{int(group) - 1}.{int(block) - 1}.{convolution or 'skip'}.{kinds[kind]}"
    if match := _END.fullmatch(name):
        return f"{match[1] or match[2]}.{kinds[match[3]]}"
    raise ValueError(f"{name!r} is no parameter of OpenAI's dVAE")
