"""Which weights decay."""

from __future__ import annotations

import torch

from models.dvae import Dvae, DvaeSettings
from models.optimizer import parameter_groups
from models.transformer import Transformer, TransformerSettings


def test_matrices_decay_and_biases_and_gains_do_not_and_nothing_is_left_out():
    with torch.device("meta"):
        models = [
            Transformer(TransformerSettings(width=64, layers=2, heads=2)),
            Dvae(DvaeSettings(widths=(64, 64), image_size=8)),
        ]
    for model in models:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, kept = parameter_groups(model.parameters(), 0.045)
        assert decayed["weight_decay"] == 0.045
        assert kept["weight_decay"] == 0.0
        assert {id(p) for p in decayed["params"] + kept["params"]} == set(names)
        assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in kept["params"])
        assert not any(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in decayed["params"])


def test_a_frozen_weight_is_in_no_group():
    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    decayed, kept = parameter_groups(layer.parameters(), 0.1)
    assert (decayed["params"], len(kept["params"])) == ([], 1)
