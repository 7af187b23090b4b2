"""Tensor parallelism: every matrix is cut over processes, and each computes with its own part (arXiv:1909.08053).

Weights are stored as DTensors, so that FSDP, checkpoints and optimizers know which part of which matrix a process has.
Computing is local: inside a region (a block, an embedding, a head) the modules see the local parts as ordinary weights,
and no operator has to know of the cut. Between regions the residual stream is either the same on all processes or, with
sequence parallelism, cut along the row (arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from danlu.model.embedding import TextEmbedding
from danlu.model.head import LabelHead, WordHead
from danlu.model.mixture import Bank, BankFeedForward
from danlu.model.sharding import split_of
from danlu.model.transformer import Block, EncoderDecoder, EncoderPair, Model, Stack


@dataclass(frozen=True)
class Weight:
    """One weight of a region.

    Attributes:
        owner, key: where it stands.
        summed: each process makes a part of its gradient; otherwise each makes the whole.
        share: of so many processes each adds it to the result if each has the whole: then each takes an equal share.
    """

    owner: nn.Module
    key: str
    summed: bool
    share: int = 1

    def local(self) -> tuple[Tensor, Tensor]:
        """The weight as it is stored, and this process's part to compute with."""
        stored = self.owner._parameters[self.key]
        assert stored is not None
        if not isinstance(stored, DTensor):
            return stored, stored
        once = self.share > 1 and stored.placements[-1].is_replicate()
        gradient = [Partial() if self.summed and placed.is_replicate() else placed for placed in stored.placements]
        own = stored.to_local(grad_placements=gradient)
        return stored, own / self.share if once else own


