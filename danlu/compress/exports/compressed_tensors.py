"""A model of few bits as a Hugging Face directory that transformers and vLLM load: compressed-tensors' metadata.

The rounding is our own (errors made up for on a text), the container theirs; Danlu reads it too, with its products as
weights (`danlu.model.compressed`), so that the next command takes the directory like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from danlu.artifact import Figures, figure, sync, write_json
from danlu.compress.exports.linear import WORDS, Few, draw_rows, round_layers
from danlu.compress.quantizing.formats.grouped import FLOAT8, Grouped
from danlu.console import progress, say
from danlu.errors import DanluError, one_of
from danlu.model.checkpoint import StoredModel
from danlu.model.compressed import METHOD, PACKED, SCALE, SHAPE, pack
from danlu.model.config import ModelConfig
from danlu.model.directory import INDEX, WHOLE
from danlu.model.families.known import family_for
from danlu.model.names import Names
from danlu.model.stored import without_memory
from danlu.tokenizer import Tokenizer

SHARD = 1_000_000_000  # bytes of a file, which is put together in memory
GROUPS = (128, 64, 32)  # columns that share a step, of those that fast kernels know
# In all-MiniLM-L6-v2, rounded to 4 bits alone, these two cost 0.010 and 0.013 of cosine, all others together 0.009.
FINER = ("value", "up")
EMBEDDING = "word_embeddings"  # what families of encoders call it
# Of a sentence encoder: how hidden states become one vector.
BESIDE = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass(frozen=True)
class Scheme:
    """How a type stores what linear layers multiply by.

    Attributes:
        form: of their matrices.
        words: of an encoder's embedding of words, which is half of it; a decoder's stays in 16 bits, as vLLM expects.
        finer: of an encoder's layers that lose most when they are rounded, `FINER`; None for the others' form.
        inputs: theirs are rounded too while the model runs, token by token, to numbers of the same kind.
    """

    form: Grouped
    words: Grouped
    finer: Grouped | None = None
    inputs: bool = False

    def form_of(self, name: str, causal: bool) -> Grouped:
        """A linear layer's, by the name of its weight."""
        finer = self.finer is not None and not causal and name.split(".")[-2] in FINER
        return self.finer if finer and self.finer is not None else self.form

    @property
    def format(self) -> str:
        """compressed-tensors' name of how linear layers lie in a file."""
        if self.form.floating:
            return "float-quantized"
        return "int-quantized" if self.inputs else "pack-quantized"

    @property
    def words_format(self) -> str:
        """The same of words: one a byte where they fill it, as transformers starts embeddings only with a weight."""
        return "int-quantized" if self.words.bits == 8 else "pack-quantized"


SCHEMES = {
    "w8a16": Scheme(Grouped(8, None), Grouped(8, None)),
    "w4a16": Scheme(Grouped(4, 128), Grouped(6, None), Grouped(8, None)),
    "w4a16-g32": Scheme(Grouped(4, 32), Grouped(6, None), Grouped(8, None)),
    "w8a8": Scheme(Grouped(8, None), Grouped(8, None), inputs=True),
    "fp8": Scheme(Grouped(8, None, floating=True), Grouped(8, None), inputs=True),
}


def scheme_of(name: str) -> Scheme:
    """By name, in any case. Raises DanluError with the known names where there is none."""
    found = SCHEMES.get(name.lower())
    if found is None:
        what = f"{name} is no type of compressed-tensors that is written here"
        raise DanluError(what, where="--type", fix=one_of(name.lower(), list(SCHEMES)))
    return found


