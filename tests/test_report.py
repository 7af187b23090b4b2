"""The page holds every figure of the artifacts, nothing from elsewhere, and survives hostile text and absent stages."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from danlu.artifact import Artifact, build, figure, only_writer, write_json
from danlu.errors import DanluError
from danlu.figures import show_amount, show_change, show_range, show_seconds, show_value
from danlu.report import PAGE, first_example, render, write_report

pytest.importorskip("matplotlib", reason="the extra danlu[report] is not installed")

HOSTILE = (
    """<script>alert("1")</script><img src=x onerror=alert(2)> ' " & --> ]]> $x^2$ {{ 7*7 }} \x00\x1b[31m \u202e 你好"""
)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def fill_data(out: Path, hostile: str = "") -> dict:
    rejected = [{"file": "a.jsonl", "line": n, "reason": "answer is empty", "preview": ""} for n in range(7)]
    rejected += [{"file": "b.jsonl", "line": 3, "reason": "longer than the window" + hostile, "preview": "x"}]
    write_lines(out / "rejected.jsonl", rejected)
    (out / "first.txt").write_text(
        f"user: What does len do?{hostile}\nassistant: ⟦Return the number of items.<|im_end|>⟧\n"
    )
    sides = {
        side: {
            "examples": figure(examples, "examples"),
            "groups": figure(examples // 50, "groups"),
            "tokens": figure(examples * 68, "token"),
            "packing_efficiency": figure(0.9684, "share"),
        }
        for side, examples in (("train", 9221), ("heldout", 591))
    }
    return {
        "rows_read": figure(9881, "rows"),
        "examples_kept": figure(9812, "examples"),
        "exact_duplicates": figure(12, "rows"),
        "near_duplicates": figure(49, "rows", by="wording shared by 80% or more"),
        "rejected": figure(8, "rows"),
        "rejected_by_reason": {"answer is empty": figure(7, "rows"), "longer than the window": figure(1, "rows")},
        "notes": {"texts longer than the window, cut into windows": figure(3, "times")},
        **sides,
    }


def fill_tune(out: Path, steps: int = 240) -> dict:
    rng = np.random.default_rng(0)
    losses = 1.7 + 0.9 * np.exp(-np.arange(steps) / 40) + rng.normal(0, 0.08, steps)
    rates = 2e-4 * np.minimum(np.arange(1, steps + 1) / 20, 1) * np.cos(np.arange(steps) / steps * 1.5)
    write_lines(
        out / "metrics.jsonl",
        [
            {"step": step, "loss": float(loss), "learning_rate": float(rate), "tokens_per_second": 800 + step % 9}
            for step, (loss, rate) in enumerate(zip(losses, rates, strict=True))
        ],
    )
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(b"\0" * 538_000)
    return {"steps": figure(steps, "steps"), "tokens": figure(steps * 2048, "token")}


def fill_evaluate(out: Path, hostile: str = "") -> dict:
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 400, 130)
    before = rng.gamma(20, 0.12, 130)
    after = before * rng.normal(0.82, 0.08, 130)
    write_lines(
        out / "documents.jsonl",
        [
            {"row": 0, "segment": 1, "tokens": int(n), "loss_before": b * n, "loss_after": a * n}
            for n, b, a in zip(tokens.tolist(), before.tolist(), after.tolist(), strict=True)
        ],
    )
    answer = {
        "prompt": "What does `heapq.heappushpop(heap, item)` of the Python standard library do?" + hostile,
        "reference": "Push item on the heap, then pop and return the smallest item from the heap. 保持堆不变。",
        "before": "The `heapq.heappushpop` function is a Python function that takes two arguments: a heap and an item"
        + hostile,
        "after": "Push item on the heap, then pop and return the smallest item.",
        "rouge_before": 0.21,
        "rouge_after": 0.83,
        "cut_before": True,
        "cut_after": False,
    }
    write_lines(out / "answers.jsonl", [answer] * 7)
    return {
        "heldout_loss_before": figure(2.3781, "nat/token", 2.291, 2.468, "bootstrap over 130 documents"),
        "heldout_loss_after": figure(1.9402, "nat/token", 1.862, 2.021),
        "heldout_loss_change": figure(-0.4379, "nat/token", -0.481, -0.399),
        "heldout_loss_change_relative": figure(-0.1841, "share", -0.199, -0.170),
        "perplexity_before": figure(10.78, "perplexity", 9.88, 11.8),
        "perplexity_after": figure(6.96, "perplexity", 6.44, 7.55),
        "token_accuracy_before": figure(0.512, "share", 0.498, 0.527),
        "token_accuracy_after": figure(0.583, "share", 0.570, 0.597),
        "token_accuracy_change": figure(0.071, "share", 0.063, 0.079),
        "rouge_l_before": figure(0.142, "score", 0.11, 0.18),
        "rouge_l_after": figure(0.334, "score", 0.26, 0.41),
        "rouge_l_change": figure(0.192, "score", 0.12, 0.26),
        "exact_match_before": figure(0.0, "share", 0.0, 0.138),
        "exact_match_after": figure(0.042, "share", 0.007, 0.202),
        "exact_match_change": figure(0.042, "share", 0.0, 0.125),
    }


