"""Convolutions as several small ones: Tucker's decomposition (arXiv:1511.06530) and CP's (arXiv:1412.6553).

For any torch module: each Conv2d that looks at more than single pixels becomes a 1x1 convolution into fewer channels,
what looks around among those, and a 1x1 convolution back.
"""

from __future__ import annotations

import copy
import math
from importlib import import_module
from typing import Any, Literal

from torch import Tensor, nn

from danlu.errors import DanluError, need_extra

Way = Literal["tucker", "cp"]


def decompose(model: nn.Module, share: float, way: Way = "tucker") -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A copy of a model whose convolutions have at most `share` of their numbers each.

    Args:
        model: convolutions in groups, of single pixels, or with padding other than zeros stay as they are.
        share: of the numbers of each.
        way: "tucker": ranks of inputs and outputs shrink alike; "cp": the middle is one kernel a channel, in two parts.

    Returns: the copy, and the ranks of each convolution that was taken apart, by its path.
    Raises DanluError where tensorly is not installed, the share cannot be had, or there is no such convolution.
    """
    if not 0 < share < 1:
        raise DanluError(f"a share of {share:g} of the numbers cannot be kept", fix="say 0.5")
    made, ranks = copy.deepcopy(model), dict[str, tuple[int, ...]]()
    for path, layer in list(made.named_modules()):
        if isinstance(layer, nn.Conv2d) and math.prod(layer.kernel_size) > 1 and _plain(layer):
            small, ranks[path] = _tucker(layer, share) if way == "tucker" else _cp(layer, share)
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, small)
    if not ranks:
        raise DanluError("the model has no convolution that can be taken apart")
    return made, ranks


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _decompositions() -> Any:
    """The library's, computing with torch."""
    try:
        import_module("tensorly").set_backend("pytorch")
    except ImportError:
        raise need_extra("tensorly", "lowrank") from None
    return import_module("tensorly.decomposition")


def _tucker(layer: nn.Conv2d, share: float) -> tuple[nn.Sequential, tuple[int, ...]]:
    outputs, inputs = _tucker_ranks(layer, share)
    (core, (back, into)), _ = _decompositions().partial_tucker(layer.weight.detach(), [outputs, inputs], modes=[0, 1])
    first = _pixelwise(into.T, None)
    last = _pixelwise(back, layer.bias)
    return nn.Sequential(first, _around(core, layer, (0, 1), 1), last), (outputs, inputs)


def _tucker_ranks(layer: nn.Conv2d, share: float) -> tuple[int, int]:
    """As many channels on both sides, in proportion, as the share allows."""
    outputs, inputs = layer.out_channels, layer.in_channels
    budget = share * layer.weight.numel()
    for part in range(256, 0, -1):
        out, into = max(1, outputs * part // 256), max(1, inputs * part // 256)
        if inputs * into + into * out * math.prod(layer.kernel_size) + outputs * out <= budget:
            return out, into
    raise DanluError(f"a share of {share:g} is too little for a convolution of {inputs} to {outputs} channels")


def _cp(layer: nn.Conv2d, share: float) -> tuple[nn.Sequential, tuple[int, ...]]:
    outputs, inputs, high, wide = layer.weight.shape
    rank = int(share * layer.weight.numel() / (outputs + inputs + high + wide))
    if rank < 1:
        raise DanluError(f"a share of {share:g} is too little for a convolution of {inputs} to {outputs} channels")
    found = _decompositions().parafac(
        layer.weight.detach(), rank, n_iter_max=200, init="random", normalize_factors=False, random_state=0
    )
    back, into, rows, columns = found.factors
    first = _pixelwise(into.T, None)
    down = _around(rows.T[:, None, :, None], layer, (0,), rank)
    along = _around(columns.T[:, None, None, :], layer, (1,), rank)
    return nn.Sequential(first, down, along, _pixelwise(back * found.weights, layer.bias)), (rank,)


def _pixelwise(matrix: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution, [outputs, inputs]."""
    made = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=bias is not None)
    made.weight.data = matrix[:, :, None, None].contiguous()
    if bias is not None and made.bias is not None:
        made.bias.data = bias.detach().clone()
    return made


def _around(kernel: Tensor, layer: nn.Conv2d, axes: tuple[int, ...], groups: int) -> nn.Conv2d:
    """A convolution that looks around along some axes as `layer` does.

    Args: kernel: [outputs, inputs / groups, height, width]; axes: 0 is height, 1 width.
    """
    assert not isinstance(layer.padding, str)

    def along(values: tuple[int, ...], otherwise: int) -> tuple[int, int]:
        high, wide = (values[axis] if axis in axes else otherwise for axis in (0, 1))
        return high, wide

    made = nn.Conv2d(
        kernel.shape[1] * groups,
        kernel.shape[0],
        (kernel.shape[2], kernel.shape[3]),
        stride=along(layer.stride, 1),
        padding=along(layer.padding, 0),
        dilation=along(layer.dilation, 1),
        groups=groups,
        bias=False,
    )
    made.weight.data = kernel.contiguous()
    return made


def convolution_numbers(model: nn.Module) -> int:
    """Numbers in the kernels of a model's convolutions."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))
