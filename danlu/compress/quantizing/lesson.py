"""A rounded model beside the one that it was rounded from, which teaches it by its own probabilities.

Matrices are in bf16 where the processor multiplies that sooner; vectors, and the stream between blocks, stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from danlu.compress.quantizing.spool import Spool
from danlu.model.checkpoint import Checkpoint
from danlu.model.config import ModelConfig
from danlu.model.head import WordHead
from danlu.model.loss import Taught, linear_distillation
from danlu.model.stored import without_memory
from danlu.model.transformer import Decoder
from danlu.train.precision import choose_precision

ROWS = 2  # of the calibration text, computed at once
STEP_ROWS = 4  # of one step
WARMUP = 0.2  # of all steps


class Lesson:
    """Both models in memory.

    Args:
        checkpoint: the original.
        spool: what its weights were rounded to.

    Attributes:
        student: the rounded model; nothing of it learns until it is told to.
    """

    def __init__(self, checkpoint: Checkpoint, spool: Spool) -> None:
        self._dtype, makers = choose_precision("auto")[0], checkpoint.model.makers(torch.float32)
        self._teacher = _decoder(checkpoint.config, lambda name: makers[name](), self._dtype)
        self.student = _decoder(checkpoint.config, spool.values, self._dtype)

    def steps(self, rows: Tensor, count: int) -> Iterator[tuple[float, float]]:
        """So many steps of 4 rows each: the share of the rate to learn with, and the divergence in nat a token.

        Gradients of its sum lie at what learns when a step comes out, and must be gone when the next one is asked for.

        Args: rows: int64 [n, T], token ids; all are seen once before any is seen again.
        """
        for step, chosen in enumerate(_order(len(rows), count * STEP_ROWS).split(STEP_ROWS)):
            apart = sum(self._add_gradients(part) for part in rows[chosen].split(ROWS))
            yield min(1, (step + 1) / (WARMUP * count)) * (1 - step / count), apart / rows[chosen].numel()

    def _add_gradients(self, rows: Tensor) -> float:
        """Adds the gradient of the divergence over these rows to the student's; its sum over tokens, in nat."""
        with torch.no_grad():
            known = self._features(self._teacher, rows)
        apart = linear_distillation(
            self._features(self.student, rows),
            self.student.head_weight,
            rows.flatten(),  # of the hard loss, which has no share
            _head(self.student).bias,
            Taught(known, self._teacher.head_weight, _head(self._teacher).bias),
            temperature=1.0,
            alpha=1.0,
        )
        apart.backward()
        return float(apart.detach())

    def _features(self, model: Decoder, rows: Tensor) -> Tensor:
        """What the head's words are multiplied by, [tokens, width], in the head's dtype."""
        with torch.autocast("cpu", self._dtype, self._dtype != torch.float32):
            made = _head(model).features(model(rows).flatten(0, 1))
        return made.to(model.head_weight.dtype)


def _head(model: Decoder) -> WordHead:
    assert isinstance(model.head, WordHead)
    return model.head


def _decoder(config: ModelConfig, values: Callable[[str], Tensor], dtype: torch.dtype) -> Decoder:
    """A model whose matrices are in `dtype`, and its vectors and stream in fp32. `values`: of a weight, by its name."""
    model = without_memory(config)
    assert isinstance(model, Decoder)
    weights = {name: values(name) for name in model.state_dict()}
    made = {name: weight.to(dtype) if weight.dim() > 1 else weight for name, weight in weights.items()}
    model.load_state_dict(made, assign=True)
    model.embedding.register_forward_hook(_widen)
    return model.requires_grad_(False).eval()


def _widen(_module: nn.Module, _given: tuple[Tensor, ...], made: Tensor) -> Tensor:
    return made.float()


def _order(rows: int, count: int) -> Tensor:
    """Numbers of `count` rows: all in a random order, then in another one, and so on."""
    turns = (torch.randperm(rows, generator=torch.Generator().manual_seed(turn)) for turn in range(count // rows + 1))
    return torch.cat(list(turns))[:count]
