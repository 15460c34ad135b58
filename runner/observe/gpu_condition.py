"""Judge the state of each GPU and of the links between them: a driver's health report in words.

Every judge is a pure function. Not here: whether the GPUs are enough for a job (`gpu_checks`).
"""

from collections.abc import Iterable

from runner.observe.finding import Finding, say_bytes
from runner.observe.links import GpuPair
from runner.observe.nvml import Gpu

# Reasons that mean trouble, not work: a power cap under load and idle clocks are normal.
_OVERHEATED = {
    "hardware slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "software thermal slowdown",
}
_HELD_BACK = {"clock setting", "display clock setting"}

# A job plans with about this share of a GPU's memory; what others hold comes off it.
FREE_SHARE = 0.9


def judge_condition(gpus: tuple[Gpu, ...], *, pairs: tuple[GpuPair, ...]) -> list[Finding]:
    """Judge every GPU the driver shows; without one all findings are "absent"."""
    if not gpus:
        checks = ("gpu_health", "gpu_memory", "clocks", "mig", "persistence", "p2p", "nvlink")
        return [Finding(check, "absent", "no GPU") for check in checks]
    return [
        judge_health(gpus),
        judge_gpu_memory(gpus),
        judge_clocks(gpus),
        judge_mig(gpus),
        judge_persistence(gpus),
        judge_p2p(pairs),
        judge_nvlink(gpus),
    ]


def judge_health(gpus: Iterable[Gpu]) -> Finding:
    """GPUs that open, without uncorrected memory errors or memory rows to replace."""
    gpus = list(gpus)
    lost = [f"GPU {gpu.index}: {gpu.fault}" for gpu in gpus if gpu.fault]
    failed = [f"GPU {gpu.index}: row remapping failed" for gpu in gpus if gpu.row_remap_failed]
    if lost or failed:
        fix = "nvidia-smi --gpu-reset, or reboot; replace the GPU if it comes back"
        return Finding("gpu_health", "error", "; ".join(lost + failed), fix)
    sick = [f"GPU {gpu.index}: {what}" for gpu in gpus if (what := _memory_trouble(gpu))]
    if sick:
        fix = "stop what runs on the GPU, then: nvidia-smi --gpu-reset"
        return Finding("gpu_health", "warning", "; ".join(sick), fix)
    silent = [gpu.index for gpu in gpus if gpu.ecc_uncorrected_errors is None]
    detail = f"memory errors not told for {_name(silent)}" if silent else "no memory errors"
    return Finding("gpu_health", "ok", detail)


def judge_gpu_memory(gpus: Iterable[Gpu]) -> Finding:
    """Memory that is free now; another process on the GPU takes it from the job."""
    sizes = [
        (gpu.index, gpu.memory_free_bytes, gpu.memory_total_bytes)
        for gpu in gpus
        if gpu.memory_free_bytes is not None and gpu.memory_total_bytes is not None
    ]
    taken = [
        f"GPU {index}: {say_bytes(free)} free of {say_bytes(total)}"
        for index, free, total in sizes
        if free < FREE_SHARE * total
    ]
    if taken:
        fix = "see which process holds it: nvidia-smi -q -d PIDS"
        return Finding("gpu_memory", "warning", "; ".join(taken), fix)
    if not sizes:
        return Finding("gpu_memory", "ok", "not told")
    least = min(free for _, free, _ in sizes)
    return Finding("gpu_memory", "ok", f"at least {say_bytes(least)} free on each GPU")


def judge_clocks(gpus: Iterable[Gpu]) -> Finding:
    """Clocks that nothing but load holds down: no overheating, power brake or fixed setting."""
    gpus = list(gpus)
    hot = _throttled(gpus, _OVERHEATED)
    if hot:
        fix = "check cooling and power supply: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
        return Finding("clocks", "warning", "; ".join(hot), fix)
    held = _throttled(gpus, _HELD_BACK)
    if held:
        fix = "nvidia-smi --reset-gpu-clocks; nvidia-smi --reset-applications-clocks"
        return Finding("clocks", "warning", "; ".join(held), fix)
    return Finding("clocks", "ok", _describe_clocks(gpus))


