"""Copies: exact ones always found, near ones by their wording, in English, Chinese and code; the first one stays."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.duplicates import EXACT, KEPT, NEAR, CopyFinder, shingles, similarity

ENGLISH = (
    "The furnace is lit at dawn and fed with dry pine until the walls glow; then the vessel is sealed with clay, "
    "set upon three stones, and left alone for nine days while the apprentice counts every breath of the bellows."
)
CHINESE = (
    "丹炉须于黎明点火，以松木添薪，直至炉壁通红；而后以泥封鼎，置于三石之上，静候九日，"
    "其间学徒须数清风箱的每一次呼吸，不可有误。"
)
CODE = """def total(rows):
    result = 0
    for row in rows:
        result = result + row.price * row.count - row.discount
    if result < 0:
        raise ValueError(f"total of {len(rows)} rows is below zero")
    return round(result, 2)
"""


def find(texts: list[str], near: bool = True, threshold: float = 0.8) -> tuple[list[int], list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        finder = CopyFinder(Path(folder), near, threshold)
        finder.add(texts[: len(texts) // 2])
        finder.add(texts[len(texts) // 2 :])
        leaders, kinds = finder.leaders(texts.__getitem__)
    return leaders.tolist(), kinds.tolist()


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        (ENGLISH, ENGLISH.replace("dawn", "dusk"), ENGLISH[:90] + " Something else entirely follows from here on."),
        (
            CHINESE,
            CHINESE.replace("松木", "柏木"),
            CHINESE[:20] + "其余的话与前文毫不相干，说的是另一件完全不同的事情。",
        ),
        (CODE, CODE.replace("below zero", "negative"), CODE.replace("result", "x").replace("row", "y")),
    ],
)
def test_near_copies(text: str, near: str, far: str) -> None:
    assert find([text, far, near, text]) == ([0, 1, 0, 0], [KEPT, KEPT, NEAR, EXACT])
    assert find([text, far, near, text], near=False) == ([0, 1, 2, 0], [KEPT, KEPT, KEPT, EXACT])


def test_a_sign_makes_a_difference() -> None:
    assert find(["What is 3 + 4?", "What is 3 - 4?", "what IS  3 + 4 ?"])[0] == [0, 1, 0]


def test_wordless_texts_are_only_compared_exactly() -> None:
    assert find(["", "  ", "🙂", "🙂", ""]) == ([0, 1, 2, 2, 0], [KEPT, KEPT, KEPT, EXACT, EXACT])


@given(st.lists(st.sampled_from(["a b c", "a b c d", "炼丹", "炼丹炉", "x", "", "A b C"]), max_size=40))
@settings(max_examples=40, deadline=None)
def test_every_exact_copy_follows_its_first(texts: list[str]) -> None:
    leaders, kinds = find(texts, near=False)
    assert leaders == [texts.index(text) for text in texts]
    assert [kind == KEPT for kind in kinds] == [leader == number for number, leader in enumerate(leaders)]


def test_what_is_left_out_is_near_what_is_kept() -> None:
    chance = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    texts = []
    for _ in range(150):
        one = chance.choices(words, k=40)
        for changed in range(4):
            texts.append(" ".join(one[:changed] + ["other"] * changed + one[2 * changed :]))
    chance.shuffle(texts)
    leaders, kinds = find(texts)
    for number, (leader, kind) in enumerate(zip(leaders, kinds, strict=True)):
        assert leaders[leader] == leader <= number
        if kind == NEAR:
            assert similarity(shingles(texts[leader]), shingles(texts[number])) >= 0.8
    kept = [shingles(texts[number]) for number, kind in enumerate(kinds) if kind == KEPT]
    missed = sum(similarity(one, other) >= 0.8 for number, one in enumerate(kept) for other in kept[:number])
    assert missed <= 0.02 * len(texts)  # hashing proposes nearly every pair


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_thresholds(threshold: float) -> None:
    words = [str(number) for number in range(100)]
    texts = [" ".join(words), " ".join(words[:-40] + ["x"] * 40), " ".join([*words[:-4], "a", "b", "c", "d"])]
    shared = [similarity(shingles(texts[0]), shingles(text)) for text in texts[1:]]
    kinds = find(texts, threshold=threshold)[1]
    assert kinds[1:] == [NEAR if value >= threshold else KEPT for value in shared]


def test_similarity_is_jaccard() -> None:
    assert similarity(shingles("a b c d"), shingles("a b c e")) == pytest.approx(1 / 3)
    assert similarity(shingles("a b c d"), shingles("A  b\nc d")) == 1
    assert similarity(shingles(""), shingles("")) == 0
    assert len(set(shingles("a b c").tolist()) | set(shingles("c b a").tolist())) == 2  # order counts
