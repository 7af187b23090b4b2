"""How wrong the planner is, against measured runs of public projects: the table of bars, one JSON object at the end.

Each row is predicted by what rows of other groups taught (a group is one model, cluster and batch), in five folds.

    python bench/planner.py /path/to/tables
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.console import result, table
from danlu.plan.cluster import Cluster
from danlu.plan.counts import idle_stages, weights
from danlu.plan.evaluate import NOTHING, Score, cross_validate, regrets, score_rows, scores
from danlu.plan.learned import Predicted, learn_memory, learn_time, predict
from danlu.plan.memory import GIB, MEMORY, stage_memory, stages_told
from danlu.plan.search import USABLE, Asked, search
from danlu.plan.shapes import shape
from danlu.plan.tables import Table, read_tables

SINGLE, MULTI = "vtrain_single_node_a100.csv", "vtrain_multi_node_a100.csv"
NANOTRON, FAILED = "nanotron_ultrascale_h100.csv", "nanotron_ultrascale_h100_failed.csv"
CI, BRIDGE = "megatron_ci_golden_memory_time.csv", "nvidia_megatron_bridge_25.09_to_26.08.csv"
OTHERS = (
    "mosaicml_llm_foundry.csv", "simumax_b200_real_vs_pred.csv", "torchtitan.csv", CI, BRIDGE, "bigscience_v100.csv",
    "vocab_parallel_pp8.csv", "nvidia_nemo_long_sequence_cp.csv", "misc_transcribed.csv", "maxtext_tpu.csv",
    "nvidia_nemo_launcher_23.07_a100.csv",
)  # fmt: skip
PAPERS = Path(__file__).with_name("megatron_a100.csv")  # Megatron's runs on A100s as two of its papers print them
REFUSED = 77.0  # of an H100's 80, in nanotron's unit: what is left beside the driver, CUDA and NCCL
KEYS = ("rows", "mean", "median", "p90", "worst", "inside", "regret", "regret3", "noise")
Line = dict[str, Any]


def main() -> None:
    """Print the table; the last line is one JSON object."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DANLU_PLANNER", "../shared/planner"))
    rows = [*vtrain(folder), *papers(folder), *nanotron(folder)]
    read = {name: read_tables([folder / name]) for name in OTHERS}
    for name, told in read.items():
        if not told.at:
            continue
        rows += lines(name, "datasheet only", scores(told, predict(told, everything(told), *NOTHING)))
        rows += lines(name, "5 folds", scores(told, cross_validate(told)))
    rows += of_a_billion(CI, read[CI])
    rows += parts_of_bridge(read[BRIDGE])
    rows += out_of_memory(read)
    rows.append(timed_search())
    shown = [(row["what"], *(f"{row[key]:.2f}" if row.get(key) is not None else "" for key in KEYS)) for row in rows]
    table("the planner's errors, %", ("what", *KEYS), shown)
    left_out(read)
    result(json.dumps({"bench": "planner", "rows": rows}))


def everything(told: Table) -> NDArray[np.intp]:
    """All rows of a table."""
    return np.arange(len(told.at))


def lines(name: str, how: str, found: list[Score]) -> list[Line]:
    """Scores as rows of the report."""
    return [each.plain() | {"what": f"{name.removesuffix('.csv')}, {each.what}, {how}"} for each in found]


def vtrain(folder: Path) -> list[Line]:
    """Megatron-DeepSpeed on one node and on many, what one says of the other, and choosing plans over both."""
    single, multi = read_tables([folder / SINGLE]), read_tables([folder / MULTI])
    rows = lines(SINGLE, "datasheet only", scores(single, predict(single, everything(single), *NOTHING)))
    folds = cross_validate(single)
    rows += lines(SINGLE, "5 folds", scores(single, folds))
    rows += lines(MULTI, "datasheet only", scores(multi, predict(multi, everything(multi), *NOTHING)))
    # The other table is all of one group: its plans are held apart instead, none predicted from its own degrees.
    plans = [tuple(f"{value:g}" for value in row) for row in zip(multi.jobs.tensor, multi.jobs.pipeline, strict=True)]
    apart = cross_validate(replace(multi, groups=plans))
    rows += lines(MULTI, "5 folds by tensor and pipeline degree", scores(multi, apart))
    taught = learn_time(single, everything(single)), NOTHING[1]
    rows += lines(MULTI, "taught by one node", scores(multi, predict(multi, everything(multi), *taught)))
    both = [
        *regrets(folds.seconds, single.seconds, single.groups), *regrets(apart.seconds, multi.seconds, multi.groups),
    ]  # fmt: skip
    first, third = (np.array(both).mean(axis=0) * 100).tolist()
    rows.append({"what": "vtrain, regret over all groups", "rows": len(both), "regret": first, "regret3": third})
    return rows


def papers(folder: Path) -> list[Line]:
    """Other runs of Megatron on A100s, of two papers, learned from vTrain's tables alone."""
    told = read_tables([PAPERS])
    source = [told.rows[place]["source"].split()[0] for place in told.at]
    made = {"datasheet only": predict(told, everything(told), *NOTHING)}
    for how, names in (("one node", [SINGLE]), ("many nodes", [MULTI]), ("both", [SINGLE, MULTI])):
        taught = read_tables([folder / name for name in names])
        clock = learn_time(taught, everything(taught))
        made[f"taught by vTrain's {how}"] = predict(told, everything(told), clock, NOTHING[1])
    rows = []
    for how, guess in made.items():
        for paper in dict.fromkeys(source):
            at = np.flatnonzero(np.array(source) == paper)
            few = score_rows(paper, told, at, guess.seconds, told.seconds, guess.seconds_spread, choose=False)
            rows += lines(PAPERS.name, how, [few])
    return rows