FORMS = {  # type: (MB, change of loss, token/s)
    "F16": (270.9, 0.0001, 121),
    "Q8_0": (144.8, 0.0041, 183),
    "Q6_K": (138.4, 0.0070, 178),
    "Q5_K_M": (112.1, 0.0064, 187),
    "Q4_K_M": (105.5, 0.0304, 197),
    "Q3_K_M": (93.5, 0.0809, 215),
    "Q4_0": (91.9, 0.1545, 273),
    "IQ4_NL": (91.7, 0.0828, 215),
    "Q2_K": (88.2, 0.2632, 248),
}


def fill_compress(out: Path, hostile: str = "") -> dict:
    write_json(
        out / "candidates.json",
        [
            {
                "type": name + hostile,
                "bytes": round(size * 1e6),
                "loss": 1.94 + change,
                "loss_change": {"value": change, "low": change * 0.8 - 0.002, "high": change * 1.2 + 0.002},
                "decode_tokens_per_second": figure(speed, "token/s", speed - 3, speed + 4),
                "peak_memory": figure(size * 1.3e6, "byte"),
                "chosen": name == "Q4_K_M",
                "why": "the smallest that loses at most 2 %" if name == "Q4_K_M" else "larger than the one chosen",
            }
            for name, (size, change, speed) in FORMS.items()
        ],
    )
    return {"candidates": figure(len(FORMS), "forms")}


def line(name: str, asked: dict | None, measured: dict, passed: bool = True, short: str = "") -> dict:
    return {"name": name, "asked": asked, "measured": measured, "passed": passed, "short": short}


def fill_certify(out: Path, passed: bool = True, hostile: str = "") -> dict:
    speed = figure(196.8, "token/s", 194, 198) if passed else figure(120.1, "token/s", 119, 121)
    lines = [
        line("file size" + hostile, figure(110e6, "byte"), figure(105.5e6, "byte")),
        line("peak memory", figure(300e6, "byte"), figure(212e6, "byte")),
        line("decoding", figure(150, "token/s"), speed, passed, "" if passed else "29.9 token/s too slow"),
        line("prefill", None, figure(866, "token/s")),
        line("loss of quality", figure(0.02, "share"), figure(0.0157, "share", 0.012, 0.019)),
    ]
    parity = {"prompts": figure(20, "prompts"), "same_ids": figure(20, "prompts", by="three tokenizers" + hostile)}
    certificate = {
        "lines": lines,
        "passed": passed,
        "parity": parity,
        "differences": [] if passed else ["prompt 3 differs at token 17"],
        "machine": {"processor": "AMD EPYC" + hostile, "instructions": ["avx2", "avx512f"]},
        "engine": {"name": "llama.cpp", "threads": 2, "imported_torch": False},
    }
    write_json(out / "certificate.json", certificate)
    return {"points": figure(5, "points")}


FILL = {
    "data": fill_data,
    "tune": fill_tune,
    "evaluate": fill_evaluate,
    "compress": fill_compress,
    "certify": fill_certify,
}
READS = {
    "data": [],
    "tune": ["data"],
    "evaluate": ["data", "tune"],
    "compress": ["data", "tune"],
    "certify": ["compress"],
}


def make_run(root: Path, kinds: list[str], **options: dict) -> dict[str, Artifact]:
    """Artifacts as the pipeline builds them, each from the digests of those before it."""
    made: dict[str, Artifact] = {}
    with only_writer(root):
        for kind in kinds:
            inputs = {role: made[role].digest for role in READS[kind] if role in made} | {"base": "b" * 64}
            made[kind], _ = build(
                root,
                kind,
                settings={"window": 512, "note": options.get(kind, {}).get("hostile", "plain")},
                inputs=inputs,
                code="c" * 64,
                fill=lambda out, kind=kind: FILL[kind](out, **options.get(kind, {})),
            )
    return made


