"""The transformer: the published table, what sees what, and a loss that no chunk and no split changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from models.attention import mask
from models.sampling import SampleSettings, sample
from models.text import BOS, EOS, PAD
from models.transformer import SelfAttention, Transformer, TransformerSettings, cross_entropy

SMALL = {
    "text_positions": 7,
    "text_vocabulary": 300,
    "grid": 4,
    "image_vocabulary": 50,
    "width": 32,
    "layers": 3,
    "heads": 4,
}


def build(**settings) -> Transformer:
    """With weights large enough that every input matters: at N(0, 0.02) a small model says next to nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(TransformerSettings(**{**SMALL, **settings}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(8)
    return model


def batch(model: Transformer, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    settings = model.settings
    text = torch.full((count, settings.text_positions), PAD)
    for row in range(count):
        length = 2 + row % (settings.text_positions - 2)
        text[row, 1:length] = torch.randint(2, settings.text_vocabulary, (length - 1,), generator=generator)
        text[row, 0], text[row, length] = BOS, EOS
    return text, torch.randint(0, settings.image_vocabulary, (count, settings.image_positions), generator=generator)


def test_the_defaults_have_the_published_parameters_item_by_item():
    with torch.device("meta"):
        model = Transformer(TransformerSettings())
    d = 3968
    assert all(p.is_meta for p in model.parameters())
    blocks = list(model.blocks.parameters())
    assert sum(p.numel() for p in blocks if p.dim() == 2) == 12 * 64 * d**2 == 12_092_178_432  # 12.09 B
    assert sum(p.numel() for p in blocks if p.dim() == 1) == 64 * 13 * d  # biases and gains
    items = {
        "tokens.weight": 16_384 * d,  # 65.0 M
        "codes.weight": 8_192 * d,  # 32.5 M
        "text_positions_TD": 256 * d,  # 1.0 M: these three are the published 98.5 M
        "rows_hD": 32 * d,
        "columns_wD": 32 * d,  # 0.25 M
        "pads_TD": 256 * d,  # 1.0 M
        "text_head.weight": 16_384 * d,
        "image_head.weight": 8_192 * d,  # 97.5 M untied
        "norm.weight": d,
        "norm.bias": d,
    }
    rest = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("blocks.")}
    assert rest == items
    assert round(sum(list(items.values())[:3]) / 1e6, 1) == 98.5


def test_a_model_built_on_meta_works_once_its_weights_are_assigned():
    weights = build().state_dict()
    with torch.device("meta"):
        empty = Transformer(TransformerSettings(**SMALL))
    empty.load_state_dict(weights, assign=True)
    text, codes = batch(empty)
    assert torch.equal(empty.image_logits(text, codes), build().image_logits(text, codes))


def test_the_masks_are_shared_and_no_part_of_the_weights():
    model = build(layers=9)
    assert {name for name, _ in model.named_buffers()} == {"mask_row", "mask_column", "mask_conv"}
    assert not any("mask" in name for name in model.state_dict())
    assert list(build(attention="dense").buffers()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [({"heads": 3}, "no multiple of heads"), ({"conv_kernel": 4}, "is even"), ({"depth": 2}, "depth")],
)
def test_sizes_that_do_not_fit_are_refused_in_words(change, words):
    with pytest.raises(ValidationError, match=words):
        TransformerSettings(**{**SMALL, **change})


# What sees what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "row", "column", "conv"])
def test_attention_reads_what_its_mask_allows_and_nothing_else(kind):
    settings = TransformerSettings(**{**SMALL, "conv_kernel": 3})
    torch.manual_seed(0)
    attention = SelfAttention(settings)
    allowed_SS = mask(kind, 7, 4, conv_kernel=3)
    x = torch.randn(1, 23, 32, requires_grad=True)
    out = attention(x, None if kind == "dense" else allowed_SS)
    reads_SS = torch.stack(
        [torch.autograd.grad(out[0, q].sum(), x, retain_graph=True)[0][0].abs().sum(-1) for q in range(23)]
    )
    assert torch.equal(reads_SS > 0, allowed_SS)


@pytest.mark.parametrize("attention", ["paper", "dense"])
def test_a_code_changes_the_prediction_of_later_codes_only(attention):
    model = build(attention=attention)
    text, codes = batch(model, 1)
    before = model.image_logits(text, codes)
    for n in (0, 5, 14):
        changed = codes.clone()
        changed[0, n] = (changed[0, n] + 1) % 50
        difference = (model.image_logits(text, changed) - before).abs().amax(dim=(0, 2))
        assert difference[: n + 1].max().item() == 0.0
        assert difference[n + 1 :].min().item() > 0.0  # row, column, conv together reach every later code


@pytest.mark.parametrize("attention", ["paper", "dense"])
def test_every_code_s_prediction_depends_on_every_text_position(attention):
    model = build(attention=attention)
    text, codes = batch(model, 1)
    before = model.image_logits(text, codes)
    with torch.no_grad():
        for position in range(7):
            model.text_positions_TD[position, 0] += 1
            assert float((model.image_logits(text, codes) - before).abs().amax(dim=(0, 2)).min()) > 0.0
            model.text_positions_TD[position, 0] -= 1


def test_a_pad_has_an_embedding_of_its_own_at_each_position():
    model = build()
    text = torch.tensor([[BOS, EOS, PAD, PAD, PAD, PAD, PAD]])
    embedded = model.embed_text(text)[0]
    assert torch.equal(embedded[2:], (model.pads_TD + model.text_positions_TD)[2:])
    assert torch.equal(embedded[:2], model.tokens(text[0, :2]) + model.text_positions_TD[:2])


def test_a_code_is_placed_by_its_row_and_its_column():
    model = build()
    codes = torch.full((1, 16), 3)
    n = 6  # row 1, column 2
    assert torch.allclose(
        model.embed_codes(codes)[0, n], model.codes.weight[3] + model.rows_hD[1] + model.columns_wD[2]
    )
    assert torch.allclose(model.embed_codes(codes[:, :1], n)[0, 0], model.embed_codes(codes)[0, n])


# The loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_tokens_and_codes():
    model = build()
    text, codes = batch(model)
    loss = model.loss(text, codes)
    states = model.states(text, codes)
    for row in range(3):
        nats, count = 0.0, 0
        for position in range(1, 7):
            target = int(text[row, position])
            if target != PAD:
                logits = model.text_head(states[row, position - 1])
                nats, count = nats - logits.log_softmax(0)[target].item(), count + 1
        assert loss.text_nats_B[row].item() == pytest.approx(nats, rel=1e-5)
        assert loss.text_tokens_B[row].item() == count == row + 2  # tokens and EOS, not BOS, not pads
        log_p = model.image_logits(text, codes)[row].log_softmax(dim=-1)
        image_nats = -sum(log_p[n, int(codes[row, n])].item() for n in range(16))
        assert loss.image_nats_B[row].item() == pytest.approx(image_nats, rel=1e-5)
    assert loss.image_codes == 16


def test_an_untrained_model_pays_about_the_whole_vocabulary():
    torch.manual_seed(0)
    model = Transformer(TransformerSettings(**SMALL))
    loss = model.loss(*batch(model))
    assert (loss.image_nats_B / 16).mean().item() == pytest.approx(math.log(50), rel=0.01)
    assert (loss.text_nats_B.sum() / loss.text_tokens_B.sum()).item() == pytest.approx(math.log(300), rel=0.01)


def test_the_objective_weighs_each_kind_over_its_own_tokens():
    model = build()
    text, codes = batch(model)
    loss = model(text, codes)
    per_token = loss.text_nats_B.sum() / (text[:, 1:] != PAD).sum()
    per_code = loss.image_nats_B.sum() / codes.numel()
    objective = loss.objective(1 / 8, int(loss.text_tokens_B.sum()), 3)
    assert objective.item() == pytest.approx((per_token / 8 + per_code * 7 / 8).item(), rel=1e-6)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    text, codes = batch(build(), 5)
    tokens = int((text[:, 1:] != PAD).sum())
    gradients = []
    for parts in ([slice(0, 5)], [slice(0, 1), slice(1, 3), slice(3, 5)]):
        model = build()
        for part in parts:
            model.loss(text[part], codes[part]).objective(1 / 8, tokens, 5).backward()
        gradients.append([p.grad for p in model.parameters()])
    for whole, added in zip(*gradients, strict=True):
        assert torch.allclose(whole, added, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 150, 10_000])
def test_chunks_change_neither_the_loss_nor_its_gradient(at_once: int):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 9, 6, generator=generator, requires_grad=True)
    weight = torch.randn(50, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (2, 9), generator=generator)
    targets[0, 4:] = PAD
    nats = cross_entropy(states, weight, targets, at_once)
    expected = F.cross_entropy((states @ weight.T).transpose(1, 2), targets, ignore_index=PAD, reduction="none")
    assert torch.allclose(nats, expected, atol=1e-6)
    assert nats[0, 4:].abs().sum() == 0
    for ours, theirs in zip(
        torch.autograd.grad(nats.sum(), [states, weight]),
        torch.autograd.grad(expected.sum(), [states, weight]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_chunks_hold_few_logits_at_a_time():
    # What the backward pass keeps of the head must not grow with the vocabulary.
    states, weight = torch.randn(1, 64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        cross_entropy(states, weight, torch.zeros(1, 64, dtype=torch.int64), at_once=4000)
    assert max(kept) < 64 * 1000 / 4


def test_a_few_steps_learn_a_few_pairs():
    model = Transformer(TransformerSettings(**SMALL))
    text, codes = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model.loss(text, codes)
        optimizer.zero_grad()
        loss.objective(1 / 8, int(loss.text_tokens_B.sum()), 3).backward()
        optimizer.step()
    assert (loss.image_nats_B / 16).mean().item() < 0.3  # from ln 50 = 3.9


# Speed and memory -------------------------------------------------------------------------------------------------


def learned(model: Transformer, text: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """The loss of one batch, and its gradients."""
    loss = model(text, codes).objective(1 / 8, int((text[:, 1:] != PAD).sum()), len(text))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def bytes_kept(model: Transformer, text: torch.Tensor, codes: torch.Tensor) -> int:
    """Bytes of different memory, weights excepted, that a forward pass keeps for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(text, codes)  # alive, so that no memory is given to two tensors
    del loss
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU it is for tests
def test_flex_attention_changes_no_state():
    model = build(layers=7, text_positions=9, grid=12, conv_kernel=5)  # row, column, conv
    text, codes = batch(model, 2)
    with torch.no_grad():  # on a CPU FlexAttention has no backward pass
        expected = model.states(text, codes)
        model.flex = True
        states = model.states(text, codes)
    assert (states - expected).abs().max().item() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_flex_attention_is_the_masked_attention():
    model = build(layers=7, width=64, text_positions=200, grid=24).cuda()
    text, codes = (part.cuda() for part in batch(model, 2))
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            model.flex = None
            assert model._uses_flex(text.device)
            states = model.states(text, codes)
            model.flex = False
            assert (states - model.states(text, codes)).abs().max().item() < 1e-5
    model.flex = False
    expected = learned(model, text, codes)
    model.flex = None
    model.compile_blocks()
    for ours, theirs in zip(learned(model, text, codes), expected, strict=True):
        assert (ours - theirs).norm().item() < 1e-4 * theirs.norm().item() + 1e-6


def test_on_a_cpu_nobody_needs_to_ask_for_masked_attention():
    assert not build(grid=16)._uses_flex(torch.device("cpu"))
    assert build(grid=16, heads=2)._uses_flex(torch.device("cuda"))
    assert not build(grid=16, heads=4)._uses_flex(torch.device("cuda"))  # heads of 8: narrower than its kernels
    assert not build(grid=8, heads=2)._uses_flex(torch.device("cuda"))  # 71 positions: one block


def test_recomputing_keeps_less_and_changes_no_bit():
    model = build(layers=7)
    text, codes = batch(model)
    expected, kept = learned(model, text, codes), bytes_kept(model, text, codes)
    model.recompute = True
    for ours, theirs in zip(learned(model, text, codes), expected, strict=True):
        assert torch.equal(ours, theirs)
    # A block keeps one state of its 16 and more.
    assert bytes_kept(model, text, codes) < kept / 4
    with torch.no_grad():
        assert torch.equal(model(text, codes).image_nats_B, model(text, codes).image_nats_B)


of_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@of_dynamo
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_same_names_state_loss_and_samples(recompute):
    model = build(layers=3)
    text, codes = batch(model)
    names, expected = list(model.state_dict()), learned(model, text, codes)
    drawn = sample(model, text, SampleSettings(), [1, 2, 3])
    model.recompute = recompute
    model.compile_blocks(backend="aot_eager")
    assert list(model.state_dict()) == names
    for ours, theirs in zip(learned(model, text, codes), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(sample(model, text, SampleSettings(), [1, 2, 3]), drawn)
    average = copy.deepcopy(model)  # as Ema makes it
    assert torch.allclose(average.image_logits(text, codes), model.image_logits(text, codes), atol=1e-5)


@of_dynamo
def test_equal_blocks_share_one_compiled_form_and_sampling_makes_none():
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model = build(layers=9)
    text, codes = batch(model)
    model.compile_blocks(backend=count)
    with torch.no_grad():
        model(text, codes)
        assert len(compiled) == 1  # masks are an argument
        sample(model, text, SampleSettings(), [1, 2, 3])
    assert len(compiled) == 1
    torch._dynamo.reset()
