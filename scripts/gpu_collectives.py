"""All-reduces of several GPUs, in each of the ways there are: see scripts/gpu_check.

    gpu_collectives.py RESULT.json      under torchrun, one process a GPU

Each figure is of one all-reduce within a CUDA graph of many, as a decode step has them.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from parallel.collectives import all_reduce, broadcast  # noqa: E402
from parallel.context import AllReduce, ParallelContext  # noqa: E402
from parallel.launch import adopt  # noqa: E402
from parallel.topology import Topology  # noqa: E402

HIDDEN_SIZE = 4096
ROWS = (1, 8, 32, 64, 128, 256, 512, 2048)
CAPTURED = 64
REPLAYS = 20


def all_reduce_s(context: ParallelContext, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Seconds of one all-reduce of the stage's group; all its ranks must call this."""
    x = torch.randn(shape, device=context.device).to(dtype)
    stream = torch.cuda.Stream(context.device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            all_reduce(x, context.tp)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CAPTURED):
            all_reduce(x, context.tp)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    broadcast(torch.zeros(1), context.tp.ranks[0], context.tp)
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPLAYS / CAPTURED


def main(output: Path) -> None:
    env = adopt()
    assert env is not None, "torchrun starts this"
    topology = Topology.of([env.world_size])
    first = ParallelContext.open(topology, env, device_type="cuda", all_reduce="nccl")
    rows = []
    ways: tuple[AllReduce, ...] = ("nccl", "one_shot", "low_latency")
    for way in ways:
        context = ParallelContext.over_initialized(topology, env.rank, first.device, all_reduce=way)
        for num_rows in ROWS:
            for dtype in (torch.bfloat16, torch.float16):
                seconds = all_reduce_s(context, (num_rows, HIDDEN_SIZE), dtype)
                rows.append(
                    {
                        "way": way,
                        "dtype": str(dtype).removeprefix("torch."),
                        "kib": num_rows * HIDDEN_SIZE * 2 // 1024,
                        "us": 1e6 * seconds,
                    }
                )
    if env.rank == 0:
        output.write_text(json.dumps(rows, indent=1) + "\n")
    first.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
