"""One GGUF in llama.cpp: token ids in, token ids or losses out.

It speaks to llama-cpp-python's low-level interface, so that nothing but llama.cpp itself costs time per token, and
imports neither torch nor anything else large: the process that is measured is the process that would run on a device.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from danlu.console import warn
from danlu.device.cores import usable_cores
from danlu.device.hugepages import huge_pages
from danlu.errors import DanluError, need_extra

BATCH = 512  # tokens of one prefill step, llama.cpp's own default
SCORED = 64  # positions of one step whose logits are kept: 12.6 MB for a vocabulary of 49,152
IGNORED = -100  # a target that is not scored
CACHES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # number formats of keys and values
WARNING, ERROR = 3, 4  # enum ggml_log_level
RANDOM_SEED = 0xFFFFFFFF  # llama.cpp takes this one as the wish for a random one

CLOSED = "the engine is closed"

_said: deque[str] = deque(maxlen=400)  # llama.cpp's warnings and errors; it has one log for the whole process


@cache
def library() -> ModuleType:
    """llama_cpp, loaded once, with its log kept in memory instead of on the terminal.

    Raises DanluError where the package is missing or its shared library does not load.
    """
    try:
        import llama_cpp
    except ImportError:
        raise need_extra("llama-cpp-python", "device") from None
    except (OSError, RuntimeError) as broken:
        raise DanluError(
            f"llama-cpp-python is installed but does not load: {broken}",
            fix="pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python",
        ) from None
    llama_cpp.llama_log_set(_listener(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache  # the C callback must live as long as the library may call it
def _listener(api: ModuleType) -> Any:
    def listen(level: int, text: bytes, _data: object) -> None:
        if level in (WARNING, ERROR) and text.strip():
            _said.append(text.decode(errors="replace").strip())

    return api.llama_log_callback(listen)


def last_words() -> str:
    """What llama.cpp warned or complained of since the last call."""
    words = "; ".join(_said)
    _said.clear()
    return words


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see Engine.generate."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float


GREEDY = Sampling(0.0, 1.0, 0, 0.0, 0, 1.0, 0.0, 0.0)


class Engine:
    """One loaded GGUF. One generation at a time; llama.cpp works outside the GIL.

    Args:
        path: the GGUF file.
        context: tokens of prompt and answer together; lowered, with a warning, to what the model was trained for.
        threads: computing threads; by default every physical core this process may use.
        exact: float32 key/value cache and no flash attention, to compare tokens with another implementation.
        cache: the number format of keys and values, one of CACHES; `exact` goes before it.
        mapped: weights are read where they lie in the file's pages: soon ready, however large, and a tenth slower to
            decode. For an original that others are compared with.

    Attributes:
        context, threads, vocab_size: as in force.
        weight_bytes: bytes of all tensors.
        description: llama.cpp's own, such as "llama 256M Q4_0".

    Raises DanluError where the file is missing, cut short, of an unknown architecture, or no generating model.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        exact: bool = False,
        cache: str = CACHES[0],
        mapped: bool = False,
    ) -> None:
        if cache not in CACHES:
            raise DanluError(f"keys and values cannot be held as {cache}", fix=f"known: {', '.join(CACHES)}")
        self.path, self.exact, self.threads, self.cache = Path(path), exact, threads or usable_cores(), cache
        self._api, self._mapped = library(), mapped or exact
        self._model: Any = None
        self._native: Any = None  # llama.cpp's context
        self._batch: _Batch | None = None
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache
        self._turn = 0  # the latest user of the cache; a generation that is not the latest must not go on in it
        try:
            with nullcontext() if mapped else huge_pages():
                self._model = self._load()
                self.context = self._possible_context(context)
                self._native = self._new_context(self.context, sequences=1, outputs=SCORED)
            self._vocab = self._api.llama_model_get_vocab(self._model)
            self.vocab_size = int(self._api.llama_vocab_n_tokens(self._vocab))
            self._memory = self._api.llama_get_memory(self._native)
            if not self._memory or not self.vocab_size:
                raise DanluError("this GGUF is no generating language model", where=path)
            self._batch = _Batch(self._api, BATCH)
        except BaseException:
            self.close()
            raise
        self.weight_bytes = int(self._api.llama_model_size(self._model))
        text = ctypes.create_string_buffer(256)
        self._api.llama_model_desc(self._model, text, len(text))
        self.description = text.value.decode(errors="replace")

    # Text

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The engine's own tokenisation, without bos; `special` reads text such as <|im_start|> as one token."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            ids = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int], special: bool = False) -> bytes:
        """The bytes of the tokens one after the other; control tokens such as <|im_end|> only where `special`."""
        return b"".join(self._piece(token, special) for token in ids)

    def _piece(self, token: int, special: bool) -> bytes:
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._api.llama_token_to_piece(self._vocab, token, text, room, 0, special)
            if count >= 0:
                return text.raw[:count]
            room = -count

    # Generation

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
    ) -> Iterator[int]:
        """Yield new token ids. A stop id ends the generation and is not yielded; a full context ends it too.

        What the prompt shares with the tokens already in the cache is not computed again. Temperature 0 is greedy;
        otherwise the order is Hugging Face's: penalties (over generated tokens only), temperature, top-k, top-p,
        min-p, and a draw seeded by `seed`.

        Raises DanluError, at the call, where the prompt is empty or leaves no room in the context.
        """
        self._check_room(len(prompt), 1)
        sampling = Sampling(
            temperature, top_p, top_k, min_p, seed, repetition_penalty, frequency_penalty, presence_penalty
        )
        self._turn += 1
        count = min(max_new_tokens, self.context - len(prompt))
        return self._generate(list(prompt), count, stop_ids, sampling, self._turn)

    def _generate(
        self, prompt: list[int], count: int, stop_ids: frozenset[int], sampling: Sampling, turn: int
    ) -> Iterator[int]:
        api, native = self._api, self._native
        one = (api.llama_token * 1)()
        step = api.llama_batch_get_one(one, 1)  # points at `one`: the loop allocates nothing
        with self._sampler(sampling) as sampler:
            for number in range(count):
                if turn != self._turn:
                    raise RuntimeError("another call has used this engine's cache since; start the generation again")
                if number == 0:
                    self._read(prompt)
                else:
                    self._compute(native, step)
                    self._cached.append(one[0])
                token = one[0] = api.llama_sampler_sample(sampler, native, -1)
                if token in stop_ids:
                    return
                yield token

    def latest_logits(self) -> np.ndarray:
        """Logits that the newest token of the generation under way was chosen from, float32 [vocab], a copy."""
        return self._logits(self._native, 1)[0].copy()

    def clear(self) -> None:
        """Forget the tokens in the cache; a generation under way cannot go on."""
        self._turn += 1
        self._cached.clear()
        self._api.llama_memory_clear(self._memory, False)

    def choosing_times(self, tokens: Sequence[int]) -> list[float]:
        """Seconds that choosing the likeliest word takes after each of some tokens, computed one by one, anew."""
        self.clear()
        one = (self._api.llama_token * 1)()
        step = self._api.llama_batch_get_one(one, 1)
        times = []
        with self._sampler(GREEDY) as sampler:
            for token in tokens:
                one[0] = token
                self._compute(self._native, step)
                self._cached.append(token)
                started = time.perf_counter()
                self._api.llama_sampler_sample(sampler, self._native, -1)
                times.append(time.perf_counter() - started)
        return times

    @contextmanager
    def _sampler(self, sampling: Sampling) -> Iterator[Any]:
        """llama.cpp's sampler chain; the chain owns its parts."""
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if penalties != (1.0, 0.0, 0.0):
            api.llama_sampler_chain_add(
                chain, api.llama_sampler_init_penalties(self.vocab_size, self.context, *penalties)
            )
        if sampling.temperature <= 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        else:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(sampling.temperature))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(sampling.top_k))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(sampling.top_p, 1))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_min_p(sampling.min_p, 1))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(sampling.seed % RANDOM_SEED))
        try:
            yield chain
        finally:
            api.llama_sampler_free(chain)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Greedy answers to several prompts at once: the weights are read once a step for all of them.

        It works in a cache of its own, made for the call. Stop ids are not part of the answers.

        Raises DanluError where a prompt and its answer do not fit in the context.
        """
        if not prompts:
            return []
        for prompt in prompts:
            self._check_room(len(prompt), max_new_tokens)
        length = max(len(prompt) for prompt in prompts) + max_new_tokens
        native = self._new_context(length * len(prompts), sequences=len(prompts), outputs=len(prompts))
        batch = _Batch(self._api, max(BATCH, len(prompts)))
        try:
            newest = [self._first(native, batch, row, prompt) for row, prompt in enumerate(prompts)]
            answers: list[list[int]] = [[] for _ in prompts]
            for _ in range(max_new_tokens):
                live = [row for row, token in enumerate(newest) if token not in stop_ids]
                for row in live:
                    answers[row].append(newest[row])
                live = [row for row in live if len(answers[row]) < max_new_tokens]
                if not live:
                    break
                positions = [len(prompts[row]) + len(answers[row]) - 1 for row in live]
                batch.fill([newest[row] for row in live], positions, live, True)
                self._compute(native, batch.native)
                for row, token in zip(live, self._logits(native, len(live)).argmax(axis=1).tolist(), strict=True):
                    newest[row] = token
            return answers
        finally:
            batch.free()
            self._api.llama_free(native)

    def _first(self, native: Any, batch: _Batch, row: int, prompt: Sequence[int]) -> int:
        """Read a prompt into sequence `row`; its most likely next token."""
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            positions = np.arange(start, start + len(part))
            batch.fill(part, positions, row, positions == len(prompt) - 1)
            self._compute(native, batch.native)
        return int(self._logits(native, 1)[0].argmax())

    # Scoring

    def token_losses(self, tokens: Sequence[int], targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy of each wanted next token, in nat, and whether it was the most likely one.

        Args:
            tokens: one document, T ids.
            targets: T ids, `targets[i]` the token that follows `tokens[i]`; -100 is not scored.

        Returns: loss float32 [T] and correct bool [T], both 0 where the target is -100.

        Raises DanluError where the document is longer than the context.
        """
        ids, following = np.asarray(tokens, np.int32), np.asarray(targets, np.int32)
        wanted = following != IGNORED
        if ids.shape != following.shape or ((following < 0) | (following >= self.vocab_size))[wanted].any():
            raise ValueError(f"targets must be as many as tokens, and ids below {self.vocab_size} or {IGNORED}")
        loss, correct = np.zeros(ids.size, np.float32), np.zeros(ids.size, bool)
        for positions, logits in self.scored(ids, wanted):
            loss[positions], correct[positions] = cross_entropy(logits, following[positions])
        return loss, correct

    def likeliest(self, tokens: Sequence[int], count: int) -> list[int]:
        """The most likely token after each of the last `count` tokens, the ones before it given; computed in one step.

        What the tokens share with those already in the cache is not computed again. Raises DanluError where they do
        not fit in the context.
        """
        self._check_room(len(tokens), 0)
        ids = np.asarray(tokens, np.int32)
        parts = self.scored(ids, np.arange(ids.size) >= ids.size - count)
        return [int(token) for _, logits in parts for token in logits.argmax(axis=1)]

    def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of the token after `tokens`, float32 [vocab]."""
        self._check_room(len(tokens), 0)
        ids = np.asarray(tokens, np.int32)
        [(_, logits)] = self.scored(ids, np.arange(ids.size) == ids.size - 1)
        return logits[0].copy()

    def scored(self, ids: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The wanted positions of one document, a step at a time, with their logits (valid until the next step).

        What the document shares with the tokens already in the cache, say a system prompt, is not computed again.
        """
        if self._batch is None:
            raise RuntimeError(CLOSED)
        if ids.size > self.context:
            raise DanluError(f"the document has {ids.size:,} tokens, the context {self.context:,}", where=self.path)
        if not wanted.any():
            return
        first = int(wanted.argmax())  # its logits are needed, so it is computed in any case
        kept = self._cut(min(common_prefix(self._cached, ids), first))
        self._turn += 1
        for start, stop in steps(wanted, kept):
            positions = np.arange(start, stop)
            self._batch.fill(ids[start:stop], positions, 0, wanted[start:stop])
            self._compute(self._native, self._batch.native)
            self._cached += ids[start:stop].tolist()
            chosen = positions[wanted[start:stop]]
            if chosen.size:
                yield chosen, self._logits(self._native, chosen.size)

    # llama.cpp

    def _load(self) -> Any:
        if not self.path.is_file():
            raise DanluError("there is no such file", where=self.path)
        asked = self._api.llama_model_default_params()
        if not self._mapped:  # llama.cpp repacks some formats; mapped, the file's own pages would stay beside the copy
            asked.load_mode = self._api.LLAMA_LOAD_MODE_NONE
        last_words()
        model = self._api.llama_model_load_from_file(os.fsencode(self.path), asked)
        if not model:
            raise DanluError(
                f"llama.cpp cannot load this GGUF: {last_words() or 'it gives no reason'}",
                where=self.path,
                fix="export or download it again; a new architecture may need a newer llama-cpp-python",
            )
        return model

    def _possible_context(self, asked: int) -> int:
        trained = int(self._api.llama_model_n_ctx_train(self._model))
        if asked > trained:
            warn(f"{self.path.name} was trained for {trained:,} tokens; the context is that, not {asked:,}")
        return min(asked, trained)

    def _new_context(self, length: int, *, sequences: int, outputs: int) -> Any:
        """A llama.cpp context for `length` tokens in all, keeping the logits of at most `outputs` positions a step."""
        api = self._api
        asked = api.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = length, sequences
        asked.n_batch = asked.n_ubatch = max(BATCH, sequences)
        asked.n_outputs_max = outputs  # left alone, llama.cpp reserves logits for the whole batch: 98 MB instead of 26
        asked.n_threads = asked.n_threads_batch = self.threads
        if self.exact:
            asked.type_k = asked.type_v = api.GGML_TYPE_F32
            asked.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif self.cache != CACHES[0]:
            asked.type_k = asked.type_v = getattr(api, f"GGML_TYPE_{self.cache.upper()}")
            asked.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED  # nothing else reads packed values
        last_words()
        native = api.llama_init_from_model(self._model, asked)
        if not native:
            raise DanluError(
                f"llama.cpp cannot make a context of {length:,} tokens: {last_words()}",
                where=self.path,
                fix="ask for a shorter context",
            )
        return native

    def _check_room(self, prompt: int, answer: int) -> None:
        if self._native is None:
            raise RuntimeError(CLOSED)
        if not prompt:
            raise DanluError("the prompt is empty", where=self.path)
        if prompt + answer > self.context:
            raise DanluError(
                f"a prompt of {prompt:,} tokens and {answer:,} more do not fit in the context of {self.context:,}",
                where=self.path,
                fix="shorten the prompt, or load the model with a longer context",
            )

    def _read(self, prompt: list[int]) -> None:
        """Bring the cache to hold exactly `prompt`; the logits after its last token are ready then."""
        kept = self._cut(min(common_prefix(self._cached, prompt), len(prompt) - 1))
        for start in range(kept, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            ids = (self._api.llama_token * len(part))(*part)
            self._compute(self._native, self._api.llama_batch_get_one(ids, len(part)))
            self._cached += part

    def _cut(self, length: int) -> int:
        """Drop from the cache all but its first `length` tokens; how many are left."""
        if not self._api.llama_memory_seq_rm(self._memory, 0, length, -1):
            length = 0  # a recurrent state cannot forget its end alone
            self._api.llama_memory_clear(self._memory, False)
        del self._cached[length:]
        return length

    def _compute(self, native: Any, batch: Any) -> None:
        code = self._api.llama_decode(native, batch)
        if code:
            self.clear()
            raise DanluError(f"llama.cpp failed with code {code}: {last_words()}", where=self.path)

    def _logits(self, native: Any, rows: int) -> np.ndarray:
        """Logits of the last step, float32 [rows, vocab]: llama.cpp's own memory, overwritten by the next step."""
        return np.ctypeslib.as_array(self._api.llama_get_logits(native), (rows, self.vocab_size))

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        self._turn += 1
        if self._batch is not None:
            self._batch.free()
        if self._native:
            self._api.llama_free(self._native)
        if self._model:
            self._api.llama_model_free(self._model)
        self._batch = self._native = self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batch:
    """llama.cpp's batch of at most `size` tokens, its arrays seen as numpy's."""

    def __init__(self, api: ModuleType, size: int) -> None:
        self._api = api
        self.native = api.llama_batch_init(size, 0, 1)
        self._token = np.ctypeslib.as_array(self.native.token, (size,))
        self._position = np.ctypeslib.as_array(self.native.pos, (size,))
        self._wanted = np.ctypeslib.as_array(self.native.logits, (size,))
        self._sequence = [self.native.seq_id[number] for number in range(size)]
        np.ctypeslib.as_array(self.native.n_seq_id, (size,))[:] = 1

    def fill(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        sequences: int | Sequence[int],
        wanted: bool | np.ndarray,
    ) -> None:
        """Set the next step's tokens, their places, their sequences, and whether their logits are wanted."""
        count = self.native.n_tokens = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = positions
        self._wanted[:count] = wanted
        for number in range(count):
            self._sequence[number][0] = sequences if isinstance(sequences, int) else sequences[number]

    def free(self) -> None:
        self._api.llama_batch_free(self.native)


def steps(wanted: np.ndarray, start: int = 0) -> Iterator[tuple[int, int]]:
    """Cut a document, to its last wanted position, into steps of at most BATCH tokens and SCORED wanted ones."""
    end = int(np.flatnonzero(wanted)[-1]) + 1 if wanted.any() else start
    while start < end:
        counts = np.cumsum(wanted[start : min(start + BATCH, end)])
        stop = start + int(np.searchsorted(counts, SCORED, side="right"))
        yield start, stop
        start = stop


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nat, float32 [N], and whether the target is the most likely token, bool [N], from logits [N, vocab]."""
    rows = np.arange(targets.size)
    best = logits.argmax(axis=1)
    peak = logits[rows, best]
    spread = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
    return (np.log(spread) + peak - logits[rows, targets]).astype(np.float32), best == targets


def common_prefix(left: Sequence[int], right: Sequence[int] | np.ndarray) -> int:
    """How many leading items two sequences share."""
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return number
    return min(len(left), len(right))