def judge_mig(gpus: Iterable[Gpu]) -> Finding:
    """MIG off: no collective runs between the instances of a GPU cut by MIG."""
    cut = [gpu.index for gpu in gpus if gpu.mig_enabled]
    if not cut:
        return Finding("mig", "ok", "off")
    fix = f"nvidia-smi -i {','.join(map(str, cut))} -mig 0"
    return Finding("mig", "warning", f"on for {_name(cut)}; NCCL cannot use its instances", fix)


def judge_persistence(gpus: Iterable[Gpu]) -> Finding:
    """Persistence mode on: without it the driver starts anew for each first process."""
    cold = [gpu.index for gpu in gpus if gpu.persistence_enabled is False]
    if not cold:
        return Finding("persistence", "ok", "on, or not told")
    fix = "on the host: nvidia-smi -pm 1"
    return Finding("persistence", "warning", f"off for {_name(cold)}; starting takes longer", fix)


def judge_p2p(pairs: Iterable[GpuPair]) -> Finding:
    """GPUs that reach each other's memory; without, each all-reduce goes through host memory."""
    pairs = list(pairs)
    if not pairs:
        return Finding("p2p", "absent", "fewer than two GPUs")
    blocked = [pair for pair in pairs if pair.path == "no"]
    if blocked:
        words = "; ".join(f"GPU {p.first} and {p.second}: {_why_blocked(p)}" for p in blocked)
        fix = "on the host: boot with iommu=pt and turn PCIe ACS off in the firmware"
        return Finding("p2p", "warning", f"{words}; data go through host memory", fix)
    paths = sorted({pair.path for pair in pairs})
    return Finding("p2p", "ok", f"all pairs: {', '.join(paths).replace('?', 'not told')}")


def judge_nvlink(gpus: Iterable[Gpu]) -> Finding:
    """The same number of NVLink links on every GPU; fewer on one means that links are down."""
    counts = {gpu.index: gpu.nvlinks_active for gpu in gpus if gpu.nvlinks_active is not None}
    most = max(counts.values(), default=0)
    if most == 0:
        return Finding("nvlink", "absent", "no active link; GPUs talk over PCIe")
    short = [index for index, count in counts.items() if count < most]
    if short:
        fix = "see which are down: nvidia-smi nvlink --status"
        return Finding("nvlink", "warning", f"{most} links, but fewer on {_name(short)}", fix)
    return Finding("nvlink", "ok", f"{most} links on each GPU")


def _name(indices: list[int]) -> str:
    return f"GPU {', '.join(map(str, indices))}"


def _memory_trouble(gpu: Gpu) -> str:
    if gpu.ecc_uncorrected_errors:
        return f"{gpu.ecc_uncorrected_errors} uncorrected memory errors"
    return "a memory row waits for replacement" if gpu.row_remap_pending else ""


def _throttled(gpus: list[Gpu], reasons: set[str]) -> list[str]:
    found = ((gpu.index, [r for r in gpu.throttle_reasons or () if r in reasons]) for gpu in gpus)
    return [f"GPU {index}: {', '.join(words)}" for index, words in found if words]


def _describe_clocks(gpus: list[Gpu]) -> str:
    spans = (
        ("SM clock {} MHz", [gpu.sm_clock_mhz for gpu in gpus]),
        ("up to {} MHz", [gpu.sm_clock_max_mhz for gpu in gpus]),
        ("{} C", [gpu.temperature_c for gpu in gpus]),
        ("{} W", [gpu.power_w for gpu in gpus]),
        ("limit {} W", [gpu.power_limit_w for gpu in gpus]),
    )
    told = [words.format(span) for words, values in spans if (span := _span(values))]
    return ", ".join(told) or "not told"


def _span(values: Iterable[float | None]) -> str:
    """The least and the greatest of the values that are told: "345-1980", "345" or ""."""
    known = [round(value) for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low}-{high}"


def _why_blocked(pair: GpuPair) -> str:
    return next(word for word in (pair.read, pair.write) if word not in (None, "ok"))