def compute_locally(module: nn.Module, weights: list[Weight], method: str = "forward") -> None:
    """Make a method of a module see the local parts of weights in their place."""
    inner: Callable[..., Any] = getattr(module, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        kept = []
        try:
            for weight in weights:
                stored, own = weight.local()
                kept.append(stored)
                weight.owner._parameters[weight.key] = own  # type: ignore[assignment]
            return inner(*args, **kwargs)
        finally:
            for weight, stored in zip(weights, kept, strict=False):
                weight.owner._parameters[weight.key] = stored  # type: ignore[assignment]

    setattr(module, method, outer)


@dataclass(frozen=True)
class Stream:
    """How the residual stream lies on the processes of a mesh.

    Attributes:
        mesh: those that share every matrix.
        placement: `Shard(1)` where the tokens are shared out, `Replicate()` where each has all.
        overlap: what is exchanged is waited for only when it is used, here and on the way back.
    """

    mesh: DeviceMesh
    placement: Placement
    overlap: bool = False

    @property
    def cut(self) -> bool:
        return self.placement.is_shard()

    def enter(self, x: Tensor, summed: bool = True) -> Tensor:
        """All tokens, [B, T, width], for a region whose matrices are cut.

        Args:
            summed: each process makes a part of the result's gradient; otherwise each makes the whole.
        """
        whole = DTensor.from_local(x, self.mesh, [self.placement], run_check=False).redistribute(
            placements=[Replicate()], async_op=self.overlap
        )
        return whole.to_local(grad_placements=[Partial() if summed else Replicate()])

    def leave(self, x: Tensor) -> Tensor:
        """Sum what each process has made, [B, T, width], back into the stream."""
        made = DTensor.from_local(x, self.mesh, [Partial()], run_check=False).redistribute(
            placements=[self.placement], async_op=self.overlap
        )
        return made.to_local(grad_placements=[self.placement])

    def own(self, x: Tensor) -> Tensor:
        """This process's tokens of what all have, [B, T, ...]."""
        if not self.cut:
            return x
        return x.tensor_split(self.mesh.size(), 1)[self.mesh.get_local_rank()]


def distribute(model: nn.Module, tensor: DeviceMesh | None, experts: DeviceMesh | None) -> None:
    """Cut the weights of a model as `danlu.model.sharding` says, in place. Works on the meta device too.

    Args:
        tensor: processes that share every matrix; None where each has them whole.
        experts: processes that share the experts out, and with `tensor` those as a second dimension; None where each
            has all experts.
    """
    banks = {
        id(inner) for module in model.modules() if isinstance(module, BankFeedForward) for inner in module.modules()
    }
    for path, module in model.named_modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            dim = split_of(f"{path}.{key}" if path else key)
            placements: list[Placement] = [Replicate() if dim is None else Shard(dim)] if tensor is not None else []
            mesh = tensor
            if experts is not None and id(module) in banks:
                mesh, placements = experts, [Shard(0), *placements]
            if mesh is not None and weight.dim():  # a temperature is the same everywhere, and its gradient too
                module._parameters[key] = _cut(weight, mesh, placements)


def _cut(weight: nn.Parameter, mesh: DeviceMesh, placements: list[Placement]) -> nn.Parameter:
    """A weight as a DTensor of which this process keeps its part."""
    own = weight.detach()
    for number, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces, place = own.chunk(mesh.size(number), placement.dim), mesh.get_local_rank(number)
            own = pieces[place] if place < len(pieces) else own.narrow(placement.dim, 0, 0)
    own = own.clone(memory_format=torch.contiguous_format)
    made = DTensor.from_local(own, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
    return nn.Parameter(made, requires_grad=weight.requires_grad)


def split_model(model: Model, mesh: DeviceMesh, sequence: bool, overlap: bool = False) -> None:
    """Let the processes of a mesh compute a model together whose weights `distribute` has cut.

    Args:
        sequence: share the tokens out between the matrices. Stacks over images never do: their places are odd in
            number.
        overlap: blocks compute two halves of the rows by turns.
    """
    for module in model.modules():
        if isinstance(module, Stack):
            module.halved = overlap
    if isinstance(model, EncoderPair):
        for tower in (model.text, model.image):
            _split_tower(tower, mesh, sequence)
    elif isinstance(model, EncoderDecoder):
        stream = _stream(mesh, sequence)
        _split_embedding(model.embedding, stream)
        _split_stack(model.encoder, stream, summed=True)
        _split_stack(model.decoder, stream, summed=True)
        _split_head(model.head, summed=True)
    else:
        _split_tower(model, mesh, sequence)


def _stream(mesh: DeviceMesh, sequence: bool) -> Stream:
    return Stream(mesh, Shard(1) if sequence else Replicate())


def _split_tower(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    stream = _stream(mesh, sequence and model.config.patches is None)
    if isinstance(model.embedding, TextEmbedding):
        _split_embedding(model.embedding, stream)
    elif list(model.embedding.parameters()) and model.config.patches is not None:
        compute_locally(model.embedding, _weights(model.embedding, summed=False))
    words = not isinstance(model.head, LabelHead)
    _split_stack(model, stream, summed=words, last=str(model.config.layers - 1) in model.blocks._modules)
    _split_head(model.head, summed=words)


def _split_embedding(embedding: nn.Module, stream: Stream) -> None:
    """Words' vectors are looked up where they lie; places and kinds of token only for the process's own tokens."""
    assert isinstance(embedding, TextEmbedding)
    rest = [weight for weight in _weights(embedding, summed=stream.cut) if weight.owner is not embedding.tokens]
    embedding.tokens.forward = partial(_look_up, embedding.tokens, stream)  # type: ignore[method-assign]
    for table in (embedding.positions, embedding.types):
        if table is not None:
            table.forward = partial(_look_up_own, table, stream)  # type: ignore[method-assign]
    compute_locally(embedding, rest)


def _look_up(table: nn.Embedding, stream: Stream, ids: Tensor) -> Tensor:
    weight = table.weight
    assert isinstance(weight, DTensor)
    own = weight.to_local(grad_placements=[Shard(0)])
    first = -(-len(weight) // stream.mesh.size()) * stream.mesh.get_local_rank()
    here = (ids >= first) & (ids < first + len(own))
    found = F.embedding((ids - first).where(here, 0), own) if len(own) else own.new_zeros((*ids.shape, own.shape[1]))
    return stream.leave(found * here[..., None].to(found.dtype))


def _look_up_own(table: nn.Embedding, stream: Stream, ids: Tensor) -> Tensor:
    return F.embedding(stream.own(ids), table.weight)


def _split_stack(stack: Stack, stream: Stream, summed: bool, last: bool = True) -> None:
    """Args: summed: see `Stream.enter`, of what comes out; last: the stack's last block is here."""
    for block in stack.blocks.children():
        assert isinstance(block, Block)
        _split_block(block, replace(stream, overlap=stack.halved))
    if stack.relative is not None:
        compute_locally(stack.relative, _weights(stack.relative, summed=False), "square")
        compute_locally(stack.relative, _weights(stack.relative, summed=False))
    if stack.norm is not None:
        compute_locally(stack.norm, _weights(stack.norm, summed=stream.cut))
    if last:
        run = stack.run
        stack.run = lambda *args, **kwargs: stream.enter(run(*args, **kwargs), summed)  # type: ignore[method-assign]


def _split_block(block: Block, stream: Stream) -> None:
    banks = [module for module in block.modules() if isinstance(module, BankFeedForward)]
    apart = {id(inner) for bank in banks for inner in bank.modules()}
    weights: list[Weight] = []
    for name, module in block.named_modules():
        inside = name.startswith(("attention.", "cross.", "feedforward."))
        found = _weights(module, inside or stream.cut, stream.mesh.size() if inside else 1, deep=False)
        weights += [weight for weight in found if id(module) not in apart]
    compute_locally(block, weights)
    for bank in banks:
        local_experts(bank, stream.mesh.size())
    for part in (block.attention, block.cross, block.feedforward):
        if part is not None:
            part.register_forward_pre_hook(lambda module, args: (stream.enter(args[0]), *args[1:]))
            part.register_forward_hook(lambda module, args, made: stream.leave(made))


def local_experts(bank: BankFeedForward, share: int = 1) -> None:
    """Let a bank compute with this process's part of it. FSDP gathers banks alone, so they are regions of their own."""
    compute_locally(bank, _weights(bank, summed=True, share=share))


def _split_head(head: WordHead | LabelHead | None, summed: bool) -> None:
    if head is None:
        return
    words = [weight for weight in _weights(head, summed) if weight.owner is not head or summed is False]
    compute_locally(head, words, "features" if isinstance(head, WordHead) else "forward")


def _weights(module: nn.Module, summed: bool, share: int = 1, deep: bool = True) -> list[Weight]:
    """The weights of a module and, if `deep`, of those in it. Args: share: of biases that are added once."""
    owners = module.modules() if deep else [module]
    return [
        Weight(owner, key, summed, share if key == "bias" and isinstance(owner, nn.Linear | Bank) else 1)
        for owner in owners
        for key, _ in owner.named_parameters(recurse=False)
    ]