def write(
    stored: StoredModel, tokenizer: Tokenizer, scheme: Scheme, calibration: str, folder: Path, tokens: int
) -> Figures:
    """Fill an existing empty directory.

    Args:
        stored: a decoder, or an encoder of text, of a family whose layers are linear ones in transformers too.
        tokenizer: goes beside the weights.
        scheme: how it is stored.
        calibration: a text like what the model is for.
        folder: the directory.
        tokens: of the text, at most.

    Raises DanluError where the model has another shape, or the text is too short.
    """
    config, names = check(stored)
    rows = draw_rows(stored, tokenizer, calibration, tokens)
    makers = stored.makers(torch.float32)
    dtype = _dtype(config, makers)
    scheme = _fitted(scheme, dtype, config)
    shards, few, exact = _Shards(folder), dict[str, Grouped](), list[str]()
    with progress("round", config.layers, "blocks") as tick, torch.no_grad():
        words = None if config.causal else scheme.words
        weights = round_layers(config, makers, rows, lambda name: scheme.form_of(name, config.causal), words)
        for name, weight in weights:
            place = names.place(name)
            assert place is not None
            stem = place.name.removesuffix(".weight")
            if isinstance(weight, Few):
                few[stem] = weight.form
                shards.add(_tensors(stem, weight, scheme.words_format if name == WORDS else scheme.format))
            else:
                shards.add({place.name: place.put([weight]).to(dtype).contiguous()})
                exact += [stem] if weight.dim() == 2 else []
            if name.endswith("feedforward.down.weight"):
                tick.advance(1)
    size = shards.finish()
    said = _metadata(scheme, few, ignore=_linear(exact, config))
    _describe(stored, tokenizer, said, dtype, folder)
    return {
        "file_size": figure(size, "byte"),
        "matrices": figure(len(few), "matrices", by=f"of few bits; {len(exact)} stay in 16"),
        "calibration": figure(rows.numel(), "tokens"),
    }


def check(stored: StoredModel) -> tuple[ModelConfig, Names]:
    """The stack and its weights' names. Raises DanluError where compressed-tensors has no form for the model."""
    config, family = stored.config, stored.family
    where, fix = stored.path, "export it as GGUF or ONNX, or name a model like Llama, Qwen, Gemma or BERT"
    if not isinstance(config, ModelConfig) or config.patches is not None:
        raise DanluError(f"is a {family.architecture}; one stack that reads text is needed", where=where, fix=fix)
    if config.experts is not None:
        raise DanluError("has experts, whose weights are no linear layers in transformers", where=where, fix=fix)
    names = family_for(config).names if where.is_file() else family.names
    for name in without_memory(config).state_dict():
        place = names.place(name)
        if place is None or place.transposed or place.parts > 1:
            what = f"{name} is no linear layer of its own in transformers' {family.architecture}"
            raise DanluError(what, where=where, fix=fix)
    return config, names


def _dtype(config: ModelConfig, makers: Any) -> torch.dtype:
    """bf16 where it holds all vectors as they are, as of a model trained in it; else fp16, whose steps are finer."""
    vectors = [name for name, weight in without_memory(config).state_dict().items() if weight.dim() == 1]
    same = all(torch.equal(weight, weight.bfloat16().float()) for weight in (makers[name]() for name in vectors))
    return torch.bfloat16 if same else torch.float16


def _fitted(scheme: Scheme, dtype: torch.dtype, config: ModelConfig) -> Scheme:
    """The scheme for a model: steps of its dtype, in groups that all its matrices' rows can be cut into."""
    finer = None if scheme.finer is None else replace(scheme.finer, dtype=dtype)
    form = _fitting(replace(scheme.form, dtype=dtype), config)
    return replace(scheme, form=form, words=replace(scheme.words, dtype=dtype), finer=finer)


def _fitting(form: Grouped, config: ModelConfig) -> Grouped:
    """The format with the largest groups, no larger than its own, that all matrices' rows can be cut into."""
    if form.group is None:
        return form
    widths = {config.width, config.heads * config.head_width, config.feedforward_width}
    fits = [group for group in GROUPS if group <= form.group and not any(width % group for width in widths)]
    if not fits:
        what = f"rows of {', '.join(map(str, sorted(widths)))} numbers cannot be cut into groups of {GROUPS[-1]}"
        raise DanluError(what, where="--type", fix="take w8a16 or w8a8, where a whole row shares a step")
    if fits[0] != form.group:
        odd = ", ".join(str(width) for width in sorted(widths) if width % form.group)
        say(f"round: rows of {odd} numbers cannot be cut into groups of {form.group}; all are cut into {fits[0]}")
    return replace(form, group=fits[0])


