"""What rests in the host's memory or on its disks: what leaves the device, what that takes, and what is planned."""

from __future__ import annotations

import dataclasses
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from danlu.errors import DanluError
from danlu.plan.adapters import Lora
from danlu.plan.cluster import accelerators
from danlu.plan.describe import Written, ask, find
from danlu.plan.jobs import Jobs
from danlu.plan.learned import fullest, seconds
from danlu.plan.memory import away_memory, device_memory
from danlu.plan.offload import DISK, HOST, STATES, Places, places
from danlu.plan.plan import Plan, Work
from danlu.plan.search import NoPlan, candidates, search
from danlu.plan.search import given as given_plan
from danlu.plan.shapes import shape
from danlu.plan.states import state_bytes
from danlu.plan.time import step_time
from danlu.plan.told import offload_columns
from danlu.plan.transfer import LINK, UPDATE
from tests.plan.test_planner import BELIEVED, HELD, gib, job, took

HOSTED = {"link_rate": 64e9, "host_rate": 76.8e9, "disk_rate": 3e9}
PUT_AWAY = [each for each in places("nvme", has_host=True, has_disk=True) if each.words]
AWAY = st.sampled_from(PUT_AWAY)


def shared(**columns: float) -> Jobs:
    """Weights shared out over 8 H100 that have a host each."""
    return job(**({"zero": 3, "sharers": 8, "data": 8} | HOSTED | columns))


@settings(deadline=None, max_examples=60)
@given(AWAY, st.sampled_from((1, 4)), st.sampled_from((0, 1, 2)), st.sampled_from((0, 16)))
def test_what_is_put_away_leaves_the_device_and_nothing_is_lost(
    resting: Places, micro: int, recompute: int, rank: int
) -> None:
    plain = shared(micro_rows=micro, recompute=recompute, **(Lora(rank).columns if rank else {}))
    put = plain.but(**resting.columns)
    before, after = device_memory(plain, HELD), device_memory(put, HELD)
    gone = sum(float(part[0]) for part in away_memory(put, HELD).values())
    assert sum(float(part[0]) for part in away_memory(plain, HELD).values()) == 0
    left = {
        name: float(before[name][0] - after[name][0]) for name in before if name not in ("total", "step", "buffers")
    }
    assert all(bytes_ >= 0 for bytes_ in left.values())
    assert sum(left.values()) == pytest.approx(gone)
    whole = float(after["total"][0]) + gone - float(after["buffers"][0]) - float(after["step"][0])
    assert whole == pytest.approx(float(before["total"][0]) - float(before["step"][0]))
    assert float(before["buffers"][0]) == 0


@settings(deadline=None, max_examples=30)
@given(st.sampled_from((0, 1, 2)), st.sampled_from((1, 2)))
def test_the_further_away_the_less_is_in_the_host(recompute: int, micro: int) -> None:
    plain = shared(recompute=recompute, micro_rows=micro)
    hosts, disks = [], []
    for _, *at in STATES:
        held = away_memory(
            plain.but(**dict(zip(("weights_at", "gradients_at", "optimizer_at"), at, strict=True))), HELD
        )
        hosts.append(float(held[HOST][0]))
        disks.append(float(held[DISK][0]))
    assert hosts[0] == 0
    assert hosts[1] > hosts[2] > hosts[3] == 0
    assert disks[0] == disks[1] == 0
    assert disks[1] < disks[2] < disks[3]


@settings(deadline=None, max_examples=40)
@given(AWAY, st.sampled_from(("link_rate", "host_rate", "disk_rate", "peak", "memory_rate")), st.sampled_from((1, 8)))
def test_time_never_rises_with_faster_links_hosts_and_disks(resting: Places, what: str, batches: int) -> None:
    plain = shared(micro_batches=batches, **resting.columns)
    assert took(plain.but(**{what: getattr(plain, what) * 2})) <= took(plain) * (1 + 1e-12)
    here = plain.but(**Places().columns)
    assert took(plain) >= took(here) - float(step_time(here, BELIEVED)["optimizer"][0])


