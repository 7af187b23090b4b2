"""Images made different: each a pure function of a batch, float [B, channels, height, width], and a generator.

Nothing is changed in place. Random numbers are drawn where the generator is and moved to the images, so that a
generator of the CPU gives the same images on every device.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from danlu.errors import DanluError


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image moved by up to `padding` pixels up or down and left or right; zeros come in from outside."""
    rows, _, height, width = images.shape
    down, right = _draw(2 * padding + 1, (2, rows), generator, images.device)
    lines = (torch.arange(height, device=images.device) + down[:, None])[:, None, :, None]
    columns = (torch.arange(width, device=images.device) + right[:, None])[:, None, None, :]
    image = torch.arange(rows, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return F.pad(images, (padding,) * 4)[image, channel, lines, columns]


def random_flip(images: Tensor, generator: Generator, chance: float = 0.5) -> Tensor:
    """Each image mirrored left to right with this chance."""
    flipped = torch.rand(len(images), generator=generator, device=generator.device) < chance
    return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, side: int, generator: Generator) -> Tensor:
    """A square of zeros in each image, centred anywhere in it, so that a part may fall outside (arXiv:1708.04552).

    Args: side: of the square, in pixels.
    """
    rows, _, height, width = images.shape
    inside = [_near(length, _draw(length, (rows,), generator, images.device), side) for length in (height, width)]
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def mixup(images: Tensor, labels: Tensor, classes: int, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Each image blended with another of the batch, and their labels alike (arXiv:1710.09412).

    Args:
        labels: int64 [B].
        classes: how many there are.
        alpha: every image's share is drawn from Beta(alpha, alpha): the smaller, the nearer to 0 or 1.

    Returns: images of the same shape and dtype; the probability of each class, fp32 [B, classes].
    Raises DanluError where alpha is not positive.
    """
    if not alpha > 0:
        raise DanluError(f"mixup's alpha is {alpha}; it must be more than 0")
    # Torch draws from no Beta with a generator of its own, so the generator only gives the seed.
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    drawn = np.random.default_rng(int(seed)).beta(alpha, alpha, len(images))
    share = torch.from_numpy(drawn).to(images)
    other = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    likely = F.one_hot(labels, classes).float()
    weight, part = share[:, None, None, None], share[:, None].float()
    return weight * images + (1 - weight) * images[other], part * likely + (1 - part) * likely[other]


def _draw(below: int, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=generator.device).to(device)


def _near(length: int, centre: Tensor, side: int) -> Tensor:
    """bool [B, length], True at the `side` places around each centre."""
    first = centre[:, None] - side // 2
    place = torch.arange(length, device=centre.device)
    return (place >= first) & (place < first + side)
