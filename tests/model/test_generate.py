"""Writing text: the cache, batches, padding and streams change nothing, and transformers writes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.model.allowed import Allowed
from danlu.model.checkpoint import Checkpoint, StoredModel
from danlu.model.config import EncoderDecoderConfig, ModelConfig, Relative
from danlu.model.generate import generate, generate_batch, generate_text, generate_texts, unpad
from danlu.model.sampling import Choice
from danlu.model.transformer import Decoder, EncoderDecoder
from tests.model.tiny import tiny_tokenizer
from tests.model.zoo import Twin, twin

SHAPE = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16, "feedforward_width": 128}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 7]]
TOKENIZER = tiny_tokenizer()


def made(window: int | None = None, vocab: int = 97, context: int = 64) -> Decoder:
    """A random model whose answers do not soon repeat."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, vocab_size=vocab, context=context, sliding_window=window))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


def lively(case: str, path: Path) -> Twin:
    """A model of the zoo whose answers do not soon repeat; ours is in training, as it is loaded."""
    theirs = twin(case, path).theirs
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if not any(part in name for part in ("embed", "shared", "wte")):
                weight.mul_(5 if weight.dim() > 1 else 1 - name.endswith("bias"))
    theirs.save_pretrained(path)
    return Twin(theirs, path, StoredModel.open(path).load())


@pytest.fixture(scope="module", params=[None, 6], ids=["full", "window"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return made(request.param)


def uncached(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The slow way: everything again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_nothing(model: Decoder) -> None:
    for prompt in PROMPTS:
        assert list(generate(model, prompt, max_new_tokens=30)) == uncached(model, prompt, 30)


def test_a_batch_of_ragged_prompts_equals_each_alone(model: Decoder) -> None:
    alone = [list(generate(model, prompt, max_new_tokens=30)) for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, max_new_tokens=30) == alone
    # Rows that end at different times: the others go on as if nothing had happened.
    stops = frozenset({alone[0][4], alone[2][9]})
    stopped = [list(generate(model, prompt, max_new_tokens=30, stop_ids=stops)) for prompt in PROMPTS]
    assert len({len(row) for row in stopped}) > 1
    assert generate_batch(model, PROMPTS, max_new_tokens=30, stop_ids=stops) == stopped


def test_padded_tensors_give_the_prompts_they_were_made_of(model: Decoder) -> None:
    longest = max(map(len, PROMPTS))
    pads = [longest - len(prompt) for prompt in PROMPTS]
    left = torch.tensor([[96] * pad + prompt for pad, prompt in zip(pads, PROMPTS, strict=True)])
    left_mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, PROMPTS, strict=True)])
    right = torch.tensor([prompt + [96] * pad for pad, prompt in zip(pads, PROMPTS, strict=True)])
    assert unpad(left, left_mask) == unpad(right, left_mask.flip(1)) == PROMPTS
    with pytest.raises(DanluError, match=r"tokens \[4, 9\] and mask \[4, 8\] must be of one shape"):
        unpad(left, left_mask[:, 1:])


@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2", "mixtral", "t5 uneven", "flan-t5"])
def test_transformers_writes_the_same(case: str, tmp_path: Path) -> None:
    both = lively(case, tmp_path)
    ours, reads = both.ours, isinstance(both.ours, EncoderDecoder)
    assert isinstance(ours, Decoder | EncoderDecoder)
    free = generate_batch(ours, PROMPTS, max_new_tokens=24)
    stop = next(row[place] for row in free for place in (5, 4, 3) if row[place] not in row[:place])
    answers = generate_batch(ours, PROMPTS, max_new_tokens=24, stop_ids=frozenset({stop}))
    assert min(map(len, answers)) < 24
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    theirs = both.theirs.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    for mine, its in zip(answers, theirs[:, 1 if reads else width :].tolist(), strict=True):
        assert mine == its[: its.index(stop) if stop in its else None]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(generate(ours, prompt, max_new_tokens=24, stop_ids=frozenset({stop}))) == answer


