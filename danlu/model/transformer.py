"""The bodies: a decoder, an encoder, an encoder with a decoder, and a pair of encoders. All are stacks of one block."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.model.attention import Attention, Cache, LayerCache
from danlu.model.config import EncoderDecoderConfig, ModelConfig, PairConfig, Relative
from danlu.model.embedding import PatchEmbedding, Received, TextEmbedding
from danlu.model.feedforward import FeedForward
from danlu.model.head import LabelHead, WordHead, make_head
from danlu.model.mixture import Mixture, Routing, joined
from danlu.model.norm import make_norm
from danlu.model.position import RelativeBias
from danlu.model.ring_attention import Ring
from danlu.model.sight import Batch, Sight, cross_sight, self_sight


class Notes:
    """Where routers note what they do. Of a list, or of a dataclass with one, FSDP would hand on a copy."""

    def __init__(self, routes: list[Routing]) -> None:
        self.routes = routes


class Block(nn.Module):
    """Attention, perhaps attention over another stack's output, and a feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.attention_norm = make_norm(config) if before else None
        self.attention = Attention(config)
        self.attention_norm_after = make_norm(config) if after else None
        self.cross_norm = make_norm(config) if config.cross else None
        self.cross = Attention(config, cross=True) if config.cross else None
        self.feedforward_norm = make_norm(config) if before else None
        if config.experts is not None and config.has_experts(layer):
            self.feedforward: nn.Module = Mixture(config, config.experts)
        else:
            self.feedforward = FeedForward(config)
        self.feedforward_norm_after = make_norm(config) if after else None
        self.post = config.norm_place == "post"
        self.dropout, self.scale = config.dropout, config.residual_scale
        self.drop_path = config.drop_path * layer / max(config.layers - 1, 1)

    def forward(
        self,
        x: Tensor,
        see: Sight | tuple[Sight, ...],
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        see_memory: Sight | None = None,
        notes: Notes | None = None,
    ) -> Tensor:
        """[B, T, width] -> the same shape. For the arguments see `Stack.run`.

        Args:
            see: with several, as many parts of the rows are computed by turns: what processes exchange for one may
                then travel while the next is computed, and so on the way back, which goes from last to first.
        """
        sees = see if isinstance(see, tuple) else (see,)
        parts = list(x.chunk(len(sees))) if len(sees) > 1 else [x]
        inner = [_through(self.attention_norm, part) for part in parts]
        updates = [self.attention(part, seen, cache) for part, seen in zip(inner, sees, strict=True)]
        parts = self._add_all(parts, updates, self.attention_norm_after)
        if self.cross is not None:
            assert memory is not None and see_memory is not None and len(parts) == 1
            update = self.cross(_through(self.cross_norm, parts[0]), see_memory, cache, memory)
            parts = [self._add(parts[0], update, None)]
        inner = [_through(self.feedforward_norm, part) for part in parts]
        routes: list[Routing] | None = None if notes is None else []
        updates = [
            self.feedforward(part, routes) if isinstance(self.feedforward, Mixture) else self.feedforward(part)
            for part in inner
        ]
        if notes is not None and routes:
            notes.routes.append(joined(routes))
        parts = self._add_all(parts, updates, self.feedforward_norm_after)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _add_all(self, parts: list[Tensor], updates: list[Tensor], norm: nn.Module | None) -> list[Tensor]:
        return [self._add(part, update, norm) for part, update in zip(parts, updates, strict=True)]

    def _add(self, x: Tensor, update: Tensor, norm: nn.Module | None) -> Tensor:
        """The stream with an update, normed where that is its place."""
        if norm is not None and not self.post:
            update = norm(update)
        if self.dropout:
            update = F.dropout(update, self.dropout, self.training)
        if self.drop_path and self.training:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            update = update * (kept / (1 - self.drop_path)).to(x.dtype)
        x = x + (update if self.scale == 1 else update * self.scale)
        return norm(x) if norm is not None and self.post else x


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Stack(nn.Module):
    """Blocks one after another, and a norm.

    Attributes:
        blocks: by the numbers of their layers. A stage of a pipeline holds some of them.
        keep_probabilities: on a CPU, attention probabilities kept for the backward pass, on average a query and head;
            the others are computed again. 0 needs the least memory, more takes less time.
        ring: the processes that the rows are cut over, where they are.
        halved: blocks compute the two halves of the rows by turns, unless there is a cache or another stack's output.
    """

    blocks: nn.ModuleList | nn.ModuleDict

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_probabilities = 0
        self.ring: Ring | None = None
        self.halved = False
        relative = config.positions if isinstance(config.positions, Relative) else None
        self.relative = RelativeBias(relative, config.heads, config.causal) if relative else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config) if config.final_norm else None

    def run(
        self,
        x: Tensor,
        batch: Batch,
        *,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        see_memory: Sight | None = None,
        routes: list[Routing] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, width].

        Args:
            x: [B, T, width], embedded.
            batch: who sees whom.
            cache: filled with the new tokens and looked at.
            memory, see_memory: [B, S, width], another stack's output, and how it is seen.
            routes: where routers note what they did, layer by layer.
            hidden: where the stream is noted before the first and after each block, as Hugging Face counts them.
        """
        training_dropout = self.training and self.config.attention_dropout > 0
        batch = replace(batch, keep=self.keep_probabilities, masked=training_dropout, ring=self.ring)
        halved = self.halved and cache is None and memory is None and len(x) > 1
        batches = batch.halves() if halved else (batch,)
        sights: dict[bool, tuple[Sight, ...]] = {}
        notes = None if routes is None else Notes(routes)
        for name, block in self.blocks.named_children():
            layer = int(name)
            local = self.config.window(layer) is not None
            if local not in sights:
                sights[local] = tuple(self_sight(self.config, layer, one, self.relative) for one in batches)
            if hidden is not None:
                hidden.append(x)
            x = block(x, sights[local], None if cache is None else cache.layers[layer], memory, see_memory, notes)
        if hidden is not None:
            hidden.append(x)
        if cache is not None:
            cache.lengths = cache.lengths + x.shape[1]
        return _through(self.norm, x)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        self._check_context(length)
        weight = next(self.blocks.parameters())
        return Cache(self.config, batch, length, weight.dtype, weight.device)

    def _check_context(self, length: int) -> None:
        if length > self.config.context and not isinstance(self.config.positions, Relative):
            raise DanluError(f"{length} tokens are more than the model's context of {self.config.context}")

    def _places(self, tokens: Tensor, positions: Tensor | None, cache: Cache | None) -> tuple[Tensor, int | None]:
        """Positions of new tokens [B, T], and how many places of the cache are looked at."""
        batch, length = tokens.shape[:2]
        if cache is not None:
            keys = int(cache.lengths.max()) + length
            if keys > cache.length:
                raise DanluError(f"{keys} tokens do not fit in a cache of {cache.length}")
            return cache.lengths[:, None] + torch.arange(length, device=tokens.device), keys
        if positions is not None:
            return positions, None
        self._check_context(length)
        return torch.arange(length, device=tokens.device).expand(batch, length), None


class Embedded(nn.Module):
    """What has an embedding at one end and a head at the other."""

    embedding: TextEmbedding | PatchEmbedding | Received
    head: WordHead | LabelHead | None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def word_weight(self) -> Tensor:
        """The embedding of the words, [vocab, width]."""
        assert isinstance(self.embedding, TextEmbedding | Received), "an image has no words"
        return self.embedding.tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """[vocab, width], what a head of words multiplies by."""
        own = self.head.weight if isinstance(self.head, WordHead) else None
        return self.word_weight if own is None else own


class Decoder(Embedded, Stack):
    """A causal language model: tokens, blocks, a norm, and a head.

    `forward` ends at the last norm; `logits` applies the head. They are apart because training never needs all
    logits at once (see `danlu.model.loss`).
    """

    embedding: TextEmbedding | Received

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = TextEmbedding(config)
        self.head = make_head(config)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        prefix: Tensor | None = None,
        cache: Cache | None = None,
        routes: list[Routing] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, width].

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T]; by default 0, 1, ... or, with a cache, each row's next places.
            segments: int32 [B, T], the document of each token of a packed row, 0 for padding; documents never see
                each other.
            prefix: int64 [B], how many tokens at the start of each document of a row see each other, whatever comes
                first.
            cache: filled with the new tokens and looked at.
            routes, hidden: see `Stack.run`.

        Raises DanluError where the tokens would outgrow the model's context or the cache.
        """
        positions, keys = self._places(tokens, positions, cache)
        if cache is not None and (segments is not None or prefix is not None):
            raise DanluError("packed rows and prefixes are not kept in a cache", where="decoder")
        x = self.embedding(tokens, positions)
        return self.run(x, Batch(positions, segments, prefix, keys), cache=cache, routes=routes, hidden=hidden)

    def logits(self, hidden: Tensor, segments: Tensor | None = None) -> Tensor:
        """[..., width] -> [..., vocab], or what another head makes of [B, T, width]."""
        assert self.head is not None, "a stack without a head has no logits"
        if isinstance(self.head, LabelHead):
            return self.head(hidden, segments)
        return self.head(hidden, self.word_weight)


