"""How wrong the planner is, against measured runs of public projects: the table of bars, one JSON object at the end.

Each row is predicted by what rows of other groups taught (a group is one model, cluster and batch), in five folds.

    python bench/planner.py /path/to/tables
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from danlu.console import result, table
from danlu.plan.cluster import Cluster
from danlu.plan.counts import idle_stages, weights
from danlu.plan.evaluate import NOTHING, Score, cross_validate, score, scores
from danlu.plan.learned import Predicted, learn_memory, predict
from danlu.plan.search import Asked, search
from danlu.plan.shapes import shape
from danlu.plan.tables import Table, read_tables

SINGLE, MULTI = "vtrain_single_node_a100.csv", "vtrain_multi_node_a100.csv"
NANOTRON, FAILED = "nanotron_ultrascale_h100.csv", "nanotron_ultrascale_h100_failed.csv"
OTHERS = (
    "mosaicml_llm_foundry.csv", "simumax_b200_real_vs_pred.csv", "torchtitan.csv", "megatron_ci_golden_memory_time.csv",
    "nvidia_megatron_bridge_25.09_to_26.08.csv",
)  # fmt: skip
REFUSED = 77.0  # of an H100's 80, in the table's unit: what is left beside the driver, CUDA and NCCL


def main() -> None:
    """Print the table; the last line is one JSON object."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DANLU_PLANNER", "../shared/planner"))
    rows: list[dict[str, Any]] = []
    for name in (SINGLE, MULTI):
        told = read_tables([folder / name])
        rows += lines(name, "datasheet only", scores(told, predict(told, everything(told), *NOTHING)))
        if name == SINGLE:  # the other table is all of one group
            rows += lines(name, "5 folds", scores(told, cross_validate(told)))
    rows += plans_apart(read_tables([folder / MULTI]))
    rows += nanotron(folder)
    for name in OTHERS:
        told = read_tables([folder / name])
        rows += lines(name, "datasheet only", scores(told, predict(told, everything(told), *NOTHING)))
        rows += lines(name, "5 folds", scores(told, cross_validate(told)))
        if name.startswith("megatron_ci"):
            rows += of_a_billion(name, told)
    rows.append(timed_search())
    shown = [(row["what"], *(f"{row[key]:.2f}" if row.get(key) is not None else "" for key in KEYS)) for row in rows]
    table("the planner's errors, %", ("what", *KEYS), shown)
    result(json.dumps({"bench": "planner", "rows": rows}))


KEYS = ("rows", "mean", "median", "p90", "worst", "inside", "regret", "regret3")


def everything(told: Table) -> np.ndarray:
    """All rows of a table."""
    return np.arange(len(told.at))


def lines(name: str, how: str, found: list[Score]) -> list[dict[str, Any]]:
    """Scores as rows of the report."""
    return [each.plain() | {"what": f"{name.removesuffix('.csv')}, {each.what}, {how}"} for each in found]


def plans_apart(told: Table) -> list[dict[str, Any]]:
    """A table of one group: its plans are held apart instead, so that none is predicted from its own degrees."""
    plans = [tuple(f"{value:g}" for value in row) for row in zip(told.jobs.tensor, told.jobs.pipeline, strict=True)]
    apart = Table(**(vars(told) | {"groups": plans}))
    guess = cross_validate(apart)
    made = score("time", guess.seconds, told.seconds, guess.seconds_spread, told.groups, choose=True)
    return lines(MULTI, "5 folds by tensor and pipeline degree", [made])


def nanotron(folder: Path) -> list[dict[str, Any]]:
    """Memory of runs that ended well, and which runs are refused."""
    good, failed = read_tables([folder / NANOTRON]), read_tables([folder / FAILED])
    guess: Predicted = cross_validate(good, time=False)
    memory = score("memory", guess.gib, good.gib, guess.gib_spread, good.groups, choose=False)
    taught = learn_memory(good, everything(good))
    lost = predict(failed, everything(failed), NOTHING[0], taught)
    made = [
        {"what": f"nanotron, of {which} runs refused", "mean": refused(told, held), "rows": len(held)}
        for which, told, held in (("failed", failed, lost.fullest), ("good", good, guess.fullest))
    ]
    return [*lines(NANOTRON, "5 folds", [memory]), *made]


def of_a_billion(name: str, told: Table) -> list[dict[str, Any]]:
    """Memory of models with 10^9 weights and more: of smaller ones buffers take most of it.

    Whole models are held apart: one on another accelerator takes as much memory, and would give it away.
    """
    groups = [group[:1] for group in told.groups]
    guess = cross_validate(Table(**(vars(told) | {"groups": groups})), time=False)
    large = np.flatnonzero((weights(told.jobs).total >= 1e9) & (told.gib > 0))
    some = [groups[row] for row in large]
    made = score(
        "memory of 1B and more", guess.gib[large], told.gib[large], guess.gib_spread[large], some, choose=False
    )
    return lines(name, "5 folds of models", [made])


def refused(told: Table, held: np.ndarray) -> float:
    """Percent of rows that do not fit, or leave stages without work; a single one may be a matter of rounding."""
    return float(np.mean((held > REFUSED) | (idle_stages(told.jobs) > 1)) * 100)


def timed_search() -> dict[str, Any]:
    """Seconds to search 4,096 accelerators for a mixture of a trillion weights."""
    asked = Asked(shape("trillion"), Cluster.parse("4096xh100"), 4096, 4096)
    began = time.perf_counter()
    found = search(asked)
    return {"what": f"search of {found.tried} plans, seconds", "mean": time.perf_counter() - began, "rows": found.tried}


if __name__ == "__main__":
    main()
