"""A model as a Hugging Face directory: config.json and safetensors, read lazily, written as transformers loads it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danlu.artifact import sync, write_json
from danlu.errors import DanluError
from danlu.model.config import ModelConfig
from danlu.model.families.family import Family, translate
from danlu.model.families.llama import COMPUTED, WEIGHTS, family_for, family_of
from danlu.model.stored import Stored, Weights
from danlu.model.transformer import Decoder
from danlu.tokenizer import Tokenizer, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What a directory is read from, beside the weights.
READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", INDEX),
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
SHARD = 5_000_000_000  # bytes, the size at which Hugging Face splits


def read_directory_config(path: Path) -> tuple[Family, ModelConfig]:
    """The family and configuration of a Hugging Face directory."""
    file = path / "config.json"
    hf = read_json(file)
    family = family_of(hf, file)
    return family, family.read(hf, file)


def files_read(path: Path) -> list[Path]:
    """Every file of a directory that decides what the model is."""
    return [path / name for name in READ if (path / name).is_file()] + weight_files(path)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory. Raises DanluError where there are none, or one of them is missing."""
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise DanluError("has no weight_map", where=path / INDEX)
        files = [path / name for name in sorted(set(listed.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise DanluError(f"lacks {file.name}, which {INDEX} lists", where=path, fix="download the rest")
        return files
    pickled = next((name for name in PICKLED if (path / name).is_file()), None)
    if pickled is not None:
        raise DanluError(
            f"has only {pickled}, a pickle; unpickling can run any program, so Danlu never does",
            where=path,
            fix="where you trust it, transformers' from_pretrained(...).save_pretrained(...) makes safetensors",
        )
    raise DanluError("has no model.safetensors", where=path, fix="download the weights too, or name another directory")


def stored_weights(path: Path, config: ModelConfig) -> Weights:
    """The weights in a directory, found from the files' headers alone.

    Raises DanluError where a file is damaged or cut short, or holds a tensor that has no place in the model.
    """
    names = {theirs: ours for ours, theirs in WEIGHTS.items()}
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        for name, shape in _header(file).items():
            ours = translate(name, names)
            if ours is None:
                if name.endswith(COMPUTED):
                    continue
                raise DanluError(f"the tensor {name} is not known", where=file)
            found[ours] = Stored(name, file, shape, partial(_read, file, name))
    if config.tied and "head.weight" in found:
        _drop_tied_head(found)
    return Weights(path, WEIGHTS, found)


def write_directory(model: Decoder, tokenizer: Tokenizer, path: Path, dtype: torch.dtype) -> None:
    """Fill an existing empty directory; see `danlu.model.checkpoint.save_checkpoint`."""
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = family_for(model.config).write(model.config)
    write_json(path / "config.json", {**config, **special, "torch_dtype": str(dtype).removeprefix("torch.")})
    first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stops = first + sorted(tokenizer.stop_ids - set(first))
    write_json(path / "generation_config.json", {**special, "eos_token_id": stops or None})
    tokenizer.save(path)
    _write_weights(model, path, dtype)


def _write_weights(model: Decoder, path: Path, dtype: torch.dtype) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for ours, weight in model.state_dict().items():
        name = translate(ours, WEIGHTS)
        if name is None:
            raise DanluError(f"Hugging Face has no name for the weight {ours}", fix="merge adapters before saving")
        size = weight.numel() * dtype.itemsize
        if sizes[-1] and sizes[-1] + size > SHARD:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = weight
        sizes[-1] += size
    listed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = path / (WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        made = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in shard.items()}
        save_file(made, file, metadata={"format": "pt"})
        sync(file)
        listed |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        write_json(path / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": listed})


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor. The library checks that header and data fit in the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            for name, part in parts.items():
                if part.get_dtype() not in DTYPES:
                    known = ", ".join(DTYPES)
                    what = f"{name} is stored as {part.get_dtype()}, which is not supported"
                    raise DanluError(what, where=file, fix=f"use a checkpoint in one of {known}")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise DanluError(f"is damaged or cut short: {error}", where=file, fix="download or save it again") from None


def _read(file: Path, name: str, dtype: torch.dtype) -> Tensor:
    # Opened for each tensor: an open file keeps every page that was read in memory, beside our own copy.
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).to(dtype, copy=True)


def _drop_tied_head(found: dict[str, Stored]) -> None:
    """Some files hold the embedding a second time as the head; it must be the same one."""
    head, embedding = found.pop("head.weight"), found["embedding.weight"]
    if not torch.equal(head.read(torch.float32), embedding.read(torch.float32)):
        what = f"tie_word_embeddings is true, but {head.name} differs from {embedding.name}"
        raise DanluError(what, where=head.file, fix="set tie_word_embeddings to false in config.json")
