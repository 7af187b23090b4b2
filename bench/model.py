"""The model core beside transformers: forward, forward + backward and cached greedy decoding, same weights, one run.

    python bench/model.py [--cases gpt2 vit ...] [--modes forward train decode] [--rounds 5] [--no-memory] [--save]

Six shapes: GPT-2 small, SmolLM2-135M, BERT base, T5 small, ViT-S/16, and a mixture of 8 experts of which 2 are taken.
Both sides compute in bf16, uncompiled, on as many threads as torch takes. transformers computes as it comes (scaled
dot-product attention); where it offers several ways to compute experts, each is a side of its own and the fastest is
the one to be compared with. Sides take turns within a round, in an order that rotates; the first round warms up; the
ratio is the median over rounds. Peak memory is that of a fresh process for each side, model included.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, emit
from torch import Tensor

BARS = {"slowest": 0.95, "geometric mean": 1.3, "mixture forward": 2.0}
MODES = ("forward", "train", "decode")
DECODED = 64  # tokens
SMOL = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOL |= {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
VIT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
MIXTURE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
MIXTURE |= {"intermediate_size": 1024, "vocab_size": 16384, "num_local_experts": 8, "num_experts_per_tok": 2}
# Case -> (class in transformers, its configuration, what differs from it, rows, tokens of a row).
CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 4, 512),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", SMOL, 4, 512),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        4,
        512,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"dropout_rate": 0.0, "decoder_start_token_id": 0}, 4, 512),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, 8, 0),
    "mixture": ("MixtralForCausalLM", "MixtralConfig", MIXTURE, 4, 512),
}
DECODERS = ("gpt2", "smollm2", "t5", "mixture")
WRITTEN = 128  # tokens that T5 writes where others read
Work = Callable[[], Any]


def their_model(case: str, experts: str = "") -> Any:
    """transformers' model, its weights random but the same at every call, in bf16."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, settings, changes, _, _ = CASES[case]
    config = getattr(transformers, settings)(**changes)
    if experts:
        config._experts_implementation = experts
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).to(torch.bfloat16)


def our_model(case: str, path: Path | None) -> Any:
    """The same weights in ours, from a directory; without one, random ones of the same shape."""
    import transformers

    from danlu.model.checkpoint import StoredModel
    from danlu.model.families.known import family_of
    from danlu.model.transformer import make_model

    if path is not None:
        return StoredModel.open(path).load(torch.bfloat16)
    kind, settings, changes, _, _ = CASES[case]
    hf = {**getattr(transformers, settings)(**changes).to_dict(), "architectures": [kind]}
    torch.set_default_dtype(torch.bfloat16)  # as transformers' own models start, without an fp32 copy beside
    return make_model(family_of(hf).config(hf))


def batch_of(case: str) -> dict[str, Tensor]:
    """One batch by transformers' names, labels included."""
    _, _, _, rows, length = CASES[case]
    random = torch.Generator().manual_seed(1)
    if case == "vit":
        pixels = torch.randn(rows, 3, 224, 224, generator=random).bfloat16()
        return {"pixel_values": pixels, "labels": torch.randint(0, 2, (rows,), generator=random)}
    ids = torch.randint(3, 16000, (rows, length), generator=random)
    if case == "t5":
        written = torch.randint(3, 16000, (rows, WRITTEN), generator=random)
        return {"input_ids": ids, "decoder_input_ids": written, "labels": written.roll(-1, 1)}
    if case == "bert":
        hidden = torch.rand(rows, length, generator=random) < 0.15  # what BERT is trained on
        return {"input_ids": ids, "labels": torch.where(hidden, ids, -100)}
    return {"input_ids": ids, "labels": ids}


def their_work(case: str, mode: str, model: Any) -> Work:
    """What transformers does in one turn."""
    batch = batch_of(case)
    labels = batch.pop("labels")
    if mode == "forward":
        model.eval()
        return torch.inference_mode()(lambda: model(**batch).logits)
    if mode == "train":
        model.train()

        def step() -> None:
            model(**batch, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        return step
    model.eval()
    ids = batch["input_ids"][:1, :32]
    how = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
    if case == "t5":
        return lambda: model.generate(ids, **how)[0, 1:].tolist()
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, 32:].tolist()


def our_work(case: str, mode: str, model: Any) -> Work:
    """What Danlu does in one turn."""
    from danlu.model.generate import generate

    batch = batch_of(case)
    labels = batch.pop("labels")
    read = batch.get("input_ids", batch.get("pixel_values"))

    def hidden() -> Tensor:
        return model(read, batch["decoder_input_ids"]) if case == "t5" else model(read)

    if mode == "forward":
        model.eval()
        return torch.inference_mode()(lambda: model.logits(hidden()))
    if mode == "train":
        model.train()

        def step() -> None:
            loss(case, model, hidden(), labels).backward()
            model.zero_grad(set_to_none=True)

        return step
    model.eval()
    assert read is not None
    return lambda: list(generate(model, read[0, :32].tolist(), max_new_tokens=DECODED))


