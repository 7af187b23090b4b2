"""The tiled attention against the library's, and what packing, windows and the cache must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.sight import Batch, visible
from danlu.model.tiled_attention import make_tiles, tiled_attention
from danlu.model.transformer import Decoder


def by_mask(query, key, value, bias, causal, window, segments, prefix):
    """The same attention by scaled_dot_product_attention with an explicit mask."""
    positions = torch.arange(query.shape[1]).expand(len(query), -1)
    if segments is not None:  # from 0 in each document
        starts = [[row.index(number) for number in row] for row in segments.tolist()]
        positions = positions - torch.tensor(starts)
    mask = visible(causal, window, Batch(positions, segments, prefix))
    mixed = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attn_mask=mask if bias is None else bias.masked_fill(~mask, float("-inf")),
        enable_gqa=True,
        scale=1.0,
    )
    return mixed.transpose(1, 2)


@st.composite
def cases(draw):
    length = draw(st.integers(1, 300))
    rows = draw(st.integers(1, 3))
    cuts = [sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=4))) for _ in range(rows)]
    segments = torch.stack(
        [sum((torch.arange(length) >= cut).int() for cut in row) + torch.ones(length) for row in cuts]
    )
    packed = draw(st.booleans())
    causal, keep = draw(st.booleans()), draw(st.sampled_from([0, 1, 40, 1000]))
    window = draw(st.sampled_from([None, 1, 7, 64, 500])) if causal else None
    prefixes = st.lists(st.integers(0, length), min_size=rows, max_size=rows)
    prefix = torch.tensor(draw(prefixes)) if causal and window is None and draw(st.booleans()) else None
    biased = draw(st.booleans())
    return length, rows, causal, window, segments.int() if packed else None, prefix, keep, biased


@settings(max_examples=40, deadline=None)
@given(cases())
def test_equals_masked_attention_with_gradients(case):
    length, rows, causal, window, segments, prefix, keep, biased = case
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(rows, length, heads, 8, generator=generator) for heads in (4, 2, 2)]
    inputs[0] *= 8**-0.5  # queries come scaled
    upstream = torch.randn(rows, length, 4, 8, generator=generator)
    tiles = make_tiles(rows, length, segments, causal=causal, window=window, prefix=prefix)
    if biased:
        inputs.append(torch.randn(4, length, length, generator=generator))
    exact = [x.double().requires_grad_() for x in inputs]  # sums of hundreds round differently in fp32
    inputs = [x.requires_grad_() for x in inputs]
    ours, _ = tiled_attention(*inputs[:3], tiles, window or 0, keep, inputs[3] if biased else None)
    theirs = by_mask(*exact[:3], exact[3] if biased else None, causal, window or 0, segments, prefix)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    gradients = zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, exact, upstream.double()), strict=True
    )
    for mine, other in gradients:
        torch.testing.assert_close(mine.double(), other, atol=2e-5, rtol=1e-5)


def test_padding_is_skipped_and_gets_no_gradient():
    segments = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.int32)
    inputs = [torch.randn(2, 5, heads, 4, requires_grad=True) for heads in (2, 1, 1)]
    mixed, _ = tiled_attention(*inputs, make_tiles(2, 5, segments), 0, 0)
    assert mixed[0, 3:].abs().sum() == 0 and mixed[1].abs().sum() == 0
    for gradient in torch.autograd.grad(mixed.sum(), inputs):
        assert gradient[0, 3:].abs().sum() == 0 and gradient[1].abs().sum() == 0


def tiny(**changes) -> Decoder:
    shape = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8}
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**shape, "feedforward_width": 48, "context": 256, "tied": True, **changes})).eval()


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_cached_in_pieces_equals_uncached(window):
    model, tokens = tiny(sliding_window=window), torch.randint(0, 50, (3, 40))
    whole, cache = model(tokens), model.new_cache(3, 64)
    pieces = [model(part, cache=cache) for part in tokens.split([17, 1, 22], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_tokens_and_other_documents_change_nothing():
    model, tokens = tiny(), torch.randint(0, 50, (1, 90))
    segments = torch.tensor([[1] * 30 + [2] * 60], dtype=torch.int32)
    positions = torch.cat([torch.arange(30), torch.arange(60)])[None]
    packed = model(tokens, segments=segments, positions=positions)
    torch.testing.assert_close(packed[:, :30], model(tokens[:, :30]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed[:, 30:], model(tokens[:, 30:]), atol=1e-6, rtol=1e-6)
    changed = tokens.clone()
    changed[0, 50] = (changed[0, 50] + 1) % 50
    again = model(changed, segments=segments, positions=positions)
    assert torch.equal(again[:, :50], packed[:, :50]) and not torch.equal(again[:, 50:], packed[:, 50:])


def test_too_long_is_refused_with_both_numbers():
    model = tiny()
    with pytest.raises(DanluError, match=r"257 .* 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))
    with pytest.raises(DanluError, match="5 tokens do not fit in a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=model.new_cache(1, 4))


@pytest.mark.parametrize(("length", "keep"), [(6, 0), (150, 0), (128, 128)])
def test_what_the_compiler_is_told_of_the_operator_is_true(length, keep):
    # What is kept is compared too, so it has to be whole: none, or all of one tile.
    inputs = [torch.randn(2, length, heads, 8, requires_grad=True) for heads in (6, 3, 3)]
    torch.library.opcheck(tiled_attention, (*inputs, make_tiles(2, length, None), 0, keep))
    bias = torch.randn(6, length, length, requires_grad=True)
    torch.library.opcheck(tiled_attention, (*inputs, make_tiles(2, length, None), 0, keep, bias))


def test_neighbouring_rows_that_lie_alike_share_tiles():
    segments = torch.tensor([[1] * 60 + [2] * 100, [1] * 60 + [2] * 100, [1] * 160]).int()
    tiles = [tuple(tile) for tile in make_tiles(3, 160, segments).tolist()]
    shared = [(0, 2, 0, 60, 0, 60, 1), (0, 2, 60, 160, 60, 160, 1)]
    assert tiles == [*shared, (2, 3, 0, 128, 0, 128, 1), (2, 3, 128, 160, 0, 160, 1), (0,) * 7, (0,) * 7]


def test_kept_probabilities_change_no_bit():
    query, key, value = (torch.randn(2, 300, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    tiles = make_tiles(2, 300, None)
    gradients = []
    for keep, kept in [(0, 0), (64, 64), (300, 300), (9999, 300)]:
        mixed, probabilities = tiled_attention(query, key, value, tiles, 0, keep)
        assert probabilities.numel() == 2 * 300 * 4 * kept
        gradients.append(torch.autograd.grad(mixed.square().sum(), (query, key, value)))
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))
