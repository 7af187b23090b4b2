"""The model that a task trains: its shape, and the weights it takes over from a base with another head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from danlu.console import say
from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.config import AnyConfig, EncoderDecoderConfig, ModelConfig, Relative
from danlu.model.families.family import Family
from danlu.model.families.known import FAMILIES, family_of
from danlu.model.initialize import mup_config
from danlu.model.scales import check_scales
from danlu.model.stored import Make, stacks
from danlu.model.transformer import Model
from danlu.tokenizer import Tokenizer
from danlu.train.recipe import TrainRecipe

# How Hugging Face's architectures with such a head are called after their family.
ENDINGS = {
    "sequence": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "embedding": "Model",
}
HEAD = "head."


class Shaping(Protocol):
    """What of a task decides the shape of its model; see `danlu.train.tasks.task.Task`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def keys(self) -> dict[str, Any]: ...

    @property
    def head(self) -> str: ...

    @property
    def length(self) -> int: ...


def model_config(settings: TrainRecipe, task: Shaping) -> AnyConfig:
    """The shape of the model that learns.

    Raises DanluError where the architecture has another head than the task needs, the base lacks words, or the model
    could not be saved.
    """
    config = plain_config(settings, task)
    if settings.model.start != "mup" or settings.model.base is not None:
        return config
    scaled = mup_config(config)
    check_scales(exported(config), scaled)
    return scaled


def plain_config(settings: TrainRecipe, task: Shaping) -> AnyConfig:
    """The same without muP's scales, which Hugging Face has no words for. Errors: see `model_config`."""
    chosen = settings.model
    if chosen.base is not None:
        config = _with_head(StoredModel.open(chosen.base), task)
    else:
        keys = {**task.keys, **chosen.shape, "architectures": [chosen.architecture]}
        config = family_of(keys, Path("model.architecture")).config(keys, Path("model.shape"))
    _check(config, task, settings)
    if isinstance(config, ModelConfig):
        return with_dropout(settings, config)
    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder = (with_dropout(settings, stack) for stack in (config.encoder, config.decoder))
        return replace(config, encoder=encoder, decoder=decoder)
    return config


def exported(config: AnyConfig) -> AnyConfig:
    """The same shape as it is written: without what only training hides where Hugging Face has no words for that."""
    if any(family.expresses(config) for family in FAMILIES):
        return config
    if isinstance(config, EncoderDecoderConfig):
        return replace(config, encoder=_without_dropout(config.encoder), decoder=_without_dropout(config.decoder))
    return _without_dropout(config) if isinstance(config, ModelConfig) else config


def take_over(model: Model, base: StoredModel) -> dict[str, Make]:
    """What reads the weights that a model takes from a base; what its head lacks there stays new, and is said."""
    given = base.makers()
    own = model.state_dict()
    kept = {name for name in own if name in given and not _differs(name, model.config, base.config)}
    new, left = sorted(set(own) - kept), sorted(set(given) - kept)
    if new or left:
        say(f"train: of {base.path}: new are {', '.join(new) or 'none'}; left out are {', '.join(left) or 'none'}")
    return {name: given[name] for name in sorted(kept)}


def _differs(name: str, config: AnyConfig, base: AnyConfig) -> bool:
    """Whether a weight is one of the head and does another work here than in the base."""
    if not (name.startswith(HEAD) and isinstance(config, ModelConfig) and isinstance(base, ModelConfig)):
        return False
    ours, theirs = config.head, base.head
    assert ours is not None and theirs is not None, "both have weights of that name"
    before = (ours.pool, ours.dense, ours.norm) != (theirs.pool, theirs.dense, theirs.norm)
    return before or (name.startswith(f"{HEAD}output") and (ours.task, ours.labels) != (theirs.task, theirs.labels))


def _with_head(base: StoredModel, task: Shaping) -> AnyConfig:
    """The base's shape with the head that the task needs."""
    config = base.config
    if not isinstance(config, ModelConfig) or task.head == "words":
        return config
    family = _sibling(base.family, task.head, base.path)
    written = base.family.file(config)
    labels = ("id2label", "label2id", "num_labels")
    keys = {name: value for name, value in written.items() if name not in labels}
    new = {name: value for name, value in task.keys.items() if name in labels}
    return family.config({**keys, **new, "architectures": [family.architecture]}, base.path)


def _sibling(family: Family, head: str, where: Path) -> Family:
    """The architecture of the same family with a head."""
    kin = [one for one in FAMILIES if one.model_type == family.model_type]
    found = next((one for one in kin if one.architecture.endswith(ENDINGS[head])), None)
    if found is None:
        what = f"no architecture of {family.model_type} here has a head for this objective"
        raise DanluError(what, where=where, fix="take a base of the family bert or roberta")
    return found


def _check(config: AnyConfig, task: Shaping, settings: TrainRecipe) -> None:
    kind = settings.objective.kind
    two = kind in ("spans", "sequence_to_sequence")
    if two != isinstance(config, EncoderDecoderConfig):
        body = "a stack that reads and one that writes" if two else "one stack"
        fix = "take T5ForConditionalGeneration" if two else f"take another than {settings.model.architecture}"
        raise DanluError(f"{kind} needs a model of {body}", where="model", fix=fix)
    if isinstance(config, ModelConfig) and (config.head is None or config.head.task != task.head):
        ending = ENDINGS.get(task.head, "ForMaskedLM or ForCausalLM")
        raise DanluError(f"{kind} needs a model with a head of {task.head}", where="model", fix=f"one of ...{ending}")
    _check_windows(config, settings)
    stack = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    if isinstance(stack, ModelConfig) and task.tokenizer.vocab_size > stack.vocab_size:
        what = f"the vocabulary has {task.tokenizer.vocab_size:,} tokens, and the model words for {stack.vocab_size:,}"
        raise DanluError(what, where="data.vocabulary", fix="use the base's own: {kind: from, base: THE BASE}")


def _check_windows(config: AnyConfig, settings: TrainRecipe) -> None:
    """Of text alone a length is set that all rows have; those with labels may be shorter than their limit."""
    if isinstance(settings.data, RowsSettings):
        return
    batch = settings.batch
    named = [("batch.window", batch.window), *(("batch.growing", window) for _, window in batch.growing)]
    for stack in stacks(config):
        for name, window in named:
            if window > stack.context and not isinstance(stack.positions, Relative):
                what = f"windows of {window} tokens are longer than the model's context of {stack.context}"
                raise DanluError(what, where=name, fix="lower it, or give the model a longer context")


def with_dropout(settings: TrainRecipe, config: ModelConfig) -> ModelConfig:
    """The same shape with what a recipe hides while it learns."""
    labels = config.head is not None and config.head.task != "words"
    head = settings.dropout if labels else config.head_dropout
    return replace(
        config, dropout=settings.dropout, attention_dropout=0.0, head_dropout=head, drop_path=settings.drop_path
    )


def _without_dropout(config: ModelConfig) -> ModelConfig:
    return replace(config, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
