"""Conversations through a pipe and as one question, in a process of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.serve.backend import GGUFBackend
from danlu.serve.chat import Conversation, chat
from danlu.serve.prompt import chat_prompt
from danlu.serve.text import Sampling
from tests.serve.conftest import CONTEXT

TALK = f"""
import json, sys
from danlu.errors import DanluError
from danlu.serve.chat import chat
try:
    chat(sys.argv[1], context={CONTEXT}, threads=1, **json.loads(sys.argv[2]))
except DanluError as error:
    sys.exit(str(error))
"""


def talk(gguf: Path, lines: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
    data = lines.encode() if isinstance(lines, str) else lines
    command = [sys.executable, "-c", TALK, str(gguf), json.dumps(options)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def greedy(backend: GGUFBackend, messages: list[dict[str, str]], most: int) -> str:
    sampling = Sampling(max_new_tokens=most)
    return backend.tokenizer.decode(list(backend.generate(chat_prompt(backend.tokenizer, messages), sampling)))


def test_one_question_gets_the_engine_s_answer(gguf: Path, backend: GGUFBackend) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    done = talk(gguf, "", prompt=question["content"], max_tokens=20)
    assert (done.returncode, done.stdout) == (0, greedy(backend, [question], 20) + "\n")
    assert "token/s" in done.stderr


def test_piped_lines_are_turns_and_commands(gguf: Path) -> None:
    lines = "My name is Li Lei.\n\n/reset\n/system 用中文回答。\n你好！\nAnd again.\n/exit\nnever asked\n"
    done = talk(gguf, lines, max_tokens=8, as_json=True)
    assert done.returncode == 0
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["question"] for turn in turns] == ["My name is Li Lei.", "你好！", "And again."]
    assert turns[2]["prompt_tokens"] > turns[1]["prompt_tokens"] + turns[1]["completion_tokens"]
    assert all(turn["finish_reason"] in ("stop", "length") for turn in turns)
    assert "forgotten" in done.stderr
    assert "用中文回答。" in done.stderr


def test_mistakes_through_a_pipe(gguf: Path) -> None:
    assert "no command /rest" in talk(gguf, "/rest\n").stderr
    assert "standard input, line 2: is not UTF-8" in talk(gguf, b"/help\n\xff\xfe\n").stderr


def test_a_conversation_that_outgrows_the_context(backend: GGUFBackend) -> None:
    conversation = Conversation(backend, Sampling(max_new_tokens=2))
    turn, stream = conversation.ask("Hi")
    "".join(stream)
    kept = list(conversation.messages)
    with pytest.raises(DanluError) as caught:
        conversation.ask("word " * CONTEXT)
    assert str(CONTEXT) in caught.value.what
    assert caught.value.fix is not None
    assert "/reset" in caught.value.fix
    assert conversation.messages == kept
    assert turn.finish == "length"


def test_history_is_what_the_model_reads(backend: GGUFBackend) -> None:
    conversation = Conversation(backend, Sampling(max_new_tokens=6), system="Be brief.")
    first, stream = conversation.ask("Name a colour.")
    assert "".join(stream) == first.answer
    second, stream = conversation.ask("Another?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "Another?"},
    ]
    assert "".join(stream) == greedy(backend, messages, 6)
    assert second.prompt_tokens == len(chat_prompt(backend.tokenizer, messages))


def test_an_answer_cut_short_is_remembered_as_far_as_it_got(backend: GGUFBackend) -> None:
    conversation = Conversation(backend, Sampling(max_new_tokens=50))
    turn, stream = conversation.ask("Tell a story.")
    said = next(stream) + next(stream) + next(stream)
    stream.close()
    assert turn.finish == "interrupted"
    assert conversation.messages[-1] == {"role": "assistant", "content": said}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(gguf: Path) -> None:
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
        os.execv(sys.executable, [sys.executable, "-c", TALK, str(gguf), "{}"])
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 120)[0], f"waited in vain for {text!r} after {seen!r}"
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        until("> ")
        os.write(terminal, b"Write a very long story about a river.\n")
        until("river.")
        until(" the ")
        os.kill(pid, signal.SIGINT)
        until("interrupted")
        until("> ")
        os.write(terminal, b"/nothing\n")
        until("no command")
        until("> ")
        os.write(terminal, b"/exit\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)


def test_no_model_there(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    for ref in (broken, tmp_path / "absent.gguf"):
        with pytest.raises(DanluError):
            chat(ref, prompt="hi")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DanluError, match="damaged"):
        chat(tmp_path, prompt="hi")
