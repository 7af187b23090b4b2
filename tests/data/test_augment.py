"""Augmented images: what may change changes, as often as asked for, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from danlu.data.augment import cutout, mixup, random_crop, random_flip
from danlu.errors import DanluError

WAYS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "crop": lambda images, chance: random_crop(images, 2, chance),
    "flip": random_flip,
    "cutout": lambda images, chance: cutout(images, 3, chance),
    "mixup": lambda images, chance: mixup(images, torch.arange(len(images)) % 4, 4, 0.4, chance)[0],
}


def images(rows: int = 64) -> Tensor:
    return torch.rand(rows, 3, 7, 9, generator=Generator().manual_seed(1)) + 0.1


def chance(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("way", WAYS)
def test_a_pure_function_of_images_and_generator(way: str) -> None:
    given, kept = images(), images()
    made = WAYS[way](given, chance())
    assert torch.equal(given, kept) and made.shape == given.shape and made.dtype == given.dtype
    assert torch.equal(made, WAYS[way](given, chance()))
    assert not torch.equal(made, WAYS[way](given, chance(1)))
    before = torch.get_rng_state()
    WAYS[way](given, chance())
    assert torch.equal(before, torch.get_rng_state())


def test_a_crop_is_a_window_of_the_padded_image_and_every_one_comes() -> None:
    given = images(400)
    made, wide, seen = random_crop(given, 2, chance()), F.pad(given, (2,) * 4), set()
    for image, padded in zip(made, wide, strict=True):
        windows = padded.unfold(1, 7, 1).unfold(2, 9, 1)  # [3, 5, 5, 7, 9]
        hits = (windows == image[:, None, None]).all(-1).all(-1).all(0).nonzero()
        assert len(hits) == 1
        seen.add(tuple(hits[0].tolist()))
    assert len(seen) == 25
    assert torch.equal(random_crop(given, 0, chance()), given)


def test_half_of_the_images_are_mirrored() -> None:
    given = images(400)
    made = random_flip(given, chance())
    same, mirrored = ((made == other).flatten(1).all(1) for other in (given, given.flip(-1)))
    assert (same ^ mirrored).all() and abs(int(mirrored.sum()) - 200) < 50
    assert torch.equal(random_flip(given, chance(), 0), given)
    assert torch.equal(random_flip(given, chance(), 1), given.flip(-1))


def test_a_square_is_cut_out_and_no_more() -> None:
    given = images(400)
    made = cutout(given, 3, chance())
    gone = made == 0
    assert torch.equal(made[~gone], given[~gone])
    assert (gone.all(1) == gone.any(1)).all(), "all channels alike"
    holes = gone[:, 0]
    high, wide = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), high * wide), "each is a rectangle"
    assert set(high.tolist()) == set(wide.tolist()) == {2, 3}, "and at an edge a part of it falls outside"


def test_labels_are_blended_as_images_are() -> None:
    labels = torch.arange(300) % 5
    given = labels.float()[:, None, None, None].expand(-1, 1, 2, 2)
    made, likely = mixup(given, labels, 5, 0.3, chance())
    torch.testing.assert_close(likely.sum(1), torch.ones(300))
    torch.testing.assert_close(made[:, 0, 0, 0], likely @ torch.arange(5.0), atol=1e-5, rtol=0)
    share = likely.max(1).values
    assert share.unique().numel() > 100, "every image has a share of its own"
    strong = mixup(given, labels, 5, 50.0, chance())[1].max(1).values
    assert share.mean() > strong.mean() + 0.1, "a small alpha blends less"


def test_mixup_needs_a_positive_alpha() -> None:
    with pytest.raises(DanluError, match=r"alpha is 0\.0"):
        mixup(images(4), torch.zeros(4, dtype=torch.int64), 2, 0.0, chance())
