"""A stage's parts in compiled form: which artefact runs which part, at which number of rows."""

from collections.abc import Mapping

import torch

from runner.compiler.backend import Compiled
from runner.compiler.segment import named_tensors
from runner.models.decoder import DecoderStage

Artefacts = Mapping[str, Mapping[int, Compiled]]
"""Kind of part -> number of rows -> what runs it."""


class CompiledStage:
    """Executes the parts of a stage; pass it to `DecoderStage.forward`."""

    def __init__(self, stage: DecoderStage, artefacts: Artefacts) -> None:
        self._artefacts = {name: artefacts[part.kind] for name, part in stage.parts.items()}
        self._weights = {
            name: tuple(tensor.data for _, tensor in named_tensors(part.module))
            for name, part in stage.parts.items()
        }

    def __call__(self, name: str, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = self._artefacts[name][len(activations[0])]
        return run(*activations, *self._weights[name])