class Page(HTMLParser):
    """The parsed page: every tag with its attributes, its visible text, and whether the tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> outside SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Artifact]:
    return make_run(tmp_path_factory.mktemp("run"), list(FILL))


@pytest.fixture(scope="module")
def source(run) -> str:
    return render(run, "python-helper")


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def assert_well_formed(page: Page) -> None:
    assert page.open == [], "every tag is closed"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id twice"
    assert len(page.all("h1")) == len(page.all("main")) == 1 and page.all("title")
    for _, attributes in page.tags:
        for name in ("href", "clip-path", "aria-labelledby"):
            named = re.search("#([^)]*)", attributes.get(name) or "")
            assert named is None or named.group(1) in ids, f"{name} names nothing"


def assert_loads_nothing(page: Page, source: str) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form", "video", "audio"}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "background"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    styles = source[source.index("<style>") : source.index("</style>")]
    assert "@import" not in styles and "url(" not in styles
    assert re.findall(r"https?:", re.sub(r">[^<]*<", "><", source)) == []
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_is_well_formed(page):
    assert_well_formed(page)


def test_the_page_loads_nothing(page, source):
    assert_loads_nothing(page, source)


def test_every_figure_of_every_card_is_on_the_page(run, page):
    for artifact in run.values():
        for name, about in artifact.figures.items():
            if "value" in about:
                assert spaced(show_value(about)) in page.text, name
                assert spaced(show_range(about)) in page.text, name
            assert name in page.text


def test_the_page_opens_with_the_verdict_and_the_change_with_its_interval(page):
    assert "Certified: all 4 points asked for were measured and met" in page.text
    assert "Held-out loss fell from 2.378 to 1.940 nat/token" in page.text
    assert "a change of −18.4 % (95 % interval −19.9 to −17.0 %)" in page.text


def test_a_missed_target_says_which_and_by_how_much(tmp_path):
    page = Page(render(make_run(tmp_path, ["certify"], certify={"passed": False}), "x"))
    assert "Target missed in 1 of 4 points decoding: 29.9 token/s too slow" in page.text
    assert page.text.count("missed") == 2


def test_every_row_read_is_accounted_for(page):
    assert "9,881 rows read 9,812 kept 12 exact duplicates 49 near duplicates 8 rejected" in page.text
    assert "answer is empty7" in page.text


def test_parity_and_the_machine_are_shown(page, tmp_path):
    assert "same ids20 promptsthree tokenizers" in page.text
    assert "No difference was found." in page.text
    assert "avx2, avx512f" in page.text and "imported torchno" in page.text
    other = Page(render(make_run(tmp_path, ["certify"], certify={"passed": False}), "x"))
    assert "What differsprompt 3 differs at token 17" in other.text


def test_all_charts_are_there(page):
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert len(labels) == 8
    assert {"Training loss over 240 steps", "learning rate by step", "token/s by step"} <= set(labels)
    for form in FORMS:
        assert form in page.text


def test_colours_follow_the_page(source):
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert "var(--accent)" in drawn and "var(--ink)" in drawn
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []


def test_what_each_stage_was_made_from_is_found_by_digest(tmp_path):
    """Tuning reads only data's metrics-free part: the digest of a selection of files still names its maker."""
    with only_writer(tmp_path):
        data, _ = build(tmp_path, "data", settings={}, inputs={"source": "a" * 64}, code="c", fill=fill_data)
        read = {"data": data.digest_of("first.txt"), "base": "b" * 64}
        tune, _ = build(tmp_path, "tune", settings={}, inputs=read, code="c", fill=fill_tune)
    page = Page(render({"data": data, "tune": tune}, "x"))
    assert f"tune reads data {read['data'][:8]}" in page.text
    assert f"data {data.digest[:8]}" in page.text
    assert "base bbbbbbbb" in page.text and "source aaaaaaaa" in page.text


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        ["data"],
        ["data", "tune"],
        ["data", "tune", "compress", "certify"],
        ["data", "tune", "evaluate"],
        ["certify"],
    ],
    ids=lambda kinds: "+".join(kinds) or "nothing",
)
def test_absent_stages_are_left_out(tmp_path, kinds):
    source = render(make_run(tmp_path, kinds), "partial")
    page = Page(source)
    assert_well_formed(page)
    assert_loads_nothing(page, source)
    titles = {"data": "数据", "tune": "微调", "evaluate": "评测", "compress": "压缩", "certify": "证书"}
    for kind, title in titles.items():
        assert (title in page.text) == (kind in kinds), kind
    assert ("Measured, not certified" in page.text) == ("certify" not in kinds)


def test_artifacts_without_optional_files_are_no_error(tmp_path):
    with only_writer(tmp_path):
        made = {
            kind: build(tmp_path, kind, settings={}, inputs={}, code="c", fill=lambda out: {"n": figure(1, "x")})[0]
            for kind in ("data", "tune", "evaluate")
        }
    assert_well_formed(Page(render(made, "bare")))


def test_hostile_text_stays_text(tmp_path):
    hostile = {kind: {"hostile": HOSTILE} for kind in ("data", "evaluate", "compress", "certify")}
    source = render(make_run(tmp_path, list(FILL), **hostile), HOSTILE)
    page = Page(source)
    assert_well_formed(page)
    assert_loads_nothing(page, source)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.text.count(spaced(shown)) > 10
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00\x1b\u202e]", source)


