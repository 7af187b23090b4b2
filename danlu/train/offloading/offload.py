"""What a run keeps outside of memory, from its settings to its parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from danlu.errors import DanluError
from danlu.model.transformer import Block
from danlu.settings import Bytes, Settings
from danlu.train.groups import Group
from danlu.train.offloading.blocks import Host, offload_activations, read_ahead
from danlu.train.offloading.files import Files
from danlu.train.offloading.optimizer import FiledOptimizer
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings

FILED = ("optimizer", "parameters")  # states that lie in files


class OffloadSettings(Settings):
    """What lies outside of memory while it is not computed with."""

    state: Literal["none", "host", "optimizer", "parameters"] = Field(
        "none",
        description="host: weights, gradients and moments rest in the memory of an accelerator's host, and weights come"
        " to it block by block; optimizer: master weights, gradients and moments lie in files; parameters: so does all"
        " that the model computes with",
    )
    activations: Literal["none", "host", "files"] = Field(
        "none",
        description="where what blocks keep for the backward pass waits for it: with the rest, in the host's memory"
        " (for accelerators), or in files; with recompute these are the blocks' inputs alone",
    )
    pinned: Bytes | None = Field(
        None,
        description="the most pinned memory of an accelerator's host that a process takes for what rests there, as in"
        " 16GB; weights that are more rest in plain memory, and so do activations that find no room in it; default:"
        " half of the machine's memory, shared by its processes",
    )
    folder: Path | None = Field(
        None, description="for the files, on the machine's fastest disk; default: beside the run's checkpoints"
    )

    @property
    def needs_files(self) -> bool:
        return self.state in FILED or self.activations == "files"

    @property
    def needs_host(self) -> bool:
        """Whether an accelerator keeps something in its host's memory."""
        return self.state in ("host", "optimizer") or self.activations == "host"

    @model_validator(mode="after")
    def _pinned_is_used(self) -> OffloadSettings:
        if self.pinned is not None and not self.needs_host:
            raise ValueError("pinned has no effect where nothing is offloaded to an accelerator's host")
        return self

    @model_validator(mode="after")
    def _folder_is_used(self) -> OffloadSettings:
        if self.folder is not None and not self.needs_files:
            raise ValueError("folder has no effect where nothing is offloaded to files")
        return self


@dataclass(frozen=True)
class Offload:
    """Settings with the place they need. Losses, gradients and updates have the same bits as without, except that an
    accelerator's host rounds its updates in its own way.

    Attributes:
        files: None where nothing goes to files.
        device: that computes.
        host: its memory that an accelerator may pin.
    """

    settings: OffloadSettings
    files: Files | None
    device: torch.device
    host: Host

    @classmethod
    def start(cls, settings: OffloadSettings, folder: Path, device: torch.device | None = None) -> Offload:
        """Args: folder: where the settings name none; device: that computes, by default the CPU.

        Raises DanluError where the folder is not fit for it, or the host is the device.
        """
        device = device or torch.device("cpu")
        if device.type == "cpu" and "host" in (settings.state, settings.activations):
            fix = "choose files (offload.state optimizer or parameters, offload.activations files), or none"
            raise DanluError("the host computes, and has no other memory of its own", where="offload", fix=fix)
        files = Files(settings.folder or folder) if settings.needs_files else None
        share = psutil.virtual_memory().total // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(settings, files, device, Host(settings.pinned or share))

    def policy(self, held: int) -> OffloadPolicy:
        """Where FSDP lets weights, gradients and with them the optimizer's state rest.

        Args: held: bytes of weights that this process holds; their gradients are as many.
        """
        if self.device.type == "cpu" or self.settings.state == "none":
            return OffloadPolicy()
        if self.settings.state == "parameters":  # a mapped file is not pinned
            return CPUOffloadPolicy(pin_memory=False)
        return CPUOffloadPolicy(pin_memory=self.host.take(2 * held))

    def making_weights(self) -> AbstractContextManager[None]:
        """Inside, a model is made or loaded and laid out, from the first weight on where it is to stay."""
        return self._keeping(self.settings.state == "parameters")

    def making_state(self) -> AbstractContextManager[None]:
        """Inside, what goes with the optimizer is made: a running average of its weights."""
        return self._keeping(self.settings.state in FILED)

    def _keeping(self, wanted: bool) -> AbstractContextManager[None]:
        return self.files.keeping() if wanted and self.files is not None else nullcontext()

    def make_optimizer(
        self,
        masters: dict[str, Tensor],
        copies: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        groups: Mapping[str, Group] | None = None,
    ) -> Optimizer:
        """See `Optimizer`. Masters that the model does not compute with are moved to files.

        Raises DanluError where masters rest on an accelerator.
        """
        if self.settings.state != "none" and any(master.device.type != "cpu" for master in masters.values()):
            fix = "take a plan that lays weights out over processes (shard or data), or set offload.state to none"
            raise DanluError("the weights rest on the accelerator", where="offload.state", fix=fix)
        if self.settings.state not in FILED or self.files is None:
            return Optimizer(masters, copies, settings, groups)
        moved = {name: self.files.move(master) if name in copies else master for name, master in masters.items()}
        return FiledOptimizer(moved, copies, settings, groups, files=self.files)

    def follow(self, model: nn.Module) -> None:
        """Bring weights and activations of a model's blocks in when they are wanted. It is laid out and recomputes
        already.
        """
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if self.settings.activations != "none":
            away = self.host if self.files is None or self.settings.activations == "host" else self.files.move
            offload_activations(blocks, away)
        if self.settings.state == "parameters" and self.files is not None:
            read_ahead(model, blocks, self.files)
