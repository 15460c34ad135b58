"""What runs beside what on a GPU, from a recording of PyTorch's profiler."""

from torch.autograd import DeviceType
from torch.profiler import profile

Spans = list[tuple[float, float]]


def shares_beside_kernels(recorded: profile) -> dict[str, float]:
    """Of carries (NCCL) and of copies between host and GPU, the share of their time in which a
    kernel of the model ran as well.
    """
    spans: dict[str, Spans] = {"carries": [], "copies": [], "kernels": []}
    for event in recorded.events() or []:
        if event.device_type == DeviceType.CUDA:
            kind = "kernels"
            if "nccl" in event.name.lower():
                kind = "carries"
            elif "HtoD" in event.name or "DtoH" in event.name:
                kind = "copies"
            spans[kind].append((event.time_range.start, event.time_range.end))
    return {kind: _overlap(spans[kind], spans["kernels"]) for kind in ("carries", "copies")}


def _overlap(spans: Spans, others: Spans) -> float:
    total = sum(end - start for start, end in spans)
    both = sum(
        max(0.0, min(end, stop) - max(start, begin))
        for start, end in spans
        for begin, stop in others
    )
    return both / total if total else 0.0