def test_an_update_by_the_host_by_hand() -> None:
    """8.03e9 weights over 8 processes, whose host reads and writes 34 bytes for each of them at 0.3 of 76.8 GB/s."""
    put = shared(micro_batches=1, gradients_at=1, optimizer_at=1)
    told = step_time(put, BELIEVED)
    assert float(told["optimizer"][0]) == 0
    by_hand = 8_030_261_248 / 8 * 34 / (76.8e9 * UPDATE)
    assert float(told["offload"][0]) == pytest.approx(by_hand)
    slow = shared(micro_batches=1, gradients_at=1, optimizer_at=1, link_rate=1e9)
    sent = 8_030_261_248 / 8 * (4 + 2) / (1e9 * LINK)
    hidden = float(told["total"][0]) - float(told["offload"][0])
    assert sent - hidden < float(step_time(slow, BELIEVED)["offload"][0]) < sent


def test_rows_with_and_without_offload_do_not_see_each_other() -> None:
    at = np.array([0.0, 1.0, 2.0, 0.0])
    together = shared().but(**{name: at for name in Places().columns})
    for formula, coefficients in ((seconds, BELIEVED), (fullest, HELD)):
        alone = [formula(together.take(np.array([row])), coefficients)[0] for row in range(4)]
        np.testing.assert_allclose(formula(together, coefficients), alone, rtol=1e-12)


# --- What is planned --------------------------------------------------------------------------------------------------


def test_what_fits_nowhere_else_is_put_away_and_fits_there() -> None:
    small = ask("llama-2-13b", "2xa100-80gb", 2048, "256k", "bf16")
    with pytest.raises(NoPlan):
        search(small)
    asked = dataclasses.replace(small, offload="auto")
    host = asked.cluster.accelerator.host
    assert host is not None
    found = search(asked)
    for choice in (*found.best, *found.pareto):
        assert choice.offload
        assert choice.gib < 80e9 / 2**30
        assert choice.away.get("host", 0) < host.memory / 2**30
        assert choice.away.get("disks", 0) < host.disk / 2**30
    alone = dataclasses.replace(small, offload="host")
    assert all("optimizer" not in choice.offload.get("offload.state", "") for choice in search(alone).best)


def test_what_fits_anyway_stays_where_it_is() -> None:
    plain = ask("llama-3.1-8b", "8xh100", 4096, "1M", "bf16")
    auto, allowed = (search(dataclasses.replace(plain, offload=how)).best[0] for how in ("auto", "host"))
    assert auto == search(plain).best[0]
    assert allowed.seconds <= auto.seconds * 1.02
    assert len(candidates(dataclasses.replace(plain, offload="host"))) > len(candidates(plain))


def test_a_found_plan_is_told_alike_when_it_is_given() -> None:
    asked = ask("llama-2-13b", "2xa100-40gb", 2048, "256k", "bf16", offload="auto")
    for choice in search(asked).best:
        resting = next(each for each in places("nvme", True, True) if each.words == choice.offload)
        again = given_plan(asked, Plan.read(Plan.parse(choice.plan)), choice.recompute, resting=resting)
        assert (again.seconds, again.gib) == pytest.approx((choice.seconds, choice.gib))
        assert again.away == pytest.approx(choice.away)
        assert again.offload == choice.offload


def test_a_host_that_is_too_small_is_not_filled() -> None:
    asked = ask("llama-3.1-70b", "2xrtx-4090", 2048, "64k", "bf16", offload="host")
    with pytest.raises(NoPlan):
        search(asked)  # 18 bytes a weight are 630 GB for each, and there are 64
    device = asked.cluster.accelerator
    assert device.host is not None
    large = dataclasses.replace(device, host=dataclasses.replace(device.host, memory=2e12))
    assert search(dataclasses.replace(asked, cluster=dataclasses.replace(asked.cluster, accelerator=large))).best


