"""Training apart and coming together now and then: local steps with outer momentum (DiLoCo, arXiv:2311.08105).

A worker is a group of processes, often one, that runs the ordinary loop on rows of its own. After every so many steps
it writes its weights into a directory that all workers see; the shared weights follow the mean of what was delivered
with Nesterov momentum, and all go on from them, each with its own optimizer's state. Workers share no collectives and
no locks: one that is stopped, killed or new holds the others up for no longer than the deadline.

Rounds are counted. A round's weights are a function of the round before and of the deliveries that it names, whoever
makes it. What comes late is counted in a later round, for less (arXiv:2401.09135 measures what stale deliveries do).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from danlu.artifact import only_writer
from danlu.console import say, warn
from danlu.errors import DanluError
from danlu.train.exchange.ledger import Counted, Delivery, Ledger, Round, weigh
from danlu.train.exchange.roster import Roster
from danlu.train.exchange.settings import LocalSettings
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.parts import beside, fill, local
from danlu.train.state import Checkpoints, Peers, Saved, open_checkpoint

POLL = 0.05  # seconds between two looks at what the others do
SHARED, MOMENTUM, WEIGHT, DELTA = "shared.", "momentum.", "weight.", "delta."


class LocalSteps:
    """An optimizer whose weights are exchanged with other workers' after every so many steps.

    It stands in for the optimizer in a `Turn`. Making one joins the workers: the weights become those of the newest
    round; the first worker's make round 0. With several processes all make one and all call it alike. Masters alone
    are exchanged: buffers and moments stay a worker's own. Workers may have different plans.

    Args:
        optimizer: of the weights to share; its masters lie in memory.
        settings: what `terms` names must be the same for all workers.
        worker: this one's name. Whoever starts again under it goes on where its checkpoint stands.
        stopping: polled while waiting for others; where it says yes, the wait is over as if at the deadline.

    Raises DanluError where another process works under this name, or the directory is of another model or other terms.

    Attributes:
        round: int64 scalar, whose weights the steps since the last exchange started from.
        number: int64 scalar, deliveries made.
        steps: int64 scalar, steps since the last exchange.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: LocalSettings,
        worker: str,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        if not re.fullmatch(r"\w[\w-]*", worker, re.ASCII):
            raise DanluError(f"{worker!r} is no name for a worker", fix="use letters, digits, - and _")
        self.optimizer, self.settings, self.worker, self.stopping = optimizer, settings, worker, stopping
        self.workers = settings.home / "workers"
        self.round, self.number, self.steps = (torch.zeros((), dtype=torch.int64) for _ in range(3))
        self.starts = {name: part.clone() for name, part in self._weights().items()}
        self.owed = self._zeros() if settings.compress == "bf16" else {}
        self.peers = Peers.join()
        self._open = ExitStack()
        self.peers.first(self._enter)
        place = self.workers / worker
        self.given = Checkpoints(place / "given", settings.keep, background=False)
        self.made = Checkpoints(place / "made", settings.keep, background=False)
        self._join()

    # --- As the loop sees an optimizer ------------------------------------------------------------------------------

    @property
    def masters(self) -> dict[str, Tensor]:
        """The optimizer's."""
        return self.optimizer.masters

    @property
    def copies(self) -> dict[str, nn.Parameter]:
        """The optimizer's."""
        return self.optimizer.copies

    def gradients(self) -> dict[str, Tensor]:
        """The optimizer's."""
        return self.optimizer.gradients()

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update with the gradients as they are, and an exchange if it is due."""
        self.optimizer.step(learning_rate)
        self.steps += 1
        if self.peers.rank == 0:
            self.roster.beat()
        if int(self.steps) >= self.settings.local_steps:
            self._exchange()

    def refresh(self) -> None:
        """Round the masters into their copies."""
        self.optimizer.refresh()

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's, and what this worker needs to go on in the midst of a round; they share storage."""
        return self.optimizer.state() | self._own_state()

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take up where `state` left off, on any plan. Raises DanluError where a tensor is missing or differs."""
        self.optimizer.load(saved)
        for name, target in self._own_state().items():
            if name not in saved:
                raise DanluError(f"the checkpoint has no {name}", fix="resume a run that was made with local steps")
            fill(name, target, saved[name])

    def _own_state(self) -> dict[str, Tensor]:
        counts = {"round": self.round, "delivered": self.number, "local_steps": self.steps}
        return self._spread("start.", self.starts) | self._spread("owed.", self.owed) | counts

    # --- Coming and going -------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalSteps:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    @torch.no_grad()
    def finish(self) -> None:
        """Deliver what was learned since the last exchange, if anything, and leave with the weights of the last round.

        To be called once `train` has done all its steps.
        """
        if int(self.steps):
            self._exchange()
        self.leave()

    def leave(self) -> None:
        """Let nobody wait for this worker any more. It may come back under its name."""
        if self.peers.rank == 0:
            self.roster.leave()
        self._open.close()

    def _enter(self) -> None:
        self._open.enter_context(only_writer(self.workers / self.worker, wait=False))
        self.roster = Roster(self.workers, self.worker, self.settings.deadline)
        self.ledger = Ledger(self.settings.home, self.worker, self.settings.keep)

    @torch.no_grad()
    def _join(self) -> None:
        """Take up the newest round, or that from which a worker of this name began before it was started again."""
        if self._first(lambda: self.ledger.newest()) is None:
            self._save_round(0, self.starts, self._zeros(), Round(maker=self.worker, terms=self.settings.terms()))
        self.peers.first(self._compare)
        newest, starts = self._first(lambda: (self.ledger.newest(), self.ledger.notes().starts))
        self._read_start(starts[0] if starts else newest, unless=", unless a checkpoint is taken up")
        self.peers.first(lambda: self.ledger.begin(0, int(self.round)))
        self._settle()

    def _compare(self) -> None:
        """Raise DanluError where the directory's rounds are made with other terms."""
        newest = self.ledger.newest()
        assert newest is not None
        there = self.ledger.round(newest).terms
        for name, value in self.settings.terms().items():
            if there[name] != value:
                what = f"its rounds are made with {name} {there[name]!r}, and this worker has {value!r}"
                raise DanluError(what, where=self.settings.home, fix="use the same for all workers, or another home")

    # --- An exchange ------------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Deliver what was learned, and go on from the newest round: the next one, for which to wait, if in time.

        What was done before this worker was killed and started again is not done twice, and it goes on from the round
        from which it went on then.
        """
        self.zero()
        self.peers.together(self._finite)
        newest, delivered = self._first(self._standing)
        started = int(self.round)
        late = newest > started
        parcel = self._parcel()  # weights in it are the masters themselves, and are carried along
        if late:
            self.peers.first(lambda: self.ledger.begin(int(self.number) + 1, newest))
            self._carry(newest)
        if not delivered:
            self._deliver(parcel, started)
        if not late:
            self._read_start(self._meet())
            self.peers.first(lambda: self.ledger.begin(int(self.number) + 1, int(self.round)))
        self.number += 1
        self.steps.zero_()
        self._settle()

    def _standing(self) -> tuple[int, bool]:
        """The round to go on from as far as is known, and whether this delivery was made before."""
        here, newest = int(self.round), self.ledger.newest()
        if newest is None or newest < here:
            what = f"has no round {here}, from which worker {self.worker} goes on"
            raise DanluError(what, where=self.settings.home, fix="use the home of the run that wrote the checkpoint")
        notes, next_ = self.ledger.notes(), int(self.number) + 1
        delivered = bool(notes.delivered) and notes.delivered[-1].number >= int(self.number)
        if delivered:
            say(f"worker {self.worker}: delivery {int(self.number)} was made before and stands as it was")
        known = notes.starts[next_] if len(notes.starts) > next_ else newest
        return known if known > here else newest, delivered

    def _finite(self) -> None:
        for name, part in self._weights().items():
            if not part.isfinite().all():
                fix = "lower the learning rate, or see the settings of guard"
                raise DanluError(f"worker {self.worker} has weights that are no numbers", where=name, fix=fix)

    def _carry(self, newest: int) -> None:
        """Put what was learned since the start upon the weights of a newer round, and start from that."""
        for name, part in self._weights().items():
            part.sub_(self.starts[name])
        self._read_start(newest)
        for name, part in self._weights().items():
            part.add_(self.starts[name])

    def _parcel(self) -> dict[str, Tensor]:
        """What is delivered: the weights or, in bf16, how far they have moved.

        What rounding takes away is owed, and goes out next time (arXiv:1901.09847).
        """
        if self.settings.compress == "none":
            return self._spread(WEIGHT, self._weights())
        found = {}
        for name, part in self._weights().items():
            delta = self.starts[name] - part + self.owed[name]
            found[name] = delta.bfloat16()
            self.owed[name].copy_(delta - found[name])
        return self._spread(DELTA, found)

    def _deliver(self, parcel: dict[str, Tensor], started: int) -> None:
        """Write what was learned where the others find it, and note it."""
        about = Delivery(
            worker=self.worker,
            number=int(self.number),
            started=started,
            seen_from=int(self.round),
            steps=int(self.steps),
        )
        self.given.save(about.number, parcel, {})
        self.peers.first(lambda: self.ledger.deliver(about))

    def _meet(self) -> int:
        """Wait until there is a later round than this worker's, or make it if that falls to it; returns the newest."""
        began = time.monotonic()
        while (due := self._first(partial(self._until_due, began))) is not None:
            try:
                self._make([Delivery(**about) for about in due])
            except DanluError:
                # Who is stopped here for long finds the files gone, and that others have made the round.
                if self._first(lambda: self.ledger.newest()) == int(self.round):
                    raise
        return int(self._first(lambda: self.ledger.newest()))

    def _until_due(self, began: float) -> list[dict[str, Any]] | None:
        """The deliveries of which this worker is to make a round now; None where there is a later one already."""
        here = int(self.round)
        while self.ledger.newest() == here:
            self.roster.beat()
            pool = self.ledger.pool(here)
            complete = self.roster.live() <= {delivery.worker for delivery in pool}
            if here == 0:
                complete &= self.roster.joined() >= self.settings.workers
            over = self.stopping() or time.monotonic() - began >= self.settings.deadline
            if over or (complete and self.ledger.claim(here + 1)):
                return [delivery.model_dump() for delivery in pool]
            time.sleep(POLL)
        return None

    # --- A round ----------------------------------------------------------------------------------------------------

    def _make(self, pool: list[Delivery]) -> None:
        """Make the next round of these deliveries.

        The outer step is that of SGD with Nesterov momentum, written so that with a learning rate of 1 and without
        momentum the shared weights are the mean to the bit. The masters serve as room: they are to be replaced.
        """
        here = int(self.round)
        found = {delivery: saved for delivery in pool if (saved := self._find(delivery)) is not None}
        counted = weigh(list(found), here, self.settings.staleness_power)
        means, moments = self._zeros(), self._zeros()
        for place, one in enumerate(counted, 1):
            self._see(one.delivery, *found[one.delivery])
            for name, part in self._weights().items():
                means[name].lerp_(self.starts[name].lerp(part, one.weight), 1 / place)
        self._open_round(here).read_into(self._spread(MOMENTUM, moments))
        rate, memory = self.settings.outer_learning_rate, self.settings.outer_momentum
        for name, start in self.starts.items() if counted else ():
            moments[name].mul_(memory).add_(start - means[name])
            means[name].copy_(start.lerp(means[name], rate)).sub_(moments[name], alpha=rate * memory)
        left_out = tuple(delivery for delivery in pool if delivery not in found)
        through = {delivery.worker: delivery.number for delivery in pool}
        made = Round(
            maker=self.worker, terms=self.settings.terms(), counted=counted, left_out=left_out, through=through
        )
        self._save_round(here + 1, means if counted else self.starts, moments, made)

    def _find(self, delivery: Delivery) -> tuple[Saved, Saved | None] | None:
        """A delivery, and where it is told against another round than the last, that round; None where damaged."""
        try:
            given = open_checkpoint(self.workers / delivery.worker / "given", delivery.number, self.peers)
            apart = self.settings.compress == "none" and delivery.seen_from != int(self.round)
            base = self._open_round(delivery.seen_from) if apart else None
        except DanluError as error:
            if self.peers.rank == 0:
                warn(f"delivery {delivery.number} of worker {delivery.worker} is left out: {error}")
            return None
        assert given is not None
        return given, base

    def _see(self, delivery: Delivery, given: Saved, base: Saved | None) -> None:
        """Put a delivery, as it is seen from the last round, into the masters."""
        masters = self._weights()
        if self.settings.compress == "bf16":
            deltas = {name: torch.zeros_like(part, dtype=torch.bfloat16) for name, part in masters.items()}
            given.read_into(self._spread(DELTA, deltas))
            for name, part in masters.items():
                part.copy_(self.starts[name] - deltas[name])
            return
        given.read_into(self._spread(WEIGHT, masters))
        if base is not None:
            before = self._zeros()
            base.read_into(self._spread(SHARED, before))
            for name, part in masters.items():
                part.add_(self.starts[name] - before[name])

    def _save_round(self, number: int, shared: dict[str, Tensor], moments: dict[str, Tensor], made: Round) -> None:
        """Write a round's tensors, and make it the round of this number unless another worker was first."""
        self.made.save(number, self._spread(SHARED, shared) | self._spread(MOMENTUM, moments), {})
        self.peers.first(partial(self._publish, number, made))

    def _publish(self, number: int, made: Round) -> None:
        if number:
            earlier = self.ledger.round(number - 1).through
            made = made.model_copy(update={"through": earlier | made.through})
        if self.ledger.publish(number, made) and number:
            of = ", ".join(map(_spell(number), made.counted)) or "nothing"
            say(f"worker {self.worker}: made round {number} of {of}")

    def _open_round(self, number: int) -> Saved:
        """Raises DanluError where its tensors are damaged or no longer kept."""
        maker = self._first(lambda: self.ledger.round(number).maker)
        found = open_checkpoint(self.workers / maker / "made", number, self.peers)
        assert found is not None
        return found

    def _read_start(self, number: int, unless: str = "") -> None:
        """Start from the weights of a round; where they are no longer kept, aloud, from those of the newest.

        Args: unless: what more to say then.
        """
        newest = int(self._first(lambda: self.ledger.newest()))
        try:
            found = self._open_round(number)
        except DanluError:
            if number == newest:
                raise
            if self.peers.rank == 0:
                instead = f"it starts from round {newest}{unless}"
                warn(f"worker {self.worker}: the weights of round {number} are no longer kept; {instead}")
            number, found = newest, self._open_round(newest)
        self.peers.together(partial(self._check_names, found))
        found.read_into(self._spread(SHARED, self.starts))
        self.round.fill_(number)

    def _check_names(self, found: Saved) -> None:
        """Raise DanluError where a round has weights that this worker's model has not."""
        own = {name for names in self.peers.gather(list(self.starts)) for name in names}
        for name in sorted(found.names):
            if name.startswith(SHARED) and name.removeprefix(SHARED) not in own:
                what = f"holds {name.removeprefix(SHARED)}, which this worker does not train"
                raise DanluError(what, where=found.folder, fix="use the same model for all workers, or another home")

    def _settle(self) -> None:
        """Let the weights be those to start from."""
        for name, part in self._weights().items():
            part.copy_(self.starts[name])
        self.refresh()

    # --- Tensors and processes --------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """What this process holds of the masters, sharing their storage; asked anew, since FSDP may move it."""
        return {name: local(master) for name, master in self.masters.items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(part) for name, part in self._weights().items()}

    def _spread(self, prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts as tensors that lie as the masters do, by their names in a file."""
        return {prefix + name: beside(part, self.masters[name]) for name, part in parts.items()}

    def _first(self, work: Callable[[], Any]) -> Any:
        """What the worker's first process finds, as JSON keeps it, on all of its processes."""
        return self.peers.gather(self.peers.together(work if self.peers.rank == 0 else lambda: None))[0]


def shared_weights(home: Path) -> Saved:
    """The checkpoint of the newest round; it names the weights `shared.NAME`. Raises DanluError where there is none."""
    ledger = Ledger(home, "", 0)
    newest = ledger.newest()
    found = None
    if newest is not None:
        found = open_checkpoint(home / "workers" / ledger.round(newest).maker / "made", newest)
    if found is None:
        raise DanluError("no worker has been here", where=home)
    return found


def _spell(number: int) -> Callable[[Counted], str]:
    """How a round of this number speaks of a delivery."""

    def spell(one: Counted) -> str:
        late = number - 1 - one.delivery.started
        plain = one.delivery.worker
        return plain if late == 0 else f"{plain} ({late} late, counts {one.weight:.2f})"

    return spell
