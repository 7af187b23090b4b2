"""A teacher behind a server teaches what the same model teaches from here; servers that cannot are refused with why."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from typer.testing import CliRunner

from bench.small_models import Small, train_small
from danlu.artifact import CARD
from danlu.cli import app
from danlu.compress.learning import endpoint as endpoint_module
from danlu.compress.learning.asking import ask, teacher_losses
from danlu.compress.learning.distill import Distilled, Teaching, _probe, _question, distill_from
from danlu.compress.learning.endpoint import KEY, Endpoint
from danlu.compress.learning.reading import Reader
from danlu.compress.learning.served import Teacher
from danlu.compress.learning.tuning import Tuning, heldout_rows, row_losses
from danlu.data.stream import IGNORED
from danlu.data.told import ABOUT, HELDOUT, NOTHING, TRAIN, RowFile, ToldRows
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.transformer import Decoder
from danlu.serve.app import make_app
from danlu.serve.backend import TorchBackend
from danlu.train.objective import Labels, Words
from danlu.train.objectives.distillation import Distillation
from danlu.train.objectives.told import ToldDistillation
from danlu.train.recipe import ObjectiveSettings
from danlu.train.start import start
from danlu.train.tasks.teacher import taught, told_rows

TEXT = "the furnace 丹炉 turns ore into silver and gold, slowly; nobody hurries."
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a model that learned it, and the first two of its four blocks."""
    home = tmp_path_factory.mktemp("asking")
    chance = np.random.default_rng(5)
    (home / "text.txt").write_text(" ".join(chance.choice(WORDS, 6_000)), encoding="utf-8")
    (home / "short.txt").write_text(" ".join(chance.choice(WORDS, 300)), encoding="utf-8")
    small = Small(layers=4, width=32, heads=2, kv_heads=1, channels=64, context=64)
    train_small(small, home / "text.txt", 300, home / "base", batch={"rows": 8, "window": 32})
    base = Checkpoint.open(home / "base" / "model")
    cut, given = Decoder(replace(base.config, layers=2)), base.load().state_dict()
    cut.load_state_dict({name: given[name] for name in cut.state_dict()})
    save_checkpoint(cut, base.tokenizer, home / "cut")
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> Checkpoint:
    return Checkpoint.open(home / "base" / "model")


@pytest.fixture(scope="module")
def cut(home: Path) -> Checkpoint:
    return Checkpoint.open(home / "cut")