class Encoder(Embedded, Stack):
    """Text or an image in, a hidden state for every place out; all of a row sees all of it, unless it is `causal`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = TextEmbedding(config) if config.patches is None else PatchEmbedding(config, config.patches)
        self.head = make_head(config)

    def forward(
        self,
        inputs: Tensor,
        *,
        types: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        routes: list[Routing] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, width].

        Args:
            inputs: token ids, int64 [B, T], or pixels, [B, channels, height, width].
            types: int64 [B, T], the kind of each token; all 0 by default.
            positions: int64 [B, T]; by default 0, 1, ...
            segments: int32 [B, T], the document of each token of a packed row, 0 for padding.
            routes, hidden: see `Stack.run`.

        Raises DanluError where the input is longer than the model's context, or an image of another size.
        """
        if isinstance(self.embedding, PatchEmbedding):
            x = self.embedding(inputs)
            places = self._image_places(x)
        else:
            places, _ = self._places(inputs, positions, None)
            x = self.embedding(inputs, places, types)
        return self.run(x, Batch(places, segments), routes=routes, hidden=hidden)

    def _image_places(self, x: Tensor) -> Tensor:
        assert isinstance(self.embedding, PatchEmbedding)
        if getattr(self.config.positions, "axes", 1) == 2:
            return self.embedding.places(len(x), x.device)
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])

    def logits(self, hidden: Tensor, segments: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """What the head makes of hidden states [B, T, width]; see `danlu.model.head`."""
        assert self.head is not None, "a stack without a head has no logits"
        if isinstance(self.head, LabelHead):
            return self.head(hidden, segments, tokens)
        return self.head(hidden, self.word_weight)


class EncoderDecoder(Embedded):
    """A stack that reads and one that writes; both share one embedding."""

    embedding: TextEmbedding

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TextEmbedding(config.decoder)
        self.encoder = Stack(config.encoder)
        self.decoder = Stack(config.decoder)
        self.head = make_head(config.decoder)

    def encode(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        routes: list[Routing] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Token ids int64 [B, S] -> [B, S, width]. For the other arguments see `Encoder.forward`."""
        places, _ = self.encoder._places(tokens, positions, None)
        x = self.embedding(tokens, places)
        return self.encoder.run(x, Batch(places, segments), routes=routes, hidden=hidden)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        memory_segments: Tensor | None = None,
        cache: Cache | None = None,
        routes: list[Routing] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of what is written, [B, T, width].

        Args:
            tokens: int64 [B, T], what is written so far; it begins with the id `config.start`.
            memory: [B, S, width], from `encode`.
            memory_segments: int32 [B, S], the encoder's.
            positions, segments, cache, routes, hidden: see `Decoder.forward`.
        """
        places, keys = self.decoder._places(tokens, positions, cache)
        x = self.embedding(tokens, places)
        see_memory = cross_sight(places, segments, memory_segments)
        return self.decoder.run(
            x,
            Batch(places, segments, keys=keys),
            cache=cache,
            memory=memory,
            see_memory=see_memory,
            routes=routes,
            hidden=hidden,
        )

    def forward(
        self,
        tokens: Tensor,
        written: Tensor,
        *,
        segments: Tensor | None = None,
        written_segments: Tensor | None = None,
        routes: list[Routing] | None = None,
    ) -> Tensor:
        """Hidden states of what is written, [B, T, width], from ids int64 [B, S] that are read."""
        memory = self.encode(tokens, segments=segments, routes=routes)
        return self.decode(written, memory, segments=written_segments, memory_segments=segments, routes=routes)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]."""
        assert isinstance(self.head, WordHead)
        return self.head(hidden, self.word_weight)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of the decoder, for `batch` rows of at most `length` tokens."""
        return self.decoder.new_cache(batch, length)


class EncoderPair(nn.Module):
    """A text's and an image's encoder, trained so that what belongs together lies close (CLIP, arXiv:2103.00020)."""

    def __init__(self, config: PairConfig) -> None:
        super().__init__()
        self.config = config
        self.text = Encoder(config.text)
        self.image = Encoder(config.image)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))

    def forward(self, tokens: Tensor, pixels: Tensor, segments: Tensor | None = None) -> Tensor:
        """How much each text resembles each image, [texts, images].

        Args: tokens: int64 [texts, T]; pixels: [images, channels, height, width]; segments: of the tokens, 0 = padding.
        """
        return self.logit_scale.exp() * self.embed_text(tokens, segments) @ self.embed_image(pixels).T

    def embed_text(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """[texts, T] -> vectors of length 1, [texts, features]."""
        return F.normalize(self.text.logits(self.text(tokens, segments=segments), segments, tokens), dim=-1)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """[images, channels, height, width] -> vectors of length 1, [images, features]."""
        return F.normalize(self.image.logits(self.image(pixels)), dim=-1)


Model = Decoder | Encoder | EncoderDecoder | EncoderPair


def make_model(config: ModelConfig | EncoderDecoderConfig | PairConfig) -> Model:
    """The body that a configuration describes, its weights random."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config)
    if isinstance(config, PairConfig):
        return EncoderPair(config)
    return Decoder(config) if config.causal and config.patches is None else Encoder(config)
