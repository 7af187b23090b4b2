"""The weights of any module as one safetensors file: for models that belong to no family."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from danlu.artifact import sync
from danlu.errors import DanluError


def save_weights(model: nn.Module, file: Path) -> None:
    """Write all weights and buffers, bit for bit, aside and renamed.

    Raises DanluError where the disk refuses.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.aside")
    try:
        # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(copies, aside)
        sync(aside)
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        raise DanluError(f"cannot be written: {error}", where=file, fix="free some space on the disk") from None
    finally:
        aside.unlink(missing_ok=True)


def load_weights(model: nn.Module, file: Path) -> None:
    """Read what `save_weights` wrote into a module of the same shape.

    Raises DanluError naming a weight that is missing, too much, or of another shape, with both shapes.
    """
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DanluError(f"cannot be read as safetensors: {error}", where=file) from None
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in stored:
            raise DanluError(f"lacks {name} of shape {list(tensor.shape)}", where=file)
        if stored[name].shape != tensor.shape:
            what = f"{name} has shape {list(stored[name].shape)}, but the model makes it {list(tensor.shape)}"
            raise DanluError(what, where=file)
    extra = sorted(stored.keys() - own.keys())
    if extra:
        raise DanluError(f"holds {', '.join(extra)}, no part of the model", where=file)
    model.load_state_dict(stored)
