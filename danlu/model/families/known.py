"""All families, and which of them a configuration belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.errors import DanluError, one_of
from danlu.model.config import AnyConfig
from danlu.model.families.bert import BERT, ROBERTA
from danlu.model.families.clip import CLIP
from danlu.model.families.family import Family
from danlu.model.families.gemma import GEMMA3
from danlu.model.families.gpt2 import GPT2
from danlu.model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from danlu.model.families.mixtral import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from danlu.model.families.t5 import FLAN_T5, SWITCH, T5
from danlu.model.families.vit import VIT

FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GPT2, MIXTRAL, QWEN2_MOE, QWEN3_MOE),
    *(*BERT, *ROBERTA, T5, FLAN_T5, SWITCH, *VIT, CLIP),
)


def family_of(hf: Mapping[str, Any], where: Path | None = None) -> Family:
    """The family a config.json belongs to; DanluError naming the known ones where it is none of them."""
    stated = hf.get("architectures") or []
    for family in FAMILIES:
        named = family.architecture in stated or (not stated and family.model_type == hf.get("model_type"))
        if named and family.accepts(hf):
            return family
    asked = ", ".join(stated) or hf.get("model_type") or "none named"
    known = [family.architecture for family in FAMILIES]
    raise DanluError(f"the architecture {asked} is not known", where=where, fix=one_of(asked, known))


def family_for(config: AnyConfig) -> Family:
    """The first family in which a configuration can be written without loss."""
    for family in FAMILIES:
        if family.expresses(config):
            return family
    names = ", ".join(family.architecture for family in FAMILIES)
    raise DanluError(f"no known architecture computes this: {config}", fix=f"known: {names}")
