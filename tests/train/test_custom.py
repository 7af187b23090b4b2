"""A module that belongs to no family trains, saves and resumes like the rest: the guide's own example."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danlu.errors import DanluError
from danlu.model.module import load_weights, save_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What docs/models.md defines."""
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    return names


def test_it_learns_and_resumes_with_the_same_bits(example: dict[str, Any], tmp_path: Path) -> None:
    whole = example["learn"](tmp_path / "whole", 200).eval()
    test = example["Spirals"]().batch(12345)
    assert (whole(test.places).argmax(-1) == test.labels).float().mean() > 0.95

    example["learn"](tmp_path / "broken", 73)  # stopped here, 13 steps after its last checkpoint
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-00000073")
    example["learn"](tmp_path / "broken", 200)
    one, other = (load_file(tmp_path / name / "spirals.safetensors") for name in ("whole", "broken"))
    assert "1.running_mean" in one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.data[0] = float("-0.0")
    save_weights(model, tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_weights(other, tmp_path / "w.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32) if tensor.is_floating_point() else tensor, bits(other, name))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def bits(model: nn.Module, name: str) -> torch.Tensor:
    tensor = model.state_dict()[name]
    return tensor.view(torch.int32) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bias": None}, r"lacks bias of shape \[4\]"),
        ({"weight": torch.zeros(4, 2)}, r"weight has shape \[4, 2\], but the model makes it \[4, 3\]"),
        ({"more": torch.zeros(1)}, "holds more, no part of the model"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    weights = {**nn.Linear(3, 4).state_dict(), **change}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "w.safetensors")
    with pytest.raises(DanluError, match=complaint):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DanluError, match="cannot be read as safetensors"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")