def test_an_encoder_decoder_writes_the_same_without_a_cache(tmp_path: Path) -> None:
    model = lively("t5 uneven", tmp_path).ours
    assert isinstance(model, EncoderDecoder)
    answer, written = list(generate(model, PROMPTS[2], max_new_tokens=40)), [model.config.start]
    model.eval()
    with torch.no_grad():
        for _ in range(40):
            hidden = model(torch.tensor([PROMPTS[2]]), torch.tensor([written]))
            written.append(int(model.logits(hidden)[0, -1].argmax()))
    assert answer == written[1:]
    assert len(set(answer)) > 3


def test_stop_ids_and_limits_end_an_answer(model: Decoder) -> None:
    answer = list(generate(model, [5, 6, 7], max_new_tokens=12))
    first = answer.index(answer[5])
    assert list(generate(model, [5, 6, 7], max_new_tokens=12, stop_ids=frozenset({answer[5]}))) == answer[:first]
    assert list(generate(model, [5] * 60, max_new_tokens=100)) == uncached(model, [5] * 60, 4)
    assert len(generate_batch(model, [[5] * 60], max_new_tokens=4)[0]) == 4
    assert generate_batch(model, [], max_new_tokens=3) == []
    assert generate_batch(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert list(generate(model, [1], max_new_tokens=0)) == []


@pytest.fixture(scope="module")
def speaker() -> Decoder:
    """A model with the small tokenizer's vocabulary."""
    return made(vocab=260, context=128)


def test_a_stop_string_of_chinese_characters_ends_the_answer_wherever_tokens_end(speaker: Decoder) -> None:
    said, prompts = "今天天气很好。\n用户：再见", [TOKENIZER.encode("你好"), [5]]  # three tokens a character
    how = {"max_new_tokens": 60, "allowed": Allowed.texts(TOKENIZER, [said])}
    for stops, pieces in (
        ([], list(said)),
        (["助手：", "\n用户："], list("今天天气很好。")),
        # What might become a stop string is held back, and given out once it has not.
        (["天天天", "再见了"], [*"今", "天天气", *"很好。\n用户：", "再见"]),
    ):
        assert list(generate_text(speaker, TOKENIZER, prompts[0], stops=stops, **how)) == pieces
        assert generate_texts(speaker, TOKENIZER, prompts, stops=stops, **how) == ["".join(pieces)] * 2


@settings(max_examples=40, deadline=None)
@given(
    st.text("ab中文é", min_size=1, max_size=12),
    st.lists(st.text("ab中文é", min_size=1, max_size=3), min_size=1, max_size=2),
)
def test_text_ends_where_the_first_stop_string_is_complete(speaker: Decoder, said: str, stops: list[str]) -> None:
    forced = Allowed.texts(TOKENIZER, [said])
    pieces = list(generate_text(speaker, TOKENIZER, [3], max_new_tokens=60, allowed=forced, stops=stops))
    ends = [said.find(stop) + len(stop) for stop in stops if stop in said]
    expected = said if not ends else min(said[: min(ends)].removesuffix(stop) for stop in stops)
    assert "".join(pieces) == expected
    both = generate_texts(speaker, TOKENIZER, [[4], [3]], max_new_tokens=60, allowed=forced, stops=stops)
    assert both == [expected] * 2


def test_rows_of_text_end_for_themselves(speaker: Decoder) -> None:
    prompts, choice = [[5, 6], [7, 8, 9], [10]], Choice(temperature=1.0, seed=3)
    free = generate_texts(speaker, TOKENIZER, prompts, max_new_tokens=40, choice=choice)
    stop = free[1][5:7]
    assert len(stop) == 2
    cut = generate_texts(speaker, TOKENIZER, prompts, max_new_tokens=40, choice=choice, stops=[stop])
    assert cut == [text.split(stop)[0] for text in free]
    assert cut != free and any(mine == whole for mine, whole in zip(cut, free, strict=True))


def test_a_character_cut_in_half_by_the_limit_is_left_out(speaker: Decoder) -> None:
    tokens = TOKENIZER.encode("中文")
    assert len(tokens) == 6
    for kept, text in ((6, "中文"), (5, "中"), (4, "中"), (2, "")):
        forced = Allowed([tokens[:kept]])
        assert "".join(generate_text(speaker, TOKENIZER, [3], max_new_tokens=6, allowed=forced)) == text


def test_wrong_calls_are_refused_at_the_call(model: Decoder, speaker: Decoder) -> None:
    with pytest.raises(DanluError, match="prompt is empty"):
        generate(model, [], max_new_tokens=1)
    with pytest.raises(DanluError, match="64 tokens leaves no room in the model's context of 64"):
        generate(model, [1] * 64, max_new_tokens=1)
    with pytest.raises(DanluError, match="65 tokens is longer than the model's context of 64"):
        generate(model, [1] * 65, max_new_tokens=1)
    with pytest.raises(DanluError, match="60 tokens leaves room for 4, not for an answer of 5"):
        generate_batch(model, [[1], [1] * 60], max_new_tokens=5)
    with pytest.raises(DanluError, match="holds id 97; the model's vocabulary has 97"):
        generate(model, [1, 97], max_new_tokens=1)
    with pytest.raises(DanluError, match="holds id -1"):
        generate_batch(model, [[1], [-1]], max_new_tokens=1)
    with pytest.raises(DanluError, match="max_new_tokens is -1"):
        generate(model, [1], max_new_tokens=-1)
    with pytest.raises(DanluError, match="temperature is -1"):
        generate(model, [1], max_new_tokens=1, temperature=-1.0)
    for stops in ([""], "ab"):
        with pytest.raises(DanluError, match="stop strings must be"):
            generate_text(speaker, TOKENIZER, [1], max_new_tokens=1, stops=stops)


def test_what_the_encoder_reads_and_the_decoder_writes_have_their_own_limits() -> None:
    shape = {**SHAPE, "vocab_size": 97}
    reads = ModelConfig(**shape, context=8, causal=False, head=None, tied=True)
    model = EncoderDecoder(EncoderDecoderConfig(reads, ModelConfig(**shape, context=6, cross=True)))
    assert len(list(generate(model, [1] * 8, max_new_tokens=9))) == 5  # the start takes a place
    with pytest.raises(DanluError, match="9 tokens is longer than the model's context of 8"):
        generate(model, [1] * 9, max_new_tokens=1)
    with pytest.raises(DanluError, match="8 tokens leaves room for 5, not for an answer of 6"):
        generate_batch(model, [[1] * 8], max_new_tokens=6)


def test_distances_have_no_longest_prompt() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, vocab_size=97, context=4, positions=Relative()))
    assert list(generate(model, [1, 2, 3, 4, 5], max_new_tokens=3)) == uncached(model, [1, 2, 3, 4, 5], 3)


