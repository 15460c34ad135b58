"""How long the stages of a cut take once they are compiled.

Not here: whether they compute the same, which `compile` judges.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from parallel.errors import ShardlineError
from parallel.graph import Graph
from parallel.graph_cut import Boundaries
from parallel.graph_layout import with_channels_last
from parallel.graph_stage import Piece, Value
from runner.compiler.backend import Backend, Compiled
from runner.compiler.rounds import Tensors
from runner.compiler.segment import Segment
from runner.pipeline.timing import call_seconds, random_of, spec_of, weights_of

_LOG = logging.getLogger(__name__)

_Form = tuple[int, int, tuple[Value, ...], tuple[Value, ...]]
"""Of a stage: its first unit, the first after it, what it takes and what it makes."""


class CompiledStages:
    """Compiles stages of a graph as they are asked for, each once, and times them."""

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        backends: Sequence[Backend],
        *,
        captures: bool,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            graph: traced for `device`, undivided and without collectives.
            backends: of several the fastest counts, and what one of them cannot do is left out.
            captures: see `call_seconds`.
            channels_last: see `parallel.graph_layout`.
        """
        self._graph = graph
        self._device = device
        self._backends = backends
        self._captures = captures
        self._channels_last = channels_last
        self._found: dict[_Form, tuple[float, str]] = {}

    def seconds(self, boundaries: Boundaries) -> tuple[float, ...]:
        """Of every stage of a cut, one after the other.

        Raises:
            ShardlineError: the only backend cannot do it, or none of several.
        """
        pieces = self._pieces(boundaries)
        for form, piece in pieces.items():
            if form not in self._found:
                self._found[form] = self._fastest(piece)
        return tuple(self._found[form][0] for form in pieces)

    def backends(self, boundaries: Boundaries) -> tuple[str, ...]:
        """What compiled the stages of a cut that was timed; each is named once."""
        return tuple(dict.fromkeys(self._found[form][1] for form in self._pieces(boundaries)))

    def _pieces(self, boundaries: Boundaries) -> dict[_Form, Piece]:
        """What the stages of a cut compute, one after the other."""
        stages = self._graph.stages(boundaries)
        if self._channels_last:
            stages = with_channels_last(stages)
        found = {}
        spans = pairwise([0, *boundaries, len(self._graph.units)])
        for (start, stop), stage in zip(spans, stages, strict=True):
            (piece,) = stage.pieces
            found[start, stop, piece.inputs, piece.outputs] = piece
        return found

    def _fastest(self, piece: Piece) -> tuple[float, str]:
        segment = Segment("stage", piece.module, tuple(map(spec_of, piece.inputs)))
        program = segment.export(self._device)
        generator = torch.Generator(self._device).manual_seed(0)
        given = tuple(random_of(value, self._device, generator) for value in piece.inputs)
        weights = weights_of(piece.module, self._device)
        found: list[tuple[float, str]] = []
        for index, backend in enumerate(self._backends):
            try:
                with TemporaryDirectory(prefix="shardline-measure-") as folder:
                    backend.build(segment, program, Path(folder))
                    run = backend.load(Path(folder), segment)
                    found.append((self._time(run, given, weights), backend.name))
            # Whatever one fails of, the others may do.
            except (ShardlineError, RuntimeError) as error:
                if not found and index == len(self._backends) - 1:
                    raise
                _LOG.warning("left out of measuring: %s: %s", backend.name, error)
        return min(found)

    @torch.inference_mode()
    def _time(self, run: Compiled, given: Tensors, weights: Tensors) -> float:
        return call_seconds(run, given, weights, self._device, captures=self._captures)
