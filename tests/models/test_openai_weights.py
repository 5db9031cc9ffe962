"""The reference: OpenAI's own code and ours give the same numbers with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.dvae import Dvae, DvaeSettings
from models.openai_weights import openai_state_dict


def test_openai_s_weights_give_openai_s_logits_and_statistics():
    dall_e = pytest.importorskip("dall_e")
    generator = torch.Generator().manual_seed(0)
    encoder = dall_e.encoder.Encoder(n_hid=64, vocab_size=512)
    decoder = dall_e.decoder.Decoder(n_hid=64, vocab_size=512)
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        if parameter.dim() == 1:  # zero biases would hide a wrong one
            parameter.data.normal_(std=0.1, generator=generator)
    ours = Dvae(DvaeSettings(image_size=64, widths=(64, 128, 256, 512), vocabulary=512, ln_b_min=-99, ln_b_max=99))
    ours.load_state_dict(openai_state_dict(encoder.state_dict(), decoder.state_dict()))

    images = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        theirs = encoder(dall_e.map_pixels(images))
        assert torch.allclose(ours.logits(images), theirs, atol=1e-5)
        one_hot = F.one_hot(theirs.argmax(dim=1), 512).permute(0, 3, 1, 2).float()
        statistics = decoder(one_hot)
        mu, ln_b = ours.statistics_of_codes(ours.encode(images))
        assert torch.allclose(torch.cat([mu, ln_b], dim=1), statistics, atol=1e-5)
        drawn = dall_e.unmap_pixels(torch.sigmoid(statistics[:, :3]))
        assert torch.allclose(ours.decode(ours.encode(images)), drawn, atol=1e-5)


def test_a_name_that_is_not_openai_s_is_refused():
    with pytest.raises(ValueError, match=r"'blocks\.input\.gamma' is no parameter of OpenAI's dVAE"):
        openai_state_dict({"blocks.input.gamma": torch.zeros(1)}, {})