def _tensors(stem: str, few: Few, stored: str) -> dict[str, Tensor]:
    """What a matrix of few bits is stored as."""
    scale = {stem + SCALE: few.steps.contiguous()}
    if few.form.floating:
        return {f"{stem}.weight": few.codes.view(FLOAT8), **scale}
    if stored == "int-quantized":
        return {f"{stem}.weight": (few.codes.int() - 2 ** (few.form.bits - 1)).to(torch.int8), **scale}
    return {stem + PACKED: pack(few.codes, few.form.bits), stem + SHAPE: torch.tensor(few.codes.shape), **scale}


def _linear(stems: list[str], config: ModelConfig) -> list[str]:
    """Linear layers of transformers that keep 16 bits: all matrices that do but embeddings; the head even if tied."""
    head = ["lm_head"] if config.causal else []
    return sorted({*head, *(stem for stem in stems if "embed" not in stem)})


def _metadata(scheme: Scheme, few: Mapping[str, Grouped], ignore: list[str]) -> dict[str, Any]:
    """quantization_config of config.json. Args: few: matrices of few bits, by the names of their layers."""
    inputs = {**_numbers(replace(scheme.form, group=None)), "strategy": "token", "dynamic": True}
    groups = [_group(["Linear"], scheme.form, inputs if scheme.inputs else None, scheme.format)]
    words = [name for name in few if name.endswith(EMBEDDING)]
    finer = [name for name, form in few.items() if form is scheme.finer]
    if finer and scheme.finer is not None:
        groups.append(_group(finer, scheme.finer, None, scheme.format))
    if words:
        groups.append(_group(words, scheme.words, None, scheme.words_format))
    formats = {group["format"] for group in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], form: Grouped, inputs: dict[str, Any] | None, stored: str) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": _numbers(form),
        "input_activations": inputs,
        "output_activations": None,
        "format": stored,
    }


def _numbers(form: Grouped) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "float" if form.floating else "int",
        "symmetric": True,
        "strategy": "channel" if form.group is None else "group",
        "group_size": form.group,
        "dynamic": False,
    }


def _describe(stored: StoredModel, tokenizer: Tokenizer, said: dict[str, Any], dtype: torch.dtype, out: Path) -> None:
    """config.json, the tokenizer, and what makes sentence vectors of hidden states."""
    family = family_for(stored.config) if stored.path.is_file() else stored.family
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    about = {"torch_dtype": str(dtype).removeprefix("torch."), "quantization_config": said}
    write_json(out / "config.json", {**special, **family.file(stored.config), **about})
    tokenizer.save(out)
    if isinstance(stored.config, ModelConfig) and stored.config.causal:
        stops = sorted(tokenizer.stop_ids) or None
        write_json(out / "generation_config.json", {**special, "eos_token_id": stops})
    if stored.path.is_dir():
        for file in _beside(stored.path):
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_bytes((stored.path / file).read_bytes())


def _beside(path: Path) -> Iterable[Path]:
    """Files of a sentence encoder, relative to its directory."""
    found = [path / name for name in BESIDE] + sorted(path.glob("*_Pooling/config.json"))
    return [file.relative_to(path) for file in found if file.is_file()]


class _Shards:
    """Safetensors files of at most `SHARD` bytes, each written when it is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Put what belongs together into one file."""
        self._held |= tensors
        if sum(tensor.nbytes for tensor in self._held.values()) > SHARD:
            self._flush()

    def finish(self) -> int:
        """Write what is left, and the index where there are several files. Returns the bytes of all of them."""
        self._flush()
        count, listed = len(self._written), dict[str, str]()
        for number, names in enumerate(self._written, 1):
            name = WHOLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._file(number).rename(self._folder / name)
            listed |= dict.fromkeys(names, name)
        if count > 1:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": listed})
        return sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))

    def _flush(self) -> None:
        if self._held:
            self._written.append(list(self._held))
            self._bytes += sum(tensor.nbytes for tensor in self._held.values())
            file = self._file(len(self._written))
            save_file({name: tensor.clone() for name, tensor in self._held.items()}, file, metadata={"format": "pt"})
            sync(file)
            self._held = {}

    def _file(self, number: int) -> Path:
        return self._folder / f"part-{number}"
