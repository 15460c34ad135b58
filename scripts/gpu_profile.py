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
    kernels = _united(spans["kernels"])
    return {kind: _overlap(spans[kind], kernels) for kind in ("carries", "copies")}


def _united(spans: Spans) -> Spans:
    """The time that they cover, none of it twice: kernels run beside one another, too."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _overlap(spans: Spans, others: Spans) -> float:
    total = sum(end - start for start, end in spans)
    both = sum(
        max(0.0, min(end, stop) - max(start, begin))
        for start, end in spans
        for begin, stop in others
    )
    return both / total if total else 0.0
