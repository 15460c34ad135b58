"""Judge the driver, the number of GPUs and CUDA against what a job needs.

Every judge is a pure function of an inventory. Not here: reading it (`nvml`), nor the state of
each GPU (`gpu_condition`).
"""

from runner.observe.finding import Finding
from runner.observe.gpu_condition import judge_condition
from runner.observe.nvml import Inventory
from runner.observe.software import Software, parse_series

_GPUS_FLAG = "docker run --gpus all   (compose: reservations.devices, capabilities: [gpu])"


def judge_gpus(
    inventory: Inventory, *, software: Software, demanded: int, in_container: bool
) -> list[Finding]:
    """Judge an inventory; without a GPU every finding is "absent" unless one is demanded."""
    return [
        judge_driver(inventory, in_container=in_container),
        judge_gpu_count(
            len(inventory.gpus), software=software, demanded=demanded, in_container=in_container
        ),
        judge_cuda(inventory, torch_cuda=software.torch_cuda, in_container=in_container),
        *judge_condition(inventory.gpus, pairs=inventory.pairs),
    ]


def judge_driver(inventory: Inventory, *, in_container: bool) -> Finding:
    """A driver that answers. One that is installed and silent is an error; none is not."""
    if inventory.driver == "absent":
        fix = f"where the host has GPUs: {_GPUS_FLAG}" if in_container else None
        return Finding("driver", "absent", f"{inventory.reason}; CPU runs only", fix)
    if inventory.driver == "broken":
        # A container that lost its device permissions never gets them back.
        anew = f"start a new container: {_GPUS_FLAG}"
        fix = anew if in_container else "see `nvidia-smi`; reload the driver or reboot"
        return Finding("driver", "error", inventory.reason or "", fix)
    return Finding("driver", "ok", inventory.driver_version or "version not told")


def judge_gpu_count(
    num_found: int, *, software: Software, demanded: int, in_container: bool
) -> Finding:
    """At least `demanded` GPUs that the driver shows and torch can use."""
    num_torch = software.num_torch_gpus
    usable = num_found if num_torch is None else min(num_found, num_torch)
    detail = f"{num_found} found"
    if num_found and software.cuda_error is not None:
        fix = "see the findings driver and cuda"
        return Finding("gpus", "error", f"{detail}; torch: {software.cuda_error}", fix)
    hidden = usable < num_found
    if hidden:
        detail += f", {usable} usable by torch"
    show_all = "unset CUDA_VISIBLE_DEVICES, or list more GPUs in it"
    if usable < demanded:
        more = f"{_GPUS_FLAG}, or demand fewer" if in_container else "demand fewer, or add GPUs"
        return Finding(
            "gpus", "error", f"{detail}; {demanded} demanded", show_all if hidden else more
        )
    if num_found == 0:
        return Finding("gpus", "absent", "none; CPU runs only")
    return Finding("gpus", "ok" if usable else "warning", detail, None if usable else show_all)


def judge_cuda(inventory: Inventory, *, torch_cuda: str | None, in_container: bool) -> Finding:
    """The driver's CUDA against the one torch was built with.

    An older major version does not run at all. An older minor one runs what was compiled ahead,
    but refuses PTX from the newer compiler, which just-in-time compilers produce.
    """
    if inventory.driver != "present":
        return Finding("cuda", "absent", "no GPU")
    driver = inventory.cuda_version
    if driver is None:
        capabilities = "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        fix = capabilities if in_container else "install the driver's CUDA part (libcuda.so.1)"
        return Finding("cuda", "error", "libcuda.so.1 not found beside the driver", fix)
    shown = f"driver supports {driver[0]}.{driver[1]}"
    if torch_cuda is None:
        return Finding("cuda", "absent", f"{shown}; torch is built without CUDA")
    detail = f"{shown}, torch is built with {torch_cuda}"
    built = parse_series(torch_cuda)
    if driver >= built:
        return Finding("cuda", "ok", detail)
    fix = f"on the host: install a driver for CUDA {torch_cuda} or newer"
    if driver[0] < built[0]:
        return Finding("cuda", "error", detail, fix)
    return Finding("cuda", "warning", f"{detail}; kernels compiled at run time may fail", fix)
