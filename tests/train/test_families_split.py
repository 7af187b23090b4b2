"""Every family computes the same loss and gradients when two processes share all of its matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from danlu.data.labelled import LabelBatch
from danlu.data.pairs import ImageTexts, PairBatch
from danlu.data.stream import Batch
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig, PairConfig
from danlu.model.initialize import initialize
from danlu.model.transformer import make_model
from danlu.plan.plan import Plan
from danlu.train.mesh import Mesh, make_mesh
from danlu.train.objective import Labels, Spans, Words
from danlu.train.objectives.contrastive import ImageText
from danlu.train.replica import Replica
from tests.train.ranks import run_ranks

ROWS, LENGTH = 4, 16
CASES = (
    *("gpt2", "gemma3", "mixtral", "qwen2 moe", "bert words", "bert sequence", "bert tokens", "bert span"),
    *("roberta words", "t5", "flan-t5", "switch", "vit", "clip"),
)


def materials(config: AnyConfig) -> tuple[Any, Any]:
    """An objective that suits a model, and a batch for it."""
    chance = torch.Generator().manual_seed(7)

    def ids(words: int) -> Tensor:
        return torch.randint(3, words, (ROWS, LENGTH), generator=chance)

    segments = (torch.arange(LENGTH) < torch.tensor([16, 9, 12, 16])[:, None]).int()
    if isinstance(config, EncoderDecoderConfig):
        tokens, written = ids(config.encoder.vocab_size), ids(config.encoder.vocab_size)
        return Words(), PairBatch(tokens, segments, written, segments, written.masked_fill(segments == 0, -100))
    if isinstance(config, PairConfig):
        pixels = torch.randn(ROWS, config.image.patches.channels, *config.image.patches.image, generator=chance)
        return ImageText(), ImageTexts(ids(config.text.vocab_size), segments, pixels)
    if config.patches is not None:
        pixels = torch.randn(ROWS, config.patches.channels, *config.patches.image, generator=chance)
        return Labels(), LabelBatch(pixels, torch.tensor([0, 1, 2, 1]))
    tokens = ids(config.vocab_size)
    if config.head.task == "words":
        places = torch.arange(LENGTH).expand(ROWS, -1)
        return Words(), Batch(tokens, tokens.masked_fill(segments == 0, -100), segments, places)
    if config.head.task == "span":
        return Spans(), LabelBatch(tokens, torch.tensor([[1, 3], [0, 8], [2, 2], [5, 9]]), segments)
    labels = torch.tensor([0, 1, 2, 1]) if config.head.task == "sequence" else tokens % config.head.outputs
    return Labels(), LabelBatch(tokens, labels, segments)


def measured(config: AnyConfig, mesh: Mesh) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients, whole."""
    objective, batch = materials(config)
    model = make_model(config)
    initialize(model, "xavier", 5)
    model.eval()  # no dropout
    replica = Replica(model, [objective], mesh, rows=ROWS, length=LENGTH, batch=type(batch))
    loss = float(mesh.sum(replica.gradients(batch, batch.count))) / batch.count
    found = {}
    for name, weight in replica.parameters().items():
        if weight.grad is not None:
            found[name] = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
    return loss, found


def compare(configs: dict[str, AnyConfig], plan: str) -> dict[str, str]:
    """What differs, by case."""
    mesh, wrong = make_mesh(Plan.read(Plan.parse(plan))), {}
    for case, config in configs.items():
        expected_loss, expected = measured(config, Mesh())
        loss, found = measured(config, mesh)
        if abs(loss - expected_loss) > 1e-5 * max(1.0, abs(expected_loss)):
            wrong[case] = f"loss {loss}, not {expected_loss}"
        if found.keys() != expected.keys():
            wrong[case] = f"gradients of {sorted(found.keys() ^ expected.keys())}"
            continue
        for name, gradient in expected.items():
            apart = float((found[name] - gradient).abs().max())
            if apart > 1e-5 * max(1.0, float(gradient.abs().max())):
                wrong[case] = f"{name}: {apart:.2e} of {float(gradient.abs().max()):.2e}"
                break
    return wrong


@pytest.mark.parametrize("plan", ["tensor=2", "tensor=2,sequence=false"])
def test_every_family_shares_its_matrices(plan: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.model.zoo import twin

    configs = {}
    for case in CASES:
        config = twin(case, tmp_path_factory.mktemp("twin")).stored.config
        assert isinstance(config, ModelConfig | EncoderDecoderConfig | PairConfig)
        configs[case] = config
    assert run_ranks(2, compare, configs, plan) == [{}, {}]