@pytest.fixture(scope="module")
def url(base: Checkpoint) -> Iterator[str]:
    """`danlu serve` over the model, on loopback."""
    config = uvicorn.Config(make_app(TorchBackend(base.path, "teacher", threads=1)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def tuning(home: Path, steps: int) -> Tuning:
    text = (str(home / "short.txt"),)
    return Tuning(text, steps, rows=4, window=32, learning_rate=1e-2, heldout=0.3, heldout_from="end")


def learned(cut: Checkpoint, url: str, home: Path, out: Path, steps: int, share: float, most: int = 5) -> Distilled:
    return distill_from(cut, Endpoint(url), tuning(home, steps), Teaching(share=share), out, most, writes=False)


def told(cut: Checkpoint, url: str, home: Path, out: Path, *, most: int = 5, writes: bool = False) -> ToldRows:
    """What a server is asked for four steps, without learning from it."""
    endpoint, settings = Endpoint(url), tuning(home, 4)
    endpoint.find_model()
    question = _question(settings.recipe(cut, {}, "distill"), settings, out)
    reader = Reader(cut.tokenizer, cut.config.vocab_size, url)
    teacher = Teacher.meet(endpoint, reader, most, _probe(question), writes)
    made = ask(teacher, question, out)
    endpoint.close()
    return ToldRows.open(made.path)


# --- A model that is served -----------------------------------------------------------------------------------------


def test_with_every_word_it_is_the_teacher_itself(
    home: Path, base: Checkpoint, cut: Checkpoint, url: str, tmp_path: Path
) -> None:
    rows = told(cut, url, home, tmp_path / "far", most=1000)
    batch = replace(rows, seed=1).batch(np.arange(8))
    assert batch.told is not None and batch.told.shape == (8, 32, 257)

    def loss_and_gradients(objective: Any) -> tuple[float, dict[str, torch.Tensor]]:
        model = cut.load()
        loss = objective(model, batch)
        loss.sum.backward()
        return loss.sum.item(), {name: weight.grad for name, weight in model.named_parameters()}

    here, to_here = loss_and_gradients(Distillation(Words(), base.load(), 1.0, 0.7))
    far, to_far = loss_and_gradients(ToldDistillation(Words(), 0.7))
    assert far == pytest.approx(here, rel=1e-5)
    for name, gradient in to_here.items():
        assert torch.allclose(to_far[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name
    sums, counts = teacher_losses(ToldRows.open(rows.path, file=HELDOUT))
    known = row_losses(base.load(), heldout_rows(tuning(home, 4).recipe(cut, {}, "near"), tmp_path / "near"))
    assert sums == pytest.approx(known.sums, rel=1e-4) and (counts == known.counts).all()


def test_what_was_cut_is_learned_again_from_a_server(home: Path, cut: Checkpoint, url: str, tmp_path: Path) -> None:
    """From five words at each place, on little text, which alone is soon known by heart."""
    taught = learned(cut, url, home, tmp_path / "taught", 80, 0.9)
    alone = learned(cut, url, home, tmp_path / "alone", 80, 0.0)
    assert taught.teacher is not None
    assert taught.after.mean < alone.after.mean
    assert taught.after.mean - taught.teacher.mean < 0.5 * (taught.before.mean - taught.teacher.mean)
    card = json.loads((tmp_path / "taught" / CARD).read_text())
    assert set(card["inputs"]) == {"student", "teacher"} and "loss_change_to_teacher" in card["figures"]
    [teacher] = (tmp_path / "taught").glob("teacher-*")
    figures = json.loads((teacher / CARD).read_text())["figures"]
    assert figures["tokens"]["value"] > 1000 and 0.9 < figures["named"]["value"] <= 1
    lines = (tmp_path / "taught" / "metrics.jsonl").read_text()
    again = learned(cut, "http://127.0.0.1:9/v1", home, tmp_path / "taught", 80, 0.9)  # the server is gone
    assert again.after.mean == taught.after.mean and (tmp_path / "taught" / "metrics.jsonl").read_text() == lines
    with pytest.raises(DanluError, match=r"made with other settings: asked\.yaml says which"):
        learned(cut, url, home, tmp_path / "taught", 80, 0.9, most=6)


def test_learning_goes_on_exactly_where_it_was_stopped(cut: Checkpoint, url: str, home: Path, tmp_path: Path) -> None:
    rows = told(cut, url, home, tmp_path / "asked")
    recipe = tuning(home, 6).recipe(cut, {"teacher": str(rows.path), "share": 0.5}, "distill")
    recipe = recipe.model_copy(update={"precision": "fp32"})
    start(recipe, tmp_path / "whole", plan=None, steps=None)
    start(recipe, tmp_path / "parts", plan=None, steps=2)
    start(recipe, tmp_path / "parts", plan=None, steps=None)
    one, other = (Checkpoint.open(tmp_path / name).load().state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_asking_goes_on_where_it_was_cut_short(
    home: Path, cut: Checkpoint, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(cut, url, home, tmp_path / "whole")
    appended: list[int] = []
    append = RowFile.append

    def until_killed(file: RowFile, rows: np.ndarray) -> None:
        if len(appended) == 2:
            file._file.write(rows.tobytes()[:1000])  # a part of a row, as a killed process leaves
            raise KeyboardInterrupt
        appended.append(len(rows))
        append(file, rows)

    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "append", until_killed)
        with pytest.raises(KeyboardInterrupt):
            told(cut, url, home, tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("teacher-*"))
    written: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "append", lambda file, rows: written.append(len(rows)) or append(file, rows))
        made = told(cut, url, home, tmp_path / "parts")
    about = json.loads((whole.path / CARD).read_text())["settings"]
    assert sum(appended) == 16 and sum(written) == about["rows"] + about["heldout_rows"] - 16
    assert made.path.name == whole.path.name
    assert all((made.path / name).read_bytes() == (whole.path / name).read_bytes() for name in (TRAIN, HELDOUT))


def test_a_teacher_that_writes(home: Path, cut: Checkpoint, base: Checkpoint, url: str, tmp_path: Path) -> None:
    rows = told(cut, url, home, tmp_path, writes=True, most=20)
    assert not (rows.path / HELDOUT).exists()
    batch = rows.batch(np.arange(len(rows)))
    learned_places = batch.targets != IGNORED
    wanted = [[place >= 15 for place in range(32)]] * 12  # each answers to the window's end
    assert learned_places[:12].tolist() == wanted
    assert (batch.tokens[:12, 16:] == batch.targets[:12, 15:-1]).all()
    with torch.no_grad():
        known = base.load().logits(base.load()(batch.tokens, segments=batch.segments)).log_softmax(-1)
    assert batch.told is not None and batch.logprobs is not None
    there = learned_places[..., None] & (batch.logprobs > NOTHING)
    assert torch.allclose(known.gather(-1, batch.told)[there], batch.logprobs[there], atol=1e-3)


def test_the_command(home: Path, url: str, tmp_path: Path) -> None:
    line = ["compress", "distill", str(home / "cut"), "--teacher", url, "--teacher-model", "teacher", "--top", "3"]
    line += ["--text", str(home / "text.txt"), "--steps", "1", "--window", "32", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*line, "--heldout-from", "end", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"]["loss_teacher"]["unit"] == "nat/token"
    other = [str(home / "base" / "model") if word == url else word for word in line]
    refused = CliRunner().invoke(app, other)
    assert refused.exit_code == 2 and "--teacher-model is for a teacher behind a server" in refused.output


@pytest.mark.parametrize(
    ("teaching", "why"),
    [
        (Teaching(temperature=2.0), "not enough for temperature"),
        (Teaching(divergence="reverse"), "not enough for divergence reverse"),
        (Teaching(states=0.1), "no hidden states"),
        (Teaching(own=0.5), "not enough for own"),
    ],
)
def test_more_than_it_can_tell(cut: Checkpoint, teaching: Teaching, why: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=why):
        distill_from(cut, Endpoint("http://127.0.0.1:9/v1"), tuning(home, 1), teaching, tmp_path / "out", 5, False)
    assert not (tmp_path / "out").exists()


def test_recipes_that_want_other_rows(cut: Checkpoint, url: str, home: Path, tmp_path: Path) -> None:
    rows = told(cut, url, home, tmp_path)
    recipe = replace(tuning(home, 4), window=16).recipe(cut, {"teacher": str(rows.path)}, "other")
    with pytest.raises(DanluError, match="was asked about windows of 32 tokens"):
        told_rows(recipe, cut.tokenizer)
    about = rows.path / ABOUT
    about.write_text(about.read_text().replace(rows.about["words"], "0" * 64))
    with pytest.raises(DanluError, match="was asked about another vocabulary"):
        told_rows(recipe, cut.tokenizer)
    asked = ObjectiveSettings.model_validate({"kind": "classification", "teacher": str(rows.path)})
    with pytest.raises(DanluError, match="not enough for kind classification"):
        taught(Labels(), asked, torch.device("cpu"))


def test_a_damaged_row_is_noticed(home: Path, cut: Checkpoint, url: str, tmp_path: Path) -> None:
    rows = told(cut, url, home, tmp_path)
    file = rows.path / TRAIN
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    with pytest.raises(DanluError, match="is damaged"):
        rows.batch(np.arange(len(rows)))


# --- Servers of other kinds -----------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def server(answer: Answer, protocol: str = "HTTP/1.0", **headers: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of one model that answers completions as a test wants, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def _say(self, status: int, body: Any) -> None:
            made = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(made)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(made)
            self.close_connection = True

        def do_GET(self) -> None:
            self._say(200, {"data": [{"id": "m", "max_model_len": 64}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"key": self.headers.get("Authorization")})
            self._say(*answer(body))

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def refusal(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message}}


def like_llama_cpp(ids: bool) -> Answer:
    """No echo; a chat's shape with ids, or with bytes alone; it always writes ` ore`."""

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("echo"):
            return refusal(400, "Only no echo is supported")
        entries = []
        for byte in b" ore":
            tops = [(byte, -0.1), (100, -3.0)]
            named = [{"token": chr(token), "bytes": [token], "logprob": logprob} for token, logprob in tops]
            named = [one | {"id": one["bytes"][0]} if ids else one for one in named]
            entries.append(named[0] | {"top_logprobs": named})
        length = body["max_tokens"]
        made = {"text": " ore"[:length], "logprobs": {"content": entries[:length]}}
        answers = [{"choices": [made | {"index": index}]} for index in range(len(body["prompt"]))]
        return 200, answers if len(answers) > 1 else answers[0]

    return answer


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_without_echo_writes(cut: Checkpoint, home: Path, tmp_path: Path, ids: bool) -> None:
    with server(like_llama_cpp(ids)) as (url, _):
        batch = told(cut, url, home, tmp_path, most=2).batch(np.arange(8))
    assert batch.told is not None and batch.logprobs is not None
    assert bytes(batch.targets[0][batch.targets[0] != IGNORED].tolist()) == b" ore"
    places = batch.targets[0] != IGNORED
    assert batch.told[0][places].tolist() == [[byte, 100, byte] for byte in b" ore"]
    assert batch.logprobs[0][places].exp().tolist() == [pytest.approx([0.9048, 0.0498, 0.0], abs=1e-4)] * 4


def test_a_server_that_names_tokens_by_text_and_must_write_one(cut: Checkpoint, home: Path, tmp_path: Path) -> None:
    def name(byte: int) -> str:
        return chr(byte) if byte < 128 else rf"bytes:\x{byte:02x}"

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "return_tokens_as_token_ids" in body or body["max_tokens"] == 0:
            return refusal(400, "unrecognized")

        def said(prompt: Any) -> dict[str, Any]:
            ids = [*(prompt if isinstance(prompt, list) else prompt.encode()), 33]  # and an exclamation mark
            own = [None, *[-1.0] * (len(ids) - 1)]
            tops = [None, *({name(byte): -1.0, name(0xE4): -0.7} for byte in ids[1:])]
            return {"tokens": [name(byte) for byte in ids], "token_logprobs": own, "top_logprobs": tops}

        choices = [{"index": at, "text": "", "logprobs": said(one)} for at, one in enumerate(body["prompt"])]
        return 200, {"choices": choices[::-1]}

    with server(answer) as (url, _):
        batch = told(cut, url, home, tmp_path, most=1).batch(np.arange(4))
    assert batch.told is not None and batch.logprobs is not None
    others = (batch.targets != IGNORED) & (batch.targets != 0xE4)
    assert (batch.told[others] == torch.stack((torch.full_like(batch.targets, 0xE4), batch.targets), -1)[others]).all()
    assert batch.logprobs[others].unique().tolist() == pytest.approx([-1.0, -0.7])


def test_a_token_with_other_bytes_is_another_word(cut: Checkpoint, home: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        status, made = like_llama_cpp(True)(body)
        if status == 200:
            made["choices"][0]["logprobs"]["content"][0]["id"] = 7
        return status, made

    with server(answer) as (url, _), pytest.raises(DanluError, match="its tokens are not the student's: its token 7"):
        told(cut, url, home, tmp_path)


def test_text_that_is_cut_otherwise_is_refused(cut: Checkpoint, home: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        def said(prompt: Any) -> dict[str, Any]:
            ids = prompt if isinstance(prompt, list) else list(prompt.encode())[::-1]
            tops = [None, *({f"token_id:{token}": -0.5} for token in ids[1:])]
            tokens = [f"token_id:{token}" for token in ids]
            return {"tokens": tokens, "token_logprobs": [None, *[-0.5] * (len(ids) - 1)], "top_logprobs": tops}

        choices = [{"index": at, "text": "", "logprobs": said(one)} for at, one in enumerate(body["prompt"])]
        return 200, {"choices": choices}

    with server(answer) as (url, _), pytest.raises(DanluError, match=r"not the student's: it cuts .* otherwise"):
        told(cut, url, home, tmp_path)
    assert not list(tmp_path.glob("teacher-*"))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda body: refusal(400, "logprobs: at most 5"), "gives no log probabilities: 400: logprobs: at most 5"),
        (lambda body: (200, {"choices": [{"text": "x", "logprobs": None}]}), "its answers have no logprobs"),
        (lambda body: (200, {"choices": []}), "does not answer each of 1 prompts"),
        (lambda body: (200, b"<html>"), "something else than a JSON object"),
        (lambda body: (301, b""), "gives no log probabilities: 301"),
        (lambda body: (401, {"error": {"message": "no key"}}), "gives no log probabilities: 401: no key"),
        (
            lambda body: (200, {"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [0.7]}}]}),
            "cannot be read",
        ),
        (
            lambda body: (
                200,
                {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-0.1],
                                           "top_logprobs": [{"a": -0.1, "b": -0.1}]}}]},
            ),
            "add up to 1.8",
        ),
    ],
)  # fmt: skip
def test_servers_that_cannot_teach(answer: Answer, why: str, cut: Checkpoint, home: Path, tmp_path: Path) -> None:
    with server(answer, Location="http://127.0.0.1:9/") as (url, _), pytest.raises(DanluError, match=why):
        told(cut, url, home, tmp_path)
    assert not list(tmp_path.glob("teacher-*"))


def test_a_server_that_refuses_binds_nobody_to_what_it_was_asked(cut: Checkpoint, home: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return refusal(400, f"logprobs: at most 5, not {body['logprobs']}")

    for most in (20, 10):
        with server(answer) as (url, _), pytest.raises(DanluError, match=f"at most 5, not {most}"):
            distill_from(cut, Endpoint(url), tuning(home, 1), Teaching(), tmp_path / "out", most, False)
        assert not (tmp_path / "out").exists()


def test_failures_are_tried_again_and_the_key_goes_along(
    cut: Checkpoint, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    pauses: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", pauses.append)
    turn = itertools.count()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return like_llama_cpp(True)(body) if next(turn) % 3 == 2 else refusal(429, "slowly")

    with server(answer, Retry_After="7") as (url, asked):
        told(cut, url, home, tmp_path, most=2)
    assert pauses and set(pauses) == {7.0}
    assert {one["key"] for one in asked} == {"Bearer secret"}
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret" in held for held in everything)


def test_a_connection_that_was_let_go_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module.time, "sleep", pytest.fail)
    with server(lambda body: (200, {"said": body["a"]}), "HTTP/1.1") as (url, asked):
        endpoint = Endpoint(url, "m")
        assert [endpoint.post("completions", {"a": number})["said"] for number in range(3)] == [0, 1, 2]
    assert len(asked) == 3


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", pauses.append)
    with pytest.raises(DanluError, match=r"cannot be reached.*8 tries"):
        Endpoint("http://127.0.0.1:9/v1").find_model()
    assert len(pauses) == 7 and all(a < 2.1 * b + 1e-9 and b < 60.1 for a, b in itertools.pairwise(pauses))
    for wrong in ("http://", "http://a:b/v1", "http://user@h/v1", "https://h/v1?x=1"):
        with pytest.raises(DanluError, match="is no address"):
            Endpoint(wrong)


def test_models_are_named(url: str, cut: Checkpoint) -> None:
    found = Endpoint(url)
    assert found.find_model()["max_model_len"] == 64 and found.model == "teacher"
    with pytest.raises(DanluError, match=r"has no model 'gpt'\n.*--teacher-model: teacher"):
        Endpoint(url, "gpt").find_model()


def test_rows_longer_than_its_context(cut: Checkpoint, url: str, home: Path, tmp_path: Path) -> None:
    long = replace(tuning(home, 1), window=64)
    with pytest.raises(DanluError, match=r"reads 64 tokens, and rows have 64(.|\n)*--window 63"):
        distill_from(cut, Endpoint(url), long, Teaching(), tmp_path / "out", 5, False)


def test_names_without_ids_are_found_by_their_bytes(base: Checkpoint) -> None:
    reader = Reader(base.tokenizer, 257, "here")
    tops = [None, {r"bytes:\xe4": -1, "token_id:300": -2}, None, {"e": -3}]
    named = {"tokens": ["t", r"bytes:\xe4", "\ufffd", "the"], "token_logprobs": [None, -1, -1, -1]}
    choice = {"logprobs": named | {"top_logprobs": tops}}
    said = reader.read(choice)
    assert said is not None and [one.token for one in said] == [ord("t"), 0xE4, None, None]
    assert said[0].logprobs == {} and said[1].logprobs == {0xE4: -1.0} and said[1].unplaced == 1
    assert said[3].logprobs == {ord("e"): -3.0}
