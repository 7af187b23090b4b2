"""Pictures through the same loop: a classifier learns them, an autoencoder draws them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import resnet
import torch
import vae
from common import FILES, Name, Pictures, Task, read_pictures
from torch.distributions import Bernoulli, Normal, kl_divergence

from tests.recipes.test_resume import shades

DATA = Path(os.environ.get("DANLU_DATA", Path(__file__).parents[3] / "shared" / "data"))


def real(name: Name, monkeypatch: pytest.MonkeyPatch) -> tuple[Pictures, Pictures]:
    """The data set, or a skip that says why."""
    if not (DATA / FILES[name]).exists():
        pytest.skip(f"{DATA / FILES[name]} is not there: name its folder in DANLU_DATA")
    monkeypatch.setenv("DANLU_DATA", str(DATA))
    return read_pictures(name)


def some(pictures: Pictures, count: int) -> Pictures:
    return Pictures(pictures.pixels[:count], pictures.labels[:count])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many threads for small pictures are slower where others work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_resnet_learns_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, tested = real("fashion", monkeypatch)
    figures = resnet.learn(Task(tmp_path, 40), learned, some(tested, 1000))
    assert figures["accuracy"]["value"] > 0.4


@pytest.mark.soak
@pytest.mark.parametrize(("name", "steps", "least"), [("fashion", 1100, 0.9), ("cifar10", 400, 0.55)])
def test_a_resnet_learns_to_the_end(
    name: Name, steps: int, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, tested = real(name, monkeypatch)
    assert resnet.learn(Task(tmp_path, steps), learned, tested)["accuracy"]["low"] > least


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_augmented_batch(world: int) -> None:
    pictures = shades(300, 8)
    whole = resnet.Augmented(pictures, seed=3).batch(5)
    parts = [resnet.Augmented(pictures, 3, rank, world).batch(5) for rank in range(world)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert not torch.equal(whole.inputs, resnet.Augmented(pictures, 4).batch(5).inputs)


def test_a_resnet_has_the_stages_of_the_paper() -> None:
    model = resnet.resnet(3)
    shapes = []
    for layer in model:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert list(dict.fromkeys(s for s in shapes if len(s) == 3 and s[1] > 1))[1:] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]
    assert sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules()) == 13


def test_an_autoencoder_learns_clothes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, tested = real("fashion", monkeypatch)
    grey = learned.pixels.float().mean(0).flatten() / 255
    alone = -Bernoulli(grey.clamp(1e-4, 1 - 1e-4)).entropy().sum()  # what the best code without a model can do
    figures = vae.learn(Task(tmp_path, 300), learned, some(tested, 1280))
    assert figures["elbo"]["value"] > alone + 100
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.aside"))


@pytest.mark.soak
def test_an_autoencoder_learns_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vae.learn(Task(tmp_path, 5000), *real("fashion", monkeypatch))["elbo"]["value"] > -245


def test_the_bound_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = vae.Autoencoder(64)
    batch = vae.Drawing(shades(300, 8), 1).batch(0)
    mean, log_variance = model.encoder(batch.pixels).chunk(2, -1)
    posterior = Normal(mean, (log_variance / 2).exp())
    code = posterior.mean + posterior.stddev * batch.noise
    likely = Bernoulli(logits=model.decoder(code)).log_prob(batch.pixels).sum()
    loss = vae.bound(model, batch)
    torch.testing.assert_close(loss.sum, kl_divergence(posterior, Normal(0.0, 1.0)).sum() - likely)
    assert loss.count == vae.ROWS
