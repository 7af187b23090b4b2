"""LoRA adapters in the layout of Hugging Face's PEFT library, so that other tools can load them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from danlu.artifact import write_json
from danlu.model.families.known import family_for
from danlu.model.lora import adapters
from danlu.model.transformer import Model


def save_adapter(model: Model, out: Path, *, rank: int, alpha: float, dropout: float, base: str) -> None:
    """Write adapter_model.safetensors (fp32) and adapter_config.json into `out`.

    Args:
        model: a model with adapters, not merged.
        base: the name of the checkpoint they belong to, for whoever loads them.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    names = family_for(model.config).names
    for name, adapter in adapters(model):
        theirs = names.theirs(f"{name}.weight")
        assert theirs is not None, name
        layer = theirs.removesuffix(".weight")
        layers.append(layer)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = adapter.lora_down.detach().contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = adapter.lora_up.detach().contiguous()
    aside = out / ".adapter_model.aside"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(out / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(out / "adapter_config.json", settings)