def test_a_model_in_training_writes_without_dropout_and_goes_back_to_training() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, vocab_size=97, context=64, dropout=0.5))
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    tokens = generate(model, [5, 6, 7], max_new_tokens=20)
    first = next(tokens)
    assert [module.training for module in model.modules()] == modes
    answer = [first, *tokens]
    assert answer == list(generate(model.eval(), [5, 6, 7], max_new_tokens=20))


def test_generation_leaves_no_inference_mode_behind(model: Decoder) -> None:
    tokens = generate(model, [5, 6, 7], max_new_tokens=3)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert torch.zeros(1, requires_grad=True).mul(2).requires_grad


def test_smollm2_answers(smollm2: Path) -> None:
    checkpoint = Checkpoint.open(smollm2)
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer
    questions = ["What is the capital of France?", "What is 2+2? Answer with one number."]
    prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": q}], True)) for q in questions]
    answers = generate_batch(model, prompts, max_new_tokens=10, stop_ids=tokenizer.stop_ids)
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris."
    assert answers[1] == list(generate(model, prompts[1], max_new_tokens=10, stop_ids=tokenizer.stop_ids))
    assert generate_texts(model, tokenizer, prompts[:1], max_new_tokens=10, stops=[" is"]) == ["The capital of France"]