@pytest.mark.parametrize("how", ["host", "nvme"])
def test_a_device_whose_host_is_not_known_is_told(how: Any) -> None:
    with pytest.raises(DanluError, match="is not known"):
        search(ask("smollm2-135m", "tpu-v5e", 2048, "64k", "bf16", offload=how))
    search(ask("smollm2-135m", "tpu-v5e", 2048, "64k", "bf16", offload="auto"))


def test_hosts_of_the_data_file_are_whole() -> None:
    hosts = [each.host for each in accelerators().values() if each.host is not None]
    assert len(hosts) >= 14
    for host in hosts:
        assert host.source
        assert 1e8 <= host.disk_rate < host.rate <= 1e12
        assert host.disk >= host.memory


# --- In words -------------------------------------------------------------------------------------------------------


def planned(*words: str) -> dict[str, Any]:
    from danlu.cli import app

    ended = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.output)
    return found


def test_the_line_is_one_that_danlu_train_reads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from danlu.recipe import read_recipe
    from danlu.train.recipe import TrainRecipe

    answer = planned("--model", "llama-2-13b", "--gpus", "2xa100-40gb", "--seq", "2048", "--tokens-per-step", "256k")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a\nmodel: {architecture: LlamaForCausalLM}\nsteps: 5\n"
        "data: {sources: [text.txt], vocabulary: {kind: bpe, size: 8192}}\n"
    )
    typed = shlex.split(answer["command"])
    assert typed[:3] == ["danlu", "train", "RECIPE"]
    overrides = [word for flag, word in pairwise(typed) if flag == "--set"]
    read = read_recipe(path, overrides, TrainRecipe).recipe
    assert read.offload.state == answer["plan"]["offload"]["offload.state"] != "none"
    assert read.recompute == answer["plan"]["recompute"]


def test_one_accelerator_puts_weights_away_too() -> None:
    answer = planned("--model", "llama-2-7b", "--gpus", "a100-80gb", "--seq", "2048", "--tokens-per-step", "64k")
    assert answer["plan"]["offload"]
    assert "--nproc 1" in answer["command"] and "--set offload.state=host" in answer["command"]
    thin = planned("--model", "llama-2-7b", "--gpus", "a100-80gb", "--fit", "cluster", "--seq", "2048")
    assert thin["fit"].endswith("2 a100-80gb")  # with --fit nothing is put away unless it is asked for
    least = planned(
        "--model", "llama-2-7b", "--gpus", "a100-80gb", "--fit", "cluster", "--seq", "2048", "--offload", "host"
    )
    assert least["fit"].endswith("1 a100-80gb")


def test_what_a_recipe_puts_away_is_counted() -> None:
    from danlu.model.config import ModelConfig

    config = ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=32, head_width=128,
                         feedforward_width=11008, context=4096)  # fmt: skip
    host = Places("host", "none", 1, 1, 1)
    asked = dataclasses.replace(ask("llama-2-7b", "2xa100-40gb", 2048, "64k", "bf16"), offload=host)
    written = Written("r.yaml", Plan(shard=2, micro_batches=4), "full", Work(config, 32, 2048), resting=host)
    answer = find(asked, written=written)
    assert answer["written"]["fits"]
    assert answer["written"]["away"]["host"] == pytest.approx(6_738_415_616 * 18 / 2 / 2**30, rel=0.01)
    assert "offload" not in answer["command"]
    bare = find(asked, written=dataclasses.replace(written, resting=Places()))
    assert not bare["written"]["fits"]
    assert "--set offload.state=host" in bare["command"]


def test_files_on_a_processor_whose_disks_are_not_known_take_a_drives_time() -> None:
    plain = ask("smollm2-135m", "cpu", 512, "2k", "bf16")
    assert plain.cluster.accelerator.host is None
    filed = dataclasses.replace(plain, offload=Places("optimizer", "none", 0, 2, 2))
    here, there = search(plain).best[0], search(filed).best[0]
    assert there.offload == {"offload.state": "optimizer"}
    assert there.gib < here.gib
    written = 134_515_008 * (2 * 12 + 16) / (3e9 * 0.8)
    assert 0 < there.seconds - here.seconds < written


