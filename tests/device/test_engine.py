"""The engine against llama-cpp-python's own high-level class, our tokenizer, and plain arithmetic."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.device import engine as module
from danlu.device.engine import BATCH, IGNORED, SCORED, Engine, common_prefix, cross_entropy, steps
from danlu.errors import DanluError
from danlu.tokenizer import Tokenizer

IM_END = 2


def answer(engine: Engine, prompt: list[int], count: int, **options: object) -> list[int]:
    return list(engine.generate(prompt, max_new_tokens=count, **options))  # type: ignore[arg-type]


# Text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "text",
    ["Hello  world\n\n\tx", "丹炉炼大模型。\u3000𝛼 🜁", "<|im_start|>user\nhi<|im_end|>", "", " a", "e\u0301 1234567"],
)
def test_tokens_are_those_of_our_tokenizer(engine: Engine, smollm2: Path, text: str, special: bool) -> None:
    assert engine.tokenize(text, special) == Tokenizer.load(smollm2).encode(text, special)


def test_bytes_of_tokens_join_to_the_text(engine: Engine) -> None:
    text = "丹炉 turns 铅 into gold 🜚"
    ids = engine.tokenize(text)
    assert engine.detokenize(ids).decode() == text
    assert b"".join(engine.detokenize([token]) for token in ids).decode() == text
    assert engine.detokenize([IM_END]) == b""
    assert engine.detokenize([IM_END], special=True) == b"<|im_end|>"


# Generation


def test_greedy_is_llama_cpp_pythons(engine: Engine, smollm2: Path, question: list[int]) -> None:
    from llama_cpp import Llama

    peer = Llama(str(smollm2), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    expected = [token for token, _ in zip(peer.generate(question, temp=0.0), range(12), strict=False)]
    assert answer(engine, question, 12) == expected
    assert engine.detokenize(expected).startswith(b"The capital of France is Paris.")


@pytest.mark.parametrize("mapped", [True, False])
def test_a_mapped_file_answers_alike(engine: Engine, smollm2: Path, question: list[int], mapped: bool) -> None:
    with Engine(smollm2, context=256, threads=1, mapped=mapped) as made:
        assert answer(made, question, 12) == answer(engine, question, 12)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("mapped", [True, False])
def test_only_a_mapped_file_stays_where_it_is(smollm2: Path, tmp_path: Path, mapped: bool) -> None:
    file = tmp_path / "another-name.gguf"  # other engines of these tests may have mapped the fixture's own
    shutil.copyfile(smollm2, file)
    with Engine(file, context=256, threads=1, mapped=mapped):
        assert (file.name in Path("/proc/self/maps").read_text()) == mapped


def test_a_stop_token_ends_the_answer_and_is_not_given_out(engine: Engine, question: list[int]) -> None:
    whole = answer(engine, question, 12)
    assert IM_END in whole
    assert answer(engine, question, 12, stop_ids=frozenset({IM_END})) == whole[: whole.index(IM_END)]


def test_what_prompts_share_is_computed_once(
    engine: Engine, question: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = answer(engine, question, 4)
    longer = question + alone + engine.tokenize("<|im_end|>\n<|im_start|>user\nAnd of Italy?")
    engine.clear()
    expected = answer(engine, longer, 4)
    engine.clear()
    answer(engine, question, 4)
    computed, compute = [], engine._compute

    def counting(native: object, batch: object) -> None:
        computed.append(batch.n_tokens)  # type: ignore[attr-defined]
        compute(native, batch)

    monkeypatch.setattr(engine, "_compute", counting)
    assert answer(engine, longer, 4) == expected
    cached = len(question) + 3  # of the first answer's four tokens the last was never read
    assert computed[0] == len(longer) - cached
    computed.clear()
    answer(engine, longer, 1)
    assert computed == [1], "the same prompt again: only its last token, for its logits"


def test_the_same_seed_draws_the_same(engine: Engine, question: list[int]) -> None:
    options = {"temperature": 1.5, "top_p": 0.98, "min_p": 0.01}
    first, again, other = (answer(engine, question, 16, seed=seed, **options) for seed in (3, 3, 4))
    assert first == again != other
    largest = [answer(engine, question, 16, seed=2**32 - 1, **options) for _ in range(2)]
    assert largest[0] == largest[1], "llama.cpp itself takes that seed as the wish for a random one"
    assert answer(engine, question, 8, temperature=1.5, top_k=1) == answer(engine, question, 8)


def test_penalties_keep_from_repeating(engine: Engine) -> None:
    prompt = engine.tokenize("a b c a b c a b c a b c a b c a b c")
    plain = answer(engine, prompt, 16)
    bent = answer(engine, prompt, 16, repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=1.0)
    assert len(set(bent)) > len(set(plain))


def test_a_full_context_ends_the_answer(engine: Engine, question: list[int]) -> None:
    prompt = (question * 20)[: engine.context - 3]
    assert len(answer(engine, prompt, 50)) == 3


@pytest.mark.parametrize(("length", "words"), [(0, "empty"), (256, "256 tokens.*256"), (300, "300 tokens.*256")])
def test_a_prompt_that_does_not_fit_is_refused_at_the_call(engine: Engine, length: int, words: str) -> None:
    with pytest.raises(DanluError, match=words):
        engine.generate([5] * length, max_new_tokens=4)


def test_an_older_generation_does_not_go_on_in_a_newer_ones_cache(engine: Engine, question: list[int]) -> None:
    old = engine.generate(question, max_new_tokens=4)
    next(old)
    next(engine.generate(question[:5], max_new_tokens=4))
    with pytest.raises(RuntimeError, match="cache"):
        next(old)


def test_a_token_outside_the_vocabulary_is_an_error_and_the_engine_lives_on(
    engine: Engine, question: list[int]
) -> None:
    with pytest.raises(DanluError, match=r"llama\.cpp failed"):
        answer(engine, [5, engine.vocab_size], 1)
    assert answer(engine, question, 2)


def test_a_batch_answers_as_one_at_a_time(exact_engine: Engine) -> None:
    engine = exact_engine
    prompts = [engine.tokenize(text) for text in ("One two three", "The capital of France is", "def f(x):\n    return")]
    alone = [answer(engine, prompt, 8) for prompt in prompts]
    assert engine.generate_batch(prompts, max_new_tokens=8) == alone
    stop = frozenset({alone[1][2]})
    stopped = engine.generate_batch(prompts, max_new_tokens=8, stop_ids=stop)
    assert stopped == [answer(engine, prompt, 8, stop_ids=stop) for prompt in prompts]
    assert engine.generate_batch([], max_new_tokens=8) == []
    with pytest.raises(DanluError, match="do not fit"):
        engine.generate_batch(prompts, max_new_tokens=127)


# Scoring


def test_losses_are_the_logits_cross_entropy(exact_engine: Engine) -> None:
    engine = exact_engine
    tokens = engine.tokenize("Gold is a chemical element; it has the symbol Au and the atomic number 79. " * 4)
    targets = [*tokens[1:], IGNORED]
    targets[3] = targets[7] = IGNORED
    loss, correct = engine.token_losses(tokens, targets)
    assert loss.dtype == np.float32 and correct.dtype == bool and loss.shape == correct.shape == (len(tokens),)
    assert sum(target != IGNORED for target in targets) > SCORED, "more than one step"
    for place in (0, 5, SCORED + 5, len(tokens) - 2):
        logits = engine.next_logits(tokens[: place + 1]).astype(np.float64)
        expected = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[targets[place]]
        assert loss[place] == pytest.approx(expected, abs=1e-4)
        assert correct[place] == (logits.argmax() == targets[place])
    for place in (3, 7, len(tokens) - 1):
        assert loss[place] == 0 and not correct[place]


def test_a_shared_beginning_does_not_change_the_losses(exact_engine: Engine) -> None:
    engine = exact_engine
    begin = engine.tokenize("<|im_start|>user\nTell me about ")
    documents = [begin + engine.tokenize(text) for text in ("lead and tin.", "lead and gold.", "mercury")]
    targets = [[IGNORED] * (len(begin) - 1) + one[len(begin) :] + [IGNORED] for one in documents]
    together = [engine.token_losses(*pair)[0].sum() for pair in zip(documents, targets, strict=True)]
    for document, target, loss in zip(documents, targets, together, strict=True):
        engine.clear()
        assert engine.token_losses(document, target)[0].sum() == pytest.approx(loss, rel=1e-4)


def test_nothing_wanted_costs_nothing(engine: Engine) -> None:
    loss, correct = engine.token_losses([5, 6, 7], [IGNORED] * 3)
    assert not loss.any() and not correct.any()
    assert [made.shape for made in engine.token_losses([], [])] == [(0,), (0,)]


def test_scoring_refuses_what_is_wrong(engine: Engine) -> None:
    for tokens, targets in (([1, 2], [3]), ([1, 2], [3, engine.vocab_size]), ([1], [-1])):
        with pytest.raises(ValueError, match="targets"):
            engine.token_losses(tokens, targets)
    with pytest.raises(DanluError, match="300 tokens, the context 256"):
        engine.token_losses([5] * 300, [5] * 300)


def test_cross_entropy_is_torchs() -> None:
    import torch

    logits = np.random.default_rng(0).normal(0, 20, (7, 101)).astype(np.float32)
    targets = np.arange(7) * 9
    loss, correct = cross_entropy(logits, targets)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(correct, logits.argmax(1) == targets)


@given(st.lists(st.booleans(), max_size=3 * BATCH), st.integers(0, 40))
def test_steps_cover_every_wanted_place_once(wanted: list[bool], kept: int) -> None:
    flags = np.array(wanted, bool)
    cut = list(steps(flags, kept))
    assert all(0 < stop - start <= BATCH and flags[start:stop].sum() <= SCORED for start, stop in cut)
    covered = [place for start, stop in cut for place in range(start, stop)]
    last = int(np.flatnonzero(flags)[-1]) + 1 if flags.any() else 0
    assert covered == list(range(kept, last))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(left: list[int], right: list[int]) -> None:
    shared = common_prefix(left, right)
    assert left[:shared] == right[:shared]
    assert shared in (len(left), len(right)) or left[shared] != right[shared]


# Loading


def damage(kind: str, source: Path, out: Path) -> None:
    """Make a file that cannot be loaded."""
    shutil.copyfile(source, out)
    size = out.stat().st_size
    with out.open("r+b") as file:
        if kind == "unknown architecture":
            head = file.read(2000)
            file.seek(head.index(b"\x05\x00\x00\x00\x00\x00\x00\x00llama") + 8)
            file.write(b"xyzzy")
        else:
            file.truncate({"empty": 0, "cut in the header": 5000, "cut short": size - 1000}[kind])


@pytest.mark.parametrize("kind", ["empty", "cut in the header", "cut short", "unknown architecture"])
def test_a_damaged_file_is_one_error(
    smollm2: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    damage(kind, smollm2, broken)
    with pytest.raises(DanluError, match=r"broken.gguf: llama.cpp cannot load this GGUF: .{20}") as error:
        Engine(broken)
    assert "it gives no reason" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    for place in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(DanluError, match="no such file"):
            Engine(place)


def test_a_closed_engine_says_so(smollm2: Path) -> None:
    engine = Engine(smollm2, context=64, threads=1)
    under_way = engine.generate([5, 6], max_new_tokens=4)
    next(under_way)
    engine.close()
    engine.close()
    for use in (
        lambda: next(under_way),
        lambda: engine.generate([5], max_new_tokens=1),
        lambda: engine.token_losses([5], [6]),
    ):
        with pytest.raises(RuntimeError, match=r"closed|used"):
            use()


def test_llama_cpp_does_not_talk(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine(smollm2, context=64, threads=1) as engine:
        answer(engine, [5, 6], 1)
    assert capfd.readouterr() == ("", "")


def test_a_context_beyond_the_models_own_is_lowered_and_said(
    smollm2: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(smollm2, context=9000, threads=1) as engine:
        assert engine.context == 8192
    assert "8,192 tokens" in capfd.readouterr().err


def test_a_library_that_is_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(DanluError, match=r"llama-cpp-python(.|\n)*danlu\[device\]"):
        module.library.__wrapped__()
