"""The plan: how one training step is cut over processes, and what is kept, recomputed or moved away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from danlu.errors import DanluError, one_of
from danlu.model.config import EncoderDecoderConfig, ModelConfig, PairConfig, Relative
from danlu.settings import Settings

# From the slowest links to the fastest: neighbours in the last degree are neighbours in rank.
DEGREES = ("pipeline", "data", "context", "expert", "shard", "tensor")
ROWS = ("data", "expert", "shard")  # the degrees that share the rows of a batch out


class Plan(Settings):
    """How the work of a step is split. The six degrees multiply to the number of processes."""

    data: int = Field(1, ge=1, description="copies of the model, each on its own rows")
    shard: int = Field(
        1, ge=1, description="parts that optimizer state (and see zero) is cut into, each on its own rows"
    )
    tensor: int = Field(1, ge=1, description="parts that every matrix is cut into")
    pipeline: int = Field(1, ge=1, description="groups of layers, one after another")
    context: int = Field(1, ge=1, description="parts that every row is cut into")
    expert: int = Field(1, ge=1, description="parts that the experts of a mixture are cut into, each on its own rows")
    zero: Literal[1, 2, 3] = Field(
        3,
        description="what shard cuts: 1 optimizer state, 2 also gradients, 3 also weights, which are then gathered for"
        " each use (ZeRO's stages, arXiv:1910.02054)",
    )
    sequence: bool = Field(
        True, description="tensor processes share the tokens out between the matrices (arXiv:2205.05198)"
    )
    overlap: bool = Field(
        False,
        description="compute the rows of a micro-batch in two halves by turns, so that what tensor processes sum up for"
        " one travels while the other is computed (arXiv:2409.15241)",
    )
    micro_batches: int = Field(1, ge=1, description="parts that the rows of a process are computed in, one by one")
    schedule: Literal["1f1b", "interleaved", "zero-bubble"] = Field(
        "1f1b", description="the order of a pipeline's work"
    )
    stages: int = Field(1, ge=1, description="groups of layers a process holds (interleaved pipelines)")

    @model_validator(mode="after")
    def _belongs_together(self) -> Plan:
        if self.schedule == "interleaved" and self.stages < 2:
            raise ValueError("an interleaved pipeline holds several stages a process: set stages=2 or more")
        if self.schedule == "zero-bubble" and self.stages not in (1, 2):
            raise ValueError("a zero-bubble pipeline holds one stage a process, or with stages=2 two")
        if self.schedule == "1f1b" and self.stages != 1:
            raise ValueError(f"schedule 1f1b holds one stage a process, not {self.stages}; use schedule=interleaved")
        if self.pipeline == 1 and (self.schedule != "1f1b" or self.stages != 1):
            raise ValueError("schedule and stages are for pipelines: set pipeline=2 or more")
        if self.tensor == 1 and self.overlap:
            raise ValueError("overlap is for matrices that are cut: set tensor=2 or more")
        return self

    @property
    def world(self) -> int:
        """Processes that the plan takes."""
        return math.prod(getattr(self, name) for name in DEGREES)

    @property
    def readers(self) -> int:
        """Groups of processes that share the rows of a batch out."""
        return math.prod(getattr(self, name) for name in ROWS)

    @property
    def all_stages(self) -> int:
        """Stages of the pipeline, over all processes."""
        return self.pipeline * self.stages

    def short(self) -> str:
        """As `parse` reads it, defaults left out."""
        values = {name: value for name, value in self.plain().items() if value != type(self).model_fields[name].default}
        return ",".join(f"{name}={str(value).lower()}" for name, value in values.items()) or "data=1"

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """`tensor=2,pipeline=2` as settings for `read`. Raises DanluError where a name is not known, or named twice."""
        values: dict[str, Any] = {}
        for part in filter(None, (word.strip() for word in text.split(","))):
            name, equals, value = part.partition("=")
            if name not in cls.model_fields or not equals:
                fix = f"{one_of(name, list(cls.model_fields))}  (as in tensor=2,shard=2)"
                raise DanluError(f"{part} is no part of a plan", where="--plan", fix=fix)
            if name in values:
                raise DanluError(f"{name} is named twice", where="--plan", fix="name each once, as in tensor=2,shard=2")
            values[name] = int(value) if value.isdecimal() else value
        return values

    @classmethod
    def read(cls, values: dict[str, Any]) -> Plan:
        """A plan from its settings, the others being what they are by default. Raises DanluError where one is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"].lower()
            shown = f"{name}={first['input']}: {what}" if name else what
            raise DanluError(shown, where="plan", fix="as in tensor=2,pipeline=2,micro_batches=4") from None


@dataclass(frozen=True)
class Work:
    """What a plan must fit.

    Attributes:
        config: of the model; None for a module that belongs to no family, of which only rows can be shared out.
        rows: of a global batch.
        length: tokens of a row.
    """

    config: ModelConfig | EncoderDecoderConfig | PairConfig | None
    rows: int
    length: int = 1


def check(plan: Plan, work: Work, world: int) -> None:
    """Raise DanluError where a plan cannot run on `world` processes, naming the numbers and the nearest that can."""
    found = [*_world(plan, world), *problems(plan, work)]
    if found:
        near = nearest_plan(plan, work, world)
        fix = f"nearest plan that fits: --plan {near.short()}" if near else f"no plan fits {world} processes"
        raise DanluError("; ".join(found), where="plan", fix=fix)


def _world(plan: Plan, world: int) -> Iterator[str]:
    if plan.world != world:
        named = " x ".join(f"{name} {getattr(plan, name)}" for name in DEGREES if getattr(plan, name) > 1) or "1"
        yield f"{named} = {plan.world} processes, but there are {world}"


