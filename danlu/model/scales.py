"""Scales of a configuration moved into weights, for architectures whose configurations have no place for them."""

from __future__ import annotations

import torch
from torch import nn

from danlu.errors import DanluError
from danlu.model.attention import Attention
from danlu.model.config import AnyConfig
from danlu.model.head import WordHead
from danlu.model.stored import stacks
from danlu.model.transformer import Model, Stack


def check_scales(config: AnyConfig, scaled: AnyConfig) -> None:
    """Raise DanluError where `fold_scales` cannot make a model of `config` compute what one of `scaled` does."""
    for own, wanted in zip(stacks(config), stacks(scaled), strict=True):
        reasons = {
            "the embedding is multiplied by a number of its own": own.embedding_scale != wanted.embedding_scale,
            "queries are normalised with weights that are added to 1": own.score_scale != wanted.score_scale
            and own.qk_norm
            and own.norm_plus_one,
            "no norm that could hold the scale stands before the head": own.head_scale != wanted.head_scale
            and not (own.head and own.head.norm)
            and (own.norm_plus_one or not own.final_norm),
        }
        for reason, holds in reasons.items():
            if holds:
                fix = "take another start, or an architecture such as LlamaForCausalLM"
                raise DanluError(f"such a model could not be saved: {reason}", where="model.start", fix=fix)


@torch.no_grad()
def fold_scales(model: Model, scaled: AnyConfig) -> None:
    """Change weights, in place, so that a model computes what one of `scaled` computes with the weights as they were.

    The scale of scores goes into the queries or their norm, that of the head into the norm before it.

    Args:
        scaled: the model's configuration but for scales of attention and head; see `check_scales`.
    """
    check_scales(model.config, scaled)
    made = [module for module in model.modules() if isinstance(module, Stack)]
    for stack, wanted in zip(made, stacks(scaled), strict=True):
        for part in stack.modules():
            if isinstance(part, Attention):
                _multiply(part.query_norm or part.query, wanted.score_scale / stack.config.score_scale)
        if wanted.head_scale != stack.config.head_scale:
            head = next(part for part in model.modules() if isinstance(part, WordHead))
            norm = head.norm or stack.norm
            assert norm is not None
            _multiply(norm, wanted.head_scale / stack.config.head_scale)


def _multiply(module: nn.Module, factor: float) -> None:
    for weight in module.parameters():
        weight.mul_(factor)
