"""Who sees whom: the fast ways against the mask that defines it, and the parts that no family's test reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from danlu.errors import DanluError
from danlu.model.config import Learned, ModelConfig, Patches, Relative, Rotary
from danlu.model.position import rotate, rotation
from danlu.model.sight import Batch, Sight, _blocks, visible
from danlu.model.transformer import Decoder, Encoder


def model(kind: type = Decoder, **changes: Any) -> Any:
    shape = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8}
    torch.manual_seed(0)
    return kind(ModelConfig(**{**shape, "feedforward_width": 48, "context": 64, **changes})).eval()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("how", ["plain", "window", "packed", "prefix"])
def test_flex_attention_sees_what_the_mask_says(causal: bool, how: str) -> None:
    """On a GPU FlexAttention carries windows, packed rows and prefixes; its blocks are the same everywhere."""
    if not causal and how in ("window", "prefix"):
        pytest.skip("for causal attention only")
    positions = torch.arange(40).expand(2, -1)
    segments = torch.tensor([[1] * 11 + [2] * 29, [1] * 33 + [0] * 7], dtype=torch.int32) if how == "packed" else None
    batch = Batch(positions, segments, torch.tensor([5, 17]) if how == "prefix" else None)
    window = 6 if how == "window" else 0
    query, key, value = (torch.randn(2, heads, 40, 8) for heads in (4, 2, 2))
    blocks = _blocks(causal, Sight(positions, window=window), batch)
    ours = flex_attention(query, key, value, block_mask=blocks, scale=1.0, enable_gqa=True)
    mask = visible(causal, window, batch)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0, enable_gqa=True)
    seen = mask.any(-1).expand(2, 4, -1)
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prefix_sees_all_of_itself_and_nothing_of_what_follows() -> None:
    decoder, tokens = model(), torch.randint(0, 50, (2, 20))
    prefix = torch.tensor([7, 0])
    before = decoder(tokens, prefix=prefix)
    torch.testing.assert_close(before[1], decoder(tokens)[1], atol=1e-6, rtol=1e-6)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    after = decoder(changed, prefix=prefix)
    assert (after[0, :7] - before[0, :7]).abs().amax(-1).min() > 1e-5  # even the first sees the last of the prefix
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    assert torch.equal(decoder(changed, prefix=prefix)[0, :7], before[0, :7])


def test_what_cannot_be_had_together_is_refused() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(DanluError, match=r"prefix .* sliding window"):
        model(sliding_window=3)(tokens, prefix=torch.tensor([2]))
    with pytest.raises(DanluError, match="not kept in a cache"):
        decoder = model()
        decoder(tokens, prefix=torch.tensor([2]), cache=decoder.new_cache(1, 8))


@torch.no_grad()
def test_rotary_positions_of_two_axes_see_distances_of_both() -> None:
    """A score depends on how far apart two squares lie in each direction, and on nothing else."""
    rotary = Rotary(100.0, axes=2)
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(one: tuple[int, int], other: tuple[int, int]) -> float:
        turned = [rotate(x, *rotation(rotary, 8, torch.tensor([[place]]))) for x, place in ((query, one), (key, other))]
        return float((turned[0] * turned[1]).sum())

    assert score((1, 2), (4, 7)) == pytest.approx(score((6, 3), (9, 8)), abs=1e-5)
    assert score((1, 2), (4, 7)) != pytest.approx(score((1, 2), (7, 4)), abs=1e-3)


@torch.no_grad()
def test_an_image_encoder_with_rotary_positions() -> None:
    patches = Patches((16, 24), (4, 4), class_token=False)
    shape = {"vocab_size": 0, "causal": False, "patches": patches, "context": 24, "head": None}
    encoder = model(Encoder, **shape, positions=Rotary(axes=2))
    pixels = torch.randn(2, 3, 16, 24)
    assert encoder(pixels).shape == (2, 24, 32)
    assert not torch.allclose(encoder(pixels), model(Encoder, **shape, positions=None)(pixels), atol=1e-3)
    with pytest.raises(DanluError, match=r"images of shape \[3, 24, 16\]; the model takes \[3, 16, 24\]"):
        encoder(pixels.mT)


@pytest.mark.parametrize("positions", [Rotary(), Learned(), Relative(8, 20), None])
def test_dropout_needs_no_tiles_and_scales_what_is_left(positions: Any) -> None:
    decoder = model(positions=positions, attention_dropout=0.5)
    tokens = torch.randint(0, 50, (4, 24))
    torch.manual_seed(1)
    with torch.no_grad():
        still = decoder(tokens)
        decoder.train()
        shaken = torch.stack([decoder(tokens) for _ in range(200)])
    assert not torch.equal(shaken[0], shaken[1])
    assert torch.equal(shaken[0][:, 0].isfinite(), torch.ones(4, 32, dtype=torch.bool))
    assert (shaken.mean(0) - still).abs().mean() < 0.25 * (shaken[0] - still).abs().mean()


def test_drop_path_skips_more_of_later_layers() -> None:
    decoder = model(layers=3, drop_path=1.0 - 1e-6)
    assert [block.drop_path for block in decoder.blocks] == pytest.approx([0, 0.5, 1], abs=1e-5)
    tokens = torch.randint(0, 50, (4, 8))
    hidden: list[torch.Tensor] = []
    decoder.train()(tokens, hidden=hidden)
    assert torch.equal(hidden[3], hidden[2])  # the last layer is skipped
    assert not torch.equal(hidden[1], hidden[0])  # the first never is


@pytest.mark.parametrize("norm", ["rms", "layer", "batch"])
@pytest.mark.parametrize("place", ["pre", "post", "both"])
def test_every_norm_in_every_place_learns(norm: str, place: str) -> None:
    decoder = model(norm=norm, norm_place=place, residual_scale=0.5)
    decoder.train()
    decoder.logits(decoder(torch.randint(0, 50, (2, 9)))).square().mean().backward()
    unmoved = [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert unmoved == []


def test_residual_scale_weakens_each_update() -> None:
    tokens, hidden = torch.randint(0, 50, (1, 6)), {}
    for scale in (1.0, 0.25):
        stream: list[torch.Tensor] = []
        decoder = model(layers=1, residual_scale=scale)
        decoder.blocks[0].feedforward.down.weight.data.zero_()
        decoder(tokens, hidden=stream)
        hidden[scale] = stream[1] - stream[0]
    torch.testing.assert_close(hidden[0.25], hidden[1.0] * 0.25)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 63, 64, 65])
@torch.no_grad()
def test_windows_at_the_edge_and_any_number_of_shared_heads(kv_heads: int, window: int) -> None:
    decoder = model(kv_heads=kv_heads, sliding_window=window)
    tokens = torch.randint(0, 50, (1, 64))
    whole = replace(decoder.config, sliding_window=None)
    free = Decoder(whole).eval()
    free.load_state_dict(decoder.state_dict())
    assert torch.allclose(decoder(tokens), free(tokens), atol=1e-5) == (window >= 64)
    alone = decoder(tokens[:, :1])
    torch.testing.assert_close(decoder(tokens)[:, :1], alone, atol=1e-6, rtol=1e-5)