def loss(case: str, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """The mean loss, as transformers' models compute it from labels."""
    from danlu.model.loss import linear_cross_entropy

    if case == "vit":
        return F.cross_entropy(model.logits(hidden).float(), labels)
    if case in ("gpt2", "smollm2", "mixture"):
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    features = model.head.features(hidden).flatten(0, 1)
    bias = model.head.bias
    total = linear_cross_entropy(features, model.head_weight, labels.flatten(), bias)
    return total / (labels != -100).sum()


def compare(case: str, mode: str, rounds: int, path: Path) -> dict[str, Any]:
    """Seconds of both sides, the median over rounds, and how many times as fast ours is."""
    sides: dict[str, Work] = {"danlu": our_work(case, mode, our_model(case, path))}
    for experts in ("eager", "grouped_mm") if case == "mixture" else ("",):
        name = f"transformers {experts}".strip()
        sides[name] = their_work(case, mode, their_model(case, experts))
    check(case, mode, sides)
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            sides[name]()
            if number:
                taken[name].append(time.perf_counter() - started)
    best = min(names[1:], key=lambda name: median(taken[name]))
    ratios = [theirs / ours for ours, theirs in zip(taken["danlu"], taken[best], strict=True)]
    return {
        "danlu_seconds": round(median(taken["danlu"]), 4),
        "peer_seconds": round(median(taken[best]), 4),
        "peer": best,
        "ratio": round(median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def check(case: str, mode: str, sides: dict[str, Work]) -> None:
    """The sides do the same: logits agree as far as bf16 goes."""
    if mode != "forward":
        return
    ours, *others = (work().float() for work in sides.values())
    for theirs in others:
        agreement = F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert agreement > 0.99, f"{case}: the sides differ (cosine {agreement:.4f})"


def peak(case: str, mode: str, side: str) -> int:
    """Bytes of resident memory at their highest, of a fresh process that does the work twice."""
    command = [sys.executable, __file__, "--alone", side, "--cases", case, "--modes", mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def alone(case: str, mode: str, side: str) -> None:
    """The work of one side, then its peak memory."""
    work = our_work(case, mode, our_model(case, None)) if side == "danlu" else their_work(case, mode, lean(case))
    for _ in range(2):
        work()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024)


def lean(case: str, experts: str = "") -> Any:
    """transformers' model, made in bf16 at once."""
    torch.set_default_dtype(torch.bfloat16)
    return their_model(case, experts)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--alone", choices=("danlu", "transformers"), help="do one side's work and print its memory")
    asked = parser.parse_args()
    if asked.alone:
        alone(asked.cases[0], asked.modes[0], asked.alone)
        return
    figures: dict[str, Any] = {}
    print(
        f"{'case':10}{'mode':10}{'danlu s':>10}{'peer s':>10}{'ratio':>8}{'range':>16}{'danlu GB':>10}{'peer GB':>10}"
    )
    for case in asked.cases:
        with tempfile.TemporaryDirectory() as folder:
            their_model(case).save_pretrained(folder)
            for mode in asked.modes:
                if mode == "decode" and case not in DECODERS:
                    continue
                found = compare(case, mode, asked.rounds, Path(folder))
                if not asked.no_memory:
                    found["danlu_bytes"] = peak(case, mode, "danlu")
                    found["peer_bytes"] = peak(case, mode, "transformers")
                figures[f"{case} {mode}"] = found
                show(case, mode, found)
    judge(figures, asked.save)


def show(case: str, mode: str, found: dict[str, Any]) -> None:
    memory = [f"{found[key] / 1e9:10.2f}" for key in ("danlu_bytes", "peer_bytes") if key in found]
    span = f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}"
    times = f"{found['danlu_seconds']:10.3f}{found['peer_seconds']:10.3f}{found['ratio']:8.2f}{span:>16}"
    print(f"{case:10}{mode:10}{times}{''.join(memory)}", flush=True)


def judge(figures: dict[str, Any], save: bool) -> None:
    """Say which bars are met, and end with the JSON line."""
    ratios = [found["ratio"] for found in figures.values()]
    total = {
        "slowest": min(ratios),
        "geometric mean": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3),
    }
    if "mixture forward" in figures:
        total["mixture forward"] = figures["mixture forward"]["ratio"]
    for name, value in total.items():
        print(f"{name}: {value:.2f} (bar {BARS[name]}: {'met' if value >= BARS[name] else 'MISSED'})")
    heavier = [name for name, found in figures.items() if found.get("danlu_bytes", 0) > found.get("peer_bytes", 0)]
    print(f"memory above theirs: {', '.join(heavier) or 'nowhere'}")
    print(json.dumps(BARS))
    emit("model", {"cases": figures, **total, "bars": BARS, "memory_above": heavier}, save)


if __name__ == "__main__":
    main()