def problems(plan: Plan, work: Work) -> Iterator[str]:
    """What keeps a plan from being carried out, in words."""
    yield from _rows(plan, work)
    if work.config is None:
        for name in ("tensor", "pipeline", "context", "expert"):
            if getattr(plan, name) > 1:
                yield f"{name}={getattr(plan, name)}: a model of no family can only be copied or sharded (data, shard)"
        return
    if isinstance(work.config, ModelConfig):
        yield from _stack(plan, work.config, work.length)
        return
    for name in ("pipeline", "context"):
        if getattr(plan, name) > 1:
            yield f"{name}={getattr(plan, name)}: a model of two stacks is not cut that way"
    parts = (
        (work.config.encoder, work.config.decoder)
        if isinstance(work.config, EncoderDecoderConfig)
        else (work.config.text, work.config.image)
    )
    for config in parts:
        yield from _stack(plan, config, work.length)


def _rows(plan: Plan, work: Work) -> Iterator[str]:
    share, rest = divmod(work.rows, plan.readers)
    if rest:
        yield f"{work.rows} rows a step cannot be shared by data x expert x shard = {plan.readers}"
    elif share % plan.micro_batches:
        yield f"{share} rows of a process cannot be cut into micro_batches={plan.micro_batches}"
    elif plan.overlap and share == plan.micro_batches:
        yield "overlap takes turns between rows of a micro-batch, and there is one"


def _stack(plan: Plan, config: ModelConfig, length: int) -> Iterator[str]:
    if plan.world > 1 and config.norm == "batch":
        yield "batch norms see all tokens of a batch: one process only"
    yield from _tensor(plan, config, length)
    if plan.pipeline > 1:
        if plan.all_stages > config.layers:
            yield f"{config.layers} layers cannot fill {plan.all_stages} stages"
        if plan.schedule == "1f1b" and plan.micro_batches < plan.pipeline:
            yield f"a pipeline of {plan.pipeline} stages needs micro_batches={plan.pipeline} or more"
        if plan.micro_batches < plan.all_stages and plan.schedule == "zero-bubble" and plan.stages == 2:
            yield f"a zero-bubble pipeline of {plan.all_stages} stages needs micro_batches={plan.all_stages} or more"
        if plan.schedule == "interleaved" and plan.micro_batches % plan.pipeline:
            yield f"micro_batches={plan.micro_batches} is no multiple of pipeline={plan.pipeline}, as interleaving asks"
    if plan.context > 1:
        yield from _context(plan, config, length)
    if plan.expert > 1:
        count = config.experts.count if config.experts else 0
        if not count:
            yield f"expert={plan.expert}: the model has no experts"
        elif count % plan.expert:
            yield f"{count} experts cannot be cut into expert={plan.expert}"


def _tensor(plan: Plan, config: ModelConfig, length: int) -> Iterator[str]:
    if plan.tensor == 1:
        return
    sizes = {"query heads": config.heads, "key/value heads": config.kv_heads}
    sizes["feed-forward features"] = config.feedforward_width
    if config.experts is not None:
        sizes["features of an expert"] = config.experts.width
        if config.experts.shared_width:
            sizes["features of the shared expert"] = config.experts.shared_width
    for name, size in sizes.items():
        if size % plan.tensor:
            yield f"{size} {name} cannot be cut into tensor={plan.tensor}"
    local = length // plan.context
    if plan.sequence and config.patches is None and local % plan.tensor:
        yield f"{local} tokens cannot be shared by tensor={plan.tensor} (or set sequence=false)"


def _context(plan: Plan, config: ModelConfig, length: int) -> Iterator[str]:
    if length % (2 * plan.context):
        yield f"rows of {length} tokens cannot be cut into 2 x context={plan.context} pieces"
    if isinstance(config.positions, Relative) or config.patches is not None or config.cross:
        yield f"context={plan.context}: only stacks of text without a bias by distance are cut along the row"
    if config.experts is not None and (config.experts.capacity or config.experts.capacity_factor):
        yield f"context={plan.context}: experts with a capacity fill up in the order of whole rows"
    if config.attention_dropout:
        yield f"context={plan.context}: attention dropout needs whole rows"


def nearest_plan(plan: Plan, work: Work, world: int) -> Plan | None:
    """The possible plan whose degrees are the fewest doublings away, or None."""
    best: tuple[float, Plan] | None = None
    for degrees in _factorings(world, len(DEGREES)):
        changes = dict(zip(DEGREES, degrees, strict=True))
        distance = sum(abs(math.log2(changes[name] / getattr(plan, name))) for name in DEGREES)
        # Of equally near plans the one that only shares rows out is the plainest.
        distance += 0.01 * sum(changes[name] > 1 for name in ("tensor", "pipeline", "context", "expert"))
        if best is None or distance < best[0]:
            for made in _variants(plan, changes):
                if not any(problems(made, work)):
                    best = (distance, made)
                    break
    return best[1] if best else None


def _variants(plan: Plan, degrees: dict[str, int]) -> Iterator[Plan]:
    """The plan with these degrees, as it is and then with its other settings made plainer."""
    kept = plan.plain() | degrees
    if degrees["pipeline"] == 1:
        kept |= {"schedule": "1f1b", "stages": 1}
    kept["overlap"] = plan.overlap and degrees["tensor"] > 1
    plainer: tuple[dict[str, Any], ...] = (
        {}, {"micro_batches": 1}, {"sequence": False},
        {"micro_batches": 1, "sequence": False, "overlap": False, "schedule": "1f1b", "stages": 1},
    )  # fmt: skip
    for change in plainer:
        yield Plan.model_validate(kept | change)


def _factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of so many factors."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    for some in product(divisors, repeat=parts - 1):
        made = math.prod(some)
        if number % made == 0:
            yield (*some, number // made)
