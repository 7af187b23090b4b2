"""Whatever a user points at is opened as the right model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from danlu.artifact import Artifact, build, write_json
from danlu.errors import DanluError
from danlu.model.checkpoint import save_checkpoint
from danlu.model.config import ModelConfig
from danlu.model.generate import generate
from danlu.model.transformer import Decoder
from danlu.serve.app import make_app
from danlu.serve.backend import GGUFBackend, TorchBackend, open_backend
from danlu.serve.prompt import chat_prompt
from danlu.serve.text import Sampling

RECIPE = {"data": {"system": "You are a pirate."}}


@pytest.fixture(scope="module")
def small(backend: GGUFBackend) -> Decoder:
    """A model of our own with random weights and SmolLM2's vocabulary."""
    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "feedforward_width": 64}
    return Decoder(ModelConfig(vocab_size=49152, width=32, context=96, tied=True, **shape))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small: Decoder, backend: GGUFBackend, gguf: Path) -> Path:
    """A run directory with a tuned and a compressed model."""
    root = tmp_path_factory.mktemp("runs") / "my-run"
    root.mkdir()

    def tune(out: Path) -> dict[str, object]:
        save_checkpoint(small, backend.tokenizer, out / "model")
        return {}

    def compress(out: Path) -> dict[str, object]:
        (out / "model.gguf").symlink_to(gguf)
        return {}

    def certify(out: Path) -> dict[str, object]:
        write_json(out / "certificate.json", {"passed": True})
        return {}

    stages = {}
    for kind, fill in (("tune", tune), ("compress", compress), ("certify", certify)):
        made, _ = build(root, kind, settings={}, inputs={}, code="", fill=fill)
        stages[kind] = made.path.name
    write_json(root / "run.json", {"name": "my-run", "recipe": RECIPE, "stages": stages})
    return root


def test_a_run_gives_its_compressed_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = open_backend(run, context=64, threads=1)
    assert isinstance(made, GGUFBackend)
    assert (made.name, made.context) == ("my-run", 64)
    assert "certified" in capsys.readouterr().err
    made.close()


def test_conversations_get_the_system_message_the_model_was_tuned_with(run: Path) -> None:
    made = open_backend(run, context=64, threads=1)
    user = [{"role": "user", "content": "Hi"}]
    own = [{"role": "system", "content": "Be brief."}, *user]
    tuned = [{"role": "system", "content": RECIPE["data"]["system"]}, *user]
    with TestClient(make_app(made), base_url="http://localhost") as client:
        for sent, read in ((user, tuned), (own, own)):
            asked = {"model": "my-run", "messages": sent, "max_tokens": 1}
            usage = client.post("/v1/chat/completions", json=asked).json()["usage"]
            assert usage["prompt_tokens"] == len(chat_prompt(made.tokenizer, read))


def test_a_run_that_got_no_further_gives_its_tuned_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "run.json").read_text()
    tuned = next(run.glob("tune-*"))
    try:
        write_json(run / "run.json", {"recipe": RECIPE, "stages": {"tune": tuned.name}})
        made = open_backend(run)
        assert isinstance(made, TorchBackend)
        assert made.name == "my-run"
        assert "no compressed model yet" in capsys.readouterr().err
        write_json(run / "run.json", {"recipe": RECIPE, "stages": {}})
        with pytest.raises(DanluError, match="no model yet"):
            open_backend(run)
    finally:
        (run / "run.json").write_text(before)


def test_artifacts_and_directories(run: Path) -> None:
    compressed, tuned = (Artifact.load(next(run.glob(f"{kind}-*"))).path for kind in ("compress", "tune"))
    made = open_backend(compressed, context=64, threads=1)
    assert isinstance(made, GGUFBackend)
    made.close()
    for place in (tuned, tuned / "model"):
        assert isinstance(open_backend(place), TorchBackend)


def test_our_own_model_answers_as_it_generates(run: Path, small: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    made = open_backend(next(run.glob("tune-*")), context=1000)
    assert made.context == 96
    assert "trained for 96" in capsys.readouterr().err
    messages = [{"role": "user", "content": "Hi"}]
    prompt = chat_prompt(made.tokenizer, messages)
    expected = list(generate(small, prompt, max_new_tokens=9, stop_ids=made.tokenizer.stop_ids))
    assert list(made.generate(prompt, Sampling(max_new_tokens=9))) == expected
    asked = {"model": made.name, "messages": messages, "max_tokens": 9, "temperature": 0}
    with TestClient(make_app(made), base_url="http://localhost") as client:
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["message"]["content"] == made.tokenizer.decode(expected).rstrip("\ufffd")
        refused = client.post("/v1/chat/completions", json=asked | {"presence_penalty": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "presence_penalty")


def test_sampling_with_our_own_model(run: Path) -> None:
    made = open_backend(next(run.glob("tune-*")))

    def draw(seed: int) -> list[int]:
        return list(made.generate([1, 2, 3], Sampling(max_new_tokens=8, temperature=9.0, top_p=0.9, seed=seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_failing_model_is_a_500_and_the_next_request_is_served(backend: GGUFBackend) -> None:
    class Failing(GGUFBackend):
        fail = True

        def __init__(self) -> None:
            self.__dict__.update(backend.__dict__)

        def generate(self, prompt: list[int], sampling: Sampling):  # type: ignore[no-untyped-def]
            if self.fail:
                raise RuntimeError("the machine is on fire")
            return super().generate(prompt, sampling)

        def close(self) -> None:
            pass  # the session's engine is needed further

    failing = Failing()
    asked = {"model": failing.name, "prompt": "Hi", "max_tokens": 2}
    with TestClient(make_app(failing), base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json=asked)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "fire" not in answer.text
        events = client.post("/v1/completions", json=asked | {"stream": True}).text.split("\n\n")
        assert '"server_error"' in events[-2]
        failing.fail = False
        assert client.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("ref", ["no/such/place/at.all", "absent.gguf", "pypi:no-such-package-here"])
def test_nothing_there(ref: str) -> None:
    with pytest.raises(DanluError):
        open_backend(ref)