def nanotron(folder: Path) -> list[Line]:
    """Memory of runs that ended well, which runs are refused, and time where its runs agree with one another."""
    good, failed = read_tables([folder / NANOTRON]), read_tables([folder / FAILED])
    guess: Predicted = cross_validate(good, time=False)
    taught = learn_memory(good, everything(good))
    lost = predict(failed, everything(failed), NOTHING[0], taught)
    made: list[Line] = [
        {"what": f"nanotron, of {which} runs refused", "mean": refused(told, held), "rows": len(held)}
        for which, told, held in (("failed", failed, lost.fullest), ("good", good, guess.fullest))
    ]
    memory = score_rows("memory", good, everything(good), guess.gib, good.gib, guess.gib_spread, choose=False)
    sound = good.take(np.flatnonzero((good.jobs.pipeline == 1) & (good.jobs.tensor <= 8)))
    clock = scores(sound, cross_validate(sound, memory=False))[:1]
    return [*lines(NANOTRON, "5 folds", [memory]), *made, *lines(NANOTRON, "one stage, tensor up to 8, 5 folds", clock)]


def refused(told: Table, held: np.ndarray) -> float:
    """Percent of rows that do not fit, or leave stages without work; a single one may be a matter of rounding."""
    return float(np.mean((held > REFUSED) | (idle_stages(told.jobs) > 1)) * 100)


def of_a_billion(name: str, told: Table) -> list[Line]:
    """Memory of models with 10^9 weights and more: of smaller ones buffers take most of it.

    Whole models are held apart: one on another accelerator takes as much memory, and would give it away. States
    (weights, gradients, optimizer) are counted, not learned, and compared with what the allocator held between steps.
    """
    models = replace(told, groups=[group[:1] for group in told.groups])
    guess = cross_validate(models, time=False)
    large = np.flatnonzero((weights(told.jobs).total >= 1e9) & (told.gib > 0))
    total = score_rows("memory of 1B and more", models, large, guess.gib, told.gib, guess.gib_spread, choose=False)
    held = {key: each.start for key, each in MEMORY.items()}
    ends = [stage_memory(told.jobs, held, stage) for stage in stages_told(told.jobs)]
    counted = np.max([each["weights"] + each["gradients"] + each["optimizer"] for each in ends], axis=0) / GIB
    steady = np.array([held_between_steps(told.rows[place]["notes"]) for place in told.at])
    certain, dense = np.full(len(steady), 0.02), large[told.jobs.experts[large] == 0]
    made = lines(name, "5 folds of models", [total])
    for kind, some in (("dense models", dense), ("all models", large)):
        states = score_rows(f"states of 1B and more, {kind}", models, some, counted, steady, certain, choose=False)
        made += lines(name, "counted, inside 2 %", [states])
    return made


def held_between_steps(notes: str) -> float:
    """GiB."""
    told = re.search(r"steady_bytes=(\d+)", notes)
    return float(told.group(1)) / GIB if told else float("nan")


def parts_of_bridge(told: Table) -> list[Line]:
    """Megatron-Bridge's dense models, plain mixtures, and models of other layers, each held apart in the same folds."""
    guess = cross_validate(told, memory=False)
    jobs, every = told.jobs, np.ones(len(told.at), dtype=bool)
    plain = every & (jobs.key_rank == 0) & (jobs.state_layers == 0)
    kinds: dict[str, NDArray[np.bool_]] = {
        "dense": plain & (jobs.experts == 0), "plain mixtures": plain & (jobs.experts > 0), "other layers": ~plain,
    }  # fmt: skip
    made = []
    for kind, some in kinds.items():
        at = np.flatnonzero(some & (told.seconds > 0))
        if len(at):
            made.append(
                score_rows(f"{kind}: time", told, at, guess.seconds, told.seconds, guess.seconds_spread, choose=True)
            )
    return lines(BRIDGE, "5 folds", made)


def out_of_memory(read: dict[str, Table]) -> list[Line]:
    """Runs that tables say ran out of memory, and how many of them are refused from the data sheet alone."""
    made = []
    for name, told in read.items():
        at = np.flatnonzero(told.failed)
        if len(at):
            held = predict(told.take(at), np.arange(len(at)), *NOTHING).fullest
            room = np.array([Cluster.parse(told.stacks[row][1]).accelerator.memory / GIB * USABLE for row in at])
            what = f"{name.removesuffix('.csv')}, of runs out of memory refused, datasheet only"
            made.append({"what": what, "mean": float(np.mean(held > room) * 100), "rows": len(at)})
    return made


def left_out(read: dict[str, Table]) -> None:
    """Rows of each table that cannot be predicted, and why."""
    shown = []
    for name, told in read.items():
        whys: dict[str, int] = {}
        for why in told.notes.values():
            whys[why] = whys.get(why, 0) + 1
        told_of = ", ".join(f"{why} ({count})" for why, count in sorted(whys.items(), key=lambda each: -each[1])[:4])
        shown.append((name, f"{len(told.at)} of {len(told.rows)}", told_of))
    table("rows that can be predicted", ("table", "rows", "the others, mostly"), shown)


def timed_search() -> Line:
    """Seconds to search 4,096 accelerators for a mixture of a trillion weights."""
    asked = Asked(shape("trillion"), Cluster.parse("4096xh100"), 4096, 4096)
    began = time.perf_counter()
    found = search(asked)
    return {"what": f"search of {found.tried} plans, seconds", "mean": time.perf_counter() - began, "rows": found.tried}


if __name__ == "__main__":
    main()