def test_rows_of_tables_that_tell_of_offload_are_read_so() -> None:
    device = accelerators()["h200"]
    told = offload_columns("optimizer-cpu", device)
    assert told is not None
    assert (told["optimizer_at"], told["gradients_at"], told["weights_at"]) == (1, 1, 0)
    assert offload_columns("none", device) == offload_columns("", device) == {}
    assert offload_columns("optimizer-cpu", accelerators()["tpu-v5e"]) is None


@pytest.mark.parametrize(
    ("length", "measured", "tolerance"),
    [(32768, 25.8, 0.25), (65536, 37.5, 0.1), (131072, 66.5, 0.05), (262144, 124.5, 0.05)],
)
def test_memory_of_published_runs_with_the_optimizer_on_the_host(
    length: int, measured: float, tolerance: float
) -> None:
    """Llama 3.1 8B on 8 H200, ZeRO-3, whole blocks computed again: GiB reserved, by stas00/ml-engineering.

    Its logits are never whole (a fused loss). The software's own buffers, some 7 GiB, count little in long rows only.
    """
    put = shared(length=length, recompute=2, gradient_bytes=2, gradients_at=1, optimizer_at=1, fused_loss=1)
    assert gib(put) == pytest.approx(measured, rel=tolerance)


def test_memory_of_a_published_run_with_all_state_on_the_host() -> None:
    """Llama 3.1 70B in full on 8 A100, two rows of 2,048, its loss in pieces: 13.9 GiB, by torchtune's README."""
    told = {"length": 2048, "micro_rows": 2, "recompute": 2, "compiled": 1, "gradient_bytes": 2, "fused_loss": 1}
    put = shared(**(shape("llama-3.1-70b") | told | Places("host", "none", 1, 1, 1).columns))
    assert gib(put) == pytest.approx(13.9, rel=0.1)


# --- State of other optimizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adagrad", {}), ("rmsprop", {}), ("rmsprop", {"momentum": 0.5}),
     ("adam", {}), ("adamw", {}), ("adamw", {"state": "8bit"}), ("muon", {}), ("adafactor", {})],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_state_is_what_the_optimizer_keeps(name: str, more: dict[str, Any], tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from danlu.model.config import Experts, ModelConfig
    from danlu.model.transformer import Decoder
    from danlu.plan.shapes import of_config
    from danlu.train.optimizer import Optimizer, masters_of
    from danlu.train.optimizing.settings import OptimizerSettings

    config = ModelConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=2, head_width=32, feedforward_width=192,
                         context=64, tied=tied, experts=Experts(4, 2, 128, shared_width=64))  # fmt: skip
    settings_ = OptimizerSettings.model_validate({"name": name, **more})
    optimizer = Optimizer(*masters_of(Decoder(config), torch.bfloat16), settings_)
    weights = sum(master.numel() for master in optimizer.masters.values())
    kept = sum(
        each.nbytes
        for rule in optimizer.rules
        for state in rule.state.values()
        for key, each in state.items()
        if key != "step"
    )
    told = state_bytes(of_config(config), name, momentum=bool(more.get("momentum")), eight_bit="state" in more)
    assert (told - 4) * weights == pytest.approx(kept, rel=0.01)
    with_average = state_bytes(
        of_config(config), name, momentum=bool(more.get("momentum")), eight_bit="state" in more, average=True
    )
    assert with_average == told + 4


def test_smaller_state_takes_less_memory() -> None:
    plain, whole = ask("llama-3.1-8b", "8xh100", 4096, "1M", "bf16"), Plan(shard=8, micro_batches=32)

    def held(rule: str, eight_bit: bool = False) -> float:
        told = state_bytes(shape("llama-3.1-8b"), rule, eight_bit=eight_bit)
        return float(given_plan(dataclasses.replace(plain, state_bytes=told), whole, "full").memory["optimizer"])

    assert held("adamw") == given_plan(plain, whole, "full").memory["optimizer"]
    assert held("adafactor") < held("adamw", eight_bit=True) < held("muon") < held("adamw")
