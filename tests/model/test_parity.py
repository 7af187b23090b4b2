"""The same numbers as transformers and llama.cpp, for every family, in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.config import Rotary
from danlu.model.gguf import write_gguf
from danlu.model.transformer import Decoder
from tests.model.tiny import CASES, llama_cpp_logits, tiny_reference, tokens

TEXT = """<|im_start|>user
Explain in two sentences why the sky is blue, then print the 3 first primes in Python.<|im_end|>
<|im_start|>assistant
Sunlight is scattered by air: blue more than red. 天空是蓝色的。
```python
print([2, 3, 5])
```<|im_end|>
"""


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[transformers.PreTrainedModel, Checkpoint]:
    """A random transformers model, and the checkpoint it was saved as."""
    reference = tiny_reference(request.param, tmp_path / "hf")
    return reference, Checkpoint.open(tmp_path / "hf")


def logits(model: Decoder, ids: torch.Tensor, **how: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids, **how))


def test_same_logits_gradients_and_files_as_transformers(
    pair: tuple[transformers.PreTrainedModel, Checkpoint], tmp_path: Path
) -> None:
    reference, checkpoint = pair
    model, ids = checkpoint.load(), tokens()
    theirs = reference(ids).logits
    ours = model.logits(model(ids))
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)

    F.cross_entropy(theirs[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    F.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    names = checkpoint.model.family.names
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert torch.allclose(weight.grad, gradients[names.theirs(name)], atol=1e-4, rtol=0), name

    save_checkpoint(model, checkpoint.tokenizer, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs)


def test_packed_rows_equal_separate_rows(pair: tuple[transformers.PreTrainedModel, Checkpoint]) -> None:
    model, ids = pair[1].load(), tokens()
    apart = [logits(model, ids[:1, :20]), logits(model, ids[1:, :28])]
    packed = torch.cat((ids[:1, :20], ids[1:, :28]), 1)
    segments = torch.tensor([[1] * 20 + [2] * 28], dtype=torch.int32)
    positions = torch.tensor([[*range(20), *range(28)]])
    together = logits(model, packed, segments=segments, positions=positions)
    assert torch.allclose(together, torch.cat(apart, 1), atol=1e-5, rtol=0)


def test_same_logits_as_llama_cpp(pair: tuple[transformers.PreTrainedModel, Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, checkpoint = pair[1].load(), pair[1]
    window = checkpoint.config.sliding_window
    ids = tokens()[:1, :window]  # llama.cpp knows no window: within the first one both see the same
    file = tmp_path / "model.gguf"
    write_gguf(model, checkpoint.tokenizer, file)
    assert np.abs(llama_cpp_logits(file, ids[0].tolist()) - logits(model, ids)[0].numpy()).max() < 1e-4

    again = Checkpoint.open(file)
    kept = checkpoint.config if window is None else replace(checkpoint.config, context=window)
    assert again.config == kept
    loaded = again.load().state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_every_setting_counts(tmp_path: Path) -> None:
    """The cases above would notice: without its own setting, each model computes something else."""
    changes = {
        "llama3 rope": {"positions": Rotary(500.0)},
        "yarn rope": {"positions": Rotary(500.0)},
        "linear rope": {"positions": Rotary(500.0)},
        "mistral window": {"sliding_window": None},
        "llama head_dim": {"norm_epsilon": 1e-6},
    }
    ids = tokens()
    for case, change in changes.items():
        tiny_reference(case, tmp_path / case)
        checkpoint = Checkpoint.open(tmp_path / case)
        model = checkpoint.load()
        other = Decoder(replace(checkpoint.config, **change))
        other.load_state_dict(model.state_dict())
        assert (logits(model, ids) - logits(other, ids)).abs().max() > 1e-3, case


def test_smollm2_equals_transformers_at_every_position(smollm2: Path, tmp_path: Path) -> None:
    """The real model, from GGUF through our directory to transformers; then our F32 GGUF in llama.cpp."""
    checkpoint = Checkpoint.open(smollm2)
    model = checkpoint.load()
    ids = torch.tensor([checkpoint.tokenizer.encode(TEXT)])
    ours = logits(model, ids)
    save_checkpoint(model, checkpoint.tokenizer, tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4

    del reference
    write_gguf(model, checkpoint.tokenizer, tmp_path / "model.gguf")
    assert np.abs(llama_cpp_logits(tmp_path / "model.gguf", ids[0].tolist()) - ours[0].numpy()).max() < 1e-3
