"""How long the stages of a cut take when they are compiled, as `compile` would compile them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from parallel.errors import PreflightError, UnsupportedSegmentError
from parallel.graph import Graph
from parallel.graph_stage import Piece
from runner.compiler.backend import Backend, Compiled
from runner.compiler.segment import Segment, named_tensors
from runner.pipeline.timing import call_seconds, random_of, spec_of


class CompiledStages:
    """Compiles stages of a graph as they are asked for, each once, and times them."""

    def __init__(
        self, graph: Graph, device: torch.device, backends: Sequence[Backend], *, captures: bool
    ) -> None:
        """
        Args:
            graph: traced for `device`, undivided and without collectives.
            backends: of several the fastest counts, and what one of them cannot compile does not.
            captures: see `call_seconds`.
        """
        self._graph = graph
        self._device = device
        self._backends = backends
        self._captures = captures
        self._found: dict[tuple[int, int], float] = {}

    def seconds(self, boundaries: Sequence[int]) -> tuple[float, ...]:
        """Of every stage of a cut, one after the other.

        Raises:
            UnsupportedSegmentError: no backend can compile a stage.
            PreflightError: the only backend is not usable on this host.
        """
        spans = list(pairwise([0, *boundaries, len(self._graph.units)]))
        for index, span in enumerate(spans):
            if span not in self._found:
                (piece,) = self._graph.stages(boundaries)[index].pieces
                self._found[span] = self._fastest(f"stage{index}", piece)
        return tuple(self._found[span] for span in spans)

    def _fastest(self, kind: str, piece: Piece) -> float:
        segment = Segment(kind, piece.module, tuple(map(spec_of, piece.inputs)))
        program = segment.export(self._device)
        seconds, refusals = [], []
        for backend in self._backends:
            with TemporaryDirectory(prefix="shardline-measure-") as folder:
                try:
                    backend.build(segment, program, Path(folder))
                    run = backend.load(Path(folder), segment)
                except (PreflightError, UnsupportedSegmentError) as refusal:
                    refusals.append(refusal)
                    continue
                seconds.append(self._time(run, piece))
        if not seconds:
            raise refusals[0]
        return min(seconds)

    @torch.inference_mode()
    def _time(self, run: Compiled, piece: Piece) -> float:
        generator = torch.Generator(self._device).manual_seed(0)
        given = tuple(random_of(value, self._device, generator) for value in piece.inputs)
        weights = tuple(
            tensor.detach().contiguous().to(self._device)
            for _, tensor in named_tensors(piece.module)
        )
        return call_seconds(run, given, weights, self._device, captures=self._captures)