def test_half_a_character_can_be_written(tmp_path):
    def fill(out: Path) -> dict:
        (out / "answers.jsonl").write_text('{"prompt": "left \\ud800", "reference": "", "before": "", "after": ""}')
        return {}

    with only_writer(tmp_path):
        made, _ = build(tmp_path, "evaluate", settings={}, inputs={}, code="c", fill=fill)
    figures = write_report(tmp_path, {"evaluate": made}, "x")
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "left \ufffd" in text
    assert figures["page"] == {"value": len(text.encode()), "unit": "byte"}


def test_the_same_artifacts_give_the_same_page(run, source):
    assert render(run, "python-helper") == source


def test_a_damaged_file_is_named(tmp_path):
    made = make_run(tmp_path, ["compress"])
    (made["compress"].path / "candidates.json").write_text("[{")
    with pytest.raises(DanluError, match=r"candidates\.json"):
        render(made, "x")
    made = make_run(tmp_path, ["tune"])
    (made["tune"].path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"st')
    with pytest.raises(DanluError, match=r"metrics\.jsonl:2"):
        render(made, "x")


def test_a_change_that_may_be_none_is_not_called_one(tmp_path):
    def fill(out: Path) -> dict:
        return {
            "heldout_loss_before": figure(2.0, "nat/token", 1.9, 2.1),
            "heldout_loss_after": figure(2.01, "nat/token", 1.91, 2.11),
            "heldout_loss_change": figure(0.01, "nat/token", -0.02, 0.04),
        }

    with only_writer(tmp_path):
        made, _ = build(tmp_path, "evaluate", settings={}, inputs={}, code="c", fill=fill)
    text = Page(render({"evaluate": made}, "x")).text
    assert "rose from 2.00 to 2.01" in text
    assert "The interval of the change includes zero" in text


def test_a_long_text_is_cut_and_says_so(tmp_path):
    def fill(out: Path) -> dict:
        write_lines(out / "answers.jsonl", [{"prompt": "长" * 5000, "reference": "", "before": "", "after": ""}])
        return {}

    with only_writer(tmp_path):
        made, _ = build(tmp_path, "evaluate", settings={}, inputs={}, code="c", fill=fill)
    assert "(3,000 more characters)" in Page(render({"evaluate": made}, "x")).text


def test_trained_text_is_told_from_context():
    assert first_example("user: a\n⟦b⟧ c⟦d⟧") == [("user: a\n", False), ("b", True), (" c", False), ("d", True)]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (91_734_528, "byte", "91.7 MB"),
        (1_310_000_000, "byte", "1.31 GB"),
        (812, "byte", "812 bytes"),
        (0.0157, "share", "1.6 %"),
        (-0.184, "share", "−18.4 %"),
        (196.8123, "token/s", "196.8 token/s"),
        (12345678, "token", "12,345,678 token"),
        (2.3781, "nat/token", "2.378 nat/token"),
        (0.00002, "", "2.00e−05"),
        (0, "", "0"),
        (151.2, "s", "2 min 31 s"),
        (float("nan"), "s", "not measured"),
        ("yes", "", "yes"),
    ],
)
def test_numbers_are_shown_as_people_write_them(value, unit, shown):
    assert spaced(show_amount(value, unit)) == shown


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        (figure(2.37812, "nat/token", 2.291, 2.468), "2.378 nat/token, 2.291 to 2.468 nat/token"),
        (figure(196.812, "token/s", 190.1, 203.9), "196.8 token/s, 190.1 to 203.9 token/s"),
        (figure(1234.5, "token/s", 1100, 1400), "1,234 token/s, 1,100 to 1,400 token/s"),
        (figure(0.0157, "share", 0.0121, 0.0192), "1.57 %, 1.21 to 1.92 %"),
        (figure(999e6, "byte", 990e6, 1010e6), "999.0 MB, 990.0 MB to 1.01 GB"),
    ],
)
def test_digits_follow_the_interval(about, shown):
    assert spaced(f"{show_value(about)}, {show_range(about)}") == shown


def test_changes_carry_their_sign():
    assert spaced(show_change(figure(0.071, "share"))) == "+7.1 points"
    assert spaced(show_change(figure(-0.4379, "nat/token", -0.481, -0.399))) == "−0.438 nat/token"
    assert spaced(show_change(figure(-0.3, "share"), points=False)) == "−30.0 %"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.042, "0.04 s"), (3.21, "3.2 s"), (59.4, "59 s"), (3725, "1 h 2 min")]
)
def test_durations(seconds, shown):
    assert show_seconds(seconds) == shown
