"""What a run keeps outside of memory, from its settings to its parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from danlu.model.transformer import Block
from danlu.settings import Settings
from danlu.train.groups import Group
from danlu.train.offloading.blocks import offload_activations, read_ahead, to_host
from danlu.train.offloading.files import Files
from danlu.train.offloading.optimizer import FiledOptimizer
from danlu.train.optimizer import Optimizer
from danlu.train.optimizing.settings import OptimizerSettings


class OffloadSettings(Settings):
    """What lies outside of memory while it is not computed with."""

    state: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="optimizer: master weights, gradients and moments lie in files; parameters: so does all that the"
        " model computes with, block by block",
    )
    activations: Literal["none", "host", "files"] = Field(
        "none",
        description="where what blocks keep for the backward pass waits for it: with the rest, in the host's memory"
        " (for accelerators), or in files; with recompute these are the blocks' inputs alone",
    )
    folder: Path | None = Field(
        None, description="for the files, on the machine's fastest disk; default: beside the run's checkpoints"
    )

    @property
    def needs_files(self) -> bool:
        return self.state != "none" or self.activations == "files"

    @model_validator(mode="after")
    def _folder_is_used(self) -> OffloadSettings:
        if self.folder is not None and not self.needs_files:
            raise ValueError("folder has no effect where nothing is offloaded to files")
        return self


@dataclass(frozen=True)
class Offload:
    """Settings with the place they need. Losses, gradients and updates have the same bits as without.

    Attributes:
        files: None where nothing goes to files.
    """

    settings: OffloadSettings
    files: Files | None

    @classmethod
    def start(cls, settings: OffloadSettings, folder: Path) -> Offload:
        """Args: folder: where the settings name none. Raises DanluError where it is not fit for it."""
        return cls(settings, Files(settings.folder or folder) if settings.needs_files else None)

    def making_weights(self) -> AbstractContextManager[None]:
        """Inside, a model is made or loaded and laid out, from the first weight on where it is to stay."""
        return self._keeping(self.settings.state == "parameters")

    def making_state(self) -> AbstractContextManager[None]:
        """Inside, what goes with the optimizer is made: a running average of its weights."""
        return self._keeping(self.settings.state != "none")

    def _keeping(self, wanted: bool) -> AbstractContextManager[None]:
        return self.files.keeping() if wanted and self.files is not None else nullcontext()

    def make_optimizer(
        self,
        masters: dict[str, Tensor],
        copies: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        groups: Mapping[str, Group] | None = None,
    ) -> Optimizer:
        """See `Optimizer`. Masters that the model does not compute with are moved to files."""
        if self.settings.state == "none" or self.files is None:
            return Optimizer(masters, copies, settings, groups)
        moved = {name: self.files.move(master) if name in copies else master for name, master in masters.items()}
        return FiledOptimizer(moved, copies, settings, groups, files=self.files)

    def follow(self, model: nn.Module) -> None:
        """Bring weights and activations of a model's blocks in when they are wanted. It is laid out and recomputes
        already.
        """
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if self.settings.activations != "none":
            away = to_host if self.files is None or self.settings.activations == "host" else self.files.move
            offload_activations(blocks, away)
        if self.settings.state == "parameters" and self.files is not None:
            read_ahead(model, blocks, self.files)
