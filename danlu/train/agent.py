"""The processes of one machine: started together, watched together, started again when one dies."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from danlu.artifact import only_writer
from danlu.console import say
from danlu.errors import DanluError
from danlu.train.failures import (
    Failure,
    Patience,
    RankError,
    cause,
    ended_without_a_word,
    failure_file,
    read_failures,
)
from danlu.train.hang import HangSettings, Watchdog, diagnose, has_begun, sign_file, stack_file
from danlu.train.signals import Stopping

SETTLE_SECONDS = 5.0  # what a rank gets to write its error down, once others have told of its end


class Agent(LocalElasticAgent):
    """torch's elastic agent, with other rules about when to go on: its count of restarts is replaced by `Patience`.

    A rank's death ends its siblings at once, since they can do no more than wait for it. A DanluError, a hang and a
    failure while stopping end the run.

    Attributes:
        error: what ended the run; None where it ended well.
        early: whether the run was asked to stop, and was ended, before any of its ranks had begun a step.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        *,
        run_dir: Path,
        patience: Patience,
        stopping: Stopping,
        grace: float,
        hang: HangSettings,
    ) -> None:
        super().__init__(spec, logs, start_method="forkserver")
        self.run_dir, self.patience, self.stopping, self.grace, self.hang = run_dir, patience, stopping, grace, hang
        self.error: DanluError | None = None
        self.early = False
        self._right_to_write = ExitStack()
        self._deadline: float | None = None

    # --- What the elastic agent calls -------------------------------------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self.stopping.asked:
            raise KeyboardInterrupt
        self.stopping.at_once = True  # nobody works yet, and other machines may be long in coming
        try:
            super()._rendezvous(worker_group)
        finally:
            self.stopping.at_once = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if worker_group.group_rank == 0 and (worker_group.group_world_size or 1) > 1:
            self._right_to_write.enter_context(only_writer(self.run_dir, wait=False))
        for worker in worker_group.workers:
            for place in (sign_file, stack_file, failure_file):
                place(self.run_dir, worker.global_rank).unlink(missing_ok=True)
        here, world = [worker.global_rank for worker in worker_group.workers], worker_group.workers[0].world_size
        self._watchdog = Watchdog(self.run_dir, here, world, self.hang)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._may_end_early(worker_group):
            self.early = True
            self._kill()
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        self._pass_on_a_stop(worker_group)
        silence = self._watchdog.silent()
        if silence is not None:
            self.error = diagnose(self.run_dir, worker_group.workers[0].world_size, silence)
        dead = self._dead(worker_group)
        if dead and self.error is None:
            self._judge(self._settled(worker_group, {worker.global_rank for worker in worker_group.workers}))
        if dead or self.error is not None:
            self._kill()
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED and self.error is None and not dead:  # it died since we looked
            self._judge(self._settled(worker_group, set(result.failures)))
        if self.error is not None:
            self._remaining_restarts = 0
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        self._kill()
        super()._shutdown(*args, **kwargs)
        self._right_to_write.close()

    # --- Failing ----------------------------------------------------------------------------------------------------

    def _processes(self) -> list[Any]:
        """Those of this machine, in the order of local ranks; none between two starts."""
        started = getattr(self._pcontext, "_pc", None)
        return list(started.processes) if started is not None else []

    def _dead(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Ranks of this machine that ended badly -> exit codes."""
        pairs = zip(worker_group.workers, self._processes(), strict=False)
        return {worker.global_rank: process.exitcode for worker, process in pairs if process.exitcode}

    def _settled(self, worker_group: WorkerGroup, suspects: set[int]) -> Failure:
        """The cause of a failure, which may reach us after its consequences.

        Args:
            suspects: ranks that nobody has ended for the sake of others.
        """
        world = range(worker_group.workers[0].world_size)
        patience = time.monotonic() + SETTLE_SECONDS
        while True:
            dead = self._dead(worker_group)
            told = read_failures(self.run_dir, world)
            silent = (suspects & set(dead)) - {failure.rank for failure in told}
            found = cause(told + [ended_without_a_word(rank, dead[rank]) for rank in silent])
            if not found.consequence or len(dead) == len(worker_group.workers) or time.monotonic() > patience:
                return found
            time.sleep(0.05)

    def _judge(self, failure: Failure) -> None:
        """Start again, saying so, or end the run."""
        if self.stopping.asked or not self.patience.bears(failure):
            self.error = failure.error()

    def _kill(self) -> None:
        """End every rank of this machine at once: they share one fate, and what is worth keeping is on disk."""
        for process in self._processes():
            process.kill()

    # --- Stopping ---------------------------------------------------------------------------------------------------

    def _may_end_early(self, worker_group: WorkerGroup) -> bool:
        """Whether a stop is asked for and no step begun: on rank 0 learning a vocabulary, the others wait for it, and
        none of them would look at a flag for minutes. Ranks on other machines would take it for a failure.
        """
        if self.stopping.number is None or self._deadline is not None or (worker_group.group_world_size or 1) > 1:
            return False
        return not has_begun(self.run_dir, range(worker_group.workers[0].world_size))

    def _pass_on_a_stop(self, worker_group: WorkerGroup) -> None:
        """Tell the ranks, once; who has not saved and ended when the grace is over is ended."""
        if self.stopping.number is None:
            return
        if self._deadline is None:
            say(f"{self.stopping.number.name}: every process finishes its step, saves and ends")
            self._deadline = time.monotonic() + self.grace
            for worker in worker_group.workers:
                with suppress(ProcessLookupError):
                    os.kill(worker.id, signal.SIGTERM)
        elif time.monotonic() > self._deadline and self.error is None:
            what = f"not every process had saved and ended {self.grace:.0f} s after {self.stopping.number.name}"
            self.error = RankError(what, None, "the same command goes on from the newest checkpoint", exit_code=1)
