"""A model folder, read as far as a plan needs: its config, its layout and its tensors' headers."""

from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint import Checkpoint
from parallel.errors import ConfigError
from parallel.layout import ModelLayout
from runner.models.config import DecoderConfig, HFConfig
from runner.models.families import family_of
from runner.models.layout import layout_of


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be planned and loaded."""

    folder: Path
    config: DecoderConfig
    layout: ModelLayout
    checkpoint: Checkpoint

    @classmethod
    def open(cls, folder: Path) -> "ModelSpec":
        """Read config.json and the headers of the weights.

        Raises:
            ConfigError: the architecture, or something in its config, is not supported.
            IntegrityError: a file is absent, truncated or corrupt.
        """
        hf_config = HFConfig.open(folder)
        family = family_of(hf_config)
        config = family.read(hf_config)
        checkpoint = Checkpoint.open(folder).with_prefix(family.names.prefix)
        return cls(folder, config, layout_of(config, family.names), checkpoint)

    def max_model_len(self, requested: int | None) -> int:
        """The length to run with, in tokens; None asks for the model's own limit.

        Raises:
            ConfigError: more than the model is made for.
        """
        limit = self.config.max_positions
        if requested is not None and requested > limit:
            raise ConfigError(
                f"max_model_len={requested} exceeds the {limit} tokens this model is made for; "
                f"use 1 to {limit}"
            )
        return requested or limit
