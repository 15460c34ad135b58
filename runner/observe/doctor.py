"""Host preflight: every check, run once, as one diagnosis with an exit code.

Not here: what each check judges (`gpu_checks`, `host_checks`, `software`), nor how it is printed.
"""

import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from parallel.errors import PreflightError
from runner.observe.finding import Finding
from runner.observe.gpu_checks import judge_gpus
from runner.observe.host import Host, read_host
from runner.observe.host_checks import judge_host
from runner.observe.nvml import Inventory, read_inventory
from runner.observe.software import (
    Software,
    find_flavour,
    judge_extras,
    judge_nccl,
    judge_torch,
    judge_torch_tensorrt,
    read_software,
)


@dataclass(frozen=True)
class Diagnosis:
    """The findings in the order of the checks, and what they were made from.

    `versions` has None for what is not there.
    """

    findings: tuple[Finding, ...]
    inventory: Inventory
    versions: dict[str, str | None]

    @property
    def exit_code(self) -> int:
        """0, or that of `PreflightError` if any finding is an error."""
        failed = any(finding.status == "error" for finding in self.findings)
        return PreflightError.exit_code if failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data: `findings`, `gpus`, `gpu_pairs`, `versions`, `exit_code`."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "gpus": [asdict(gpu) for gpu in self.inventory.gpus],
            "gpu_pairs": [{**asdict(pair), "path": pair.path} for pair in self.inventory.pairs],
            "versions": self.versions,
            "exit_code": self.exit_code,
        }


def diagnose(*, num_gpus_demanded: int = 0) -> Diagnosis:
    """Read this host and judge it; takes the seconds that importing torch takes.

    Args:
        num_gpus_demanded: fewer usable GPUs are an error; 0 accepts a host without any.
    """
    return judge(
        read_inventory(), software=read_software(), host=read_host(), demanded=num_gpus_demanded
    )


def judge(inventory: Inventory, *, software: Software, host: Host, demanded: int) -> Diagnosis:
    """Every check over one set of readings. Pure but for the versions of this interpreter."""
    in_container = host.container is not None
    # Ranks that are asked for need their share of the host even where their GPUs are missing.
    num_gpus = max(len(inventory.gpus), demanded)
    flavour = find_flavour(software.distributions)
    findings = (
        *judge_gpus(inventory, software=software, demanded=demanded, in_container=in_container),
        judge_torch(software, has_gpu=bool(inventory.gpus)),
        judge_nccl(software.nccl_version, num_gpus=num_gpus),
        judge_torch_tensorrt(
            software.distributions,
            torch_version=software.torch_version,
            has_gpu=bool(inventory.gpus),
        ),
        judge_extras(software.lacking),
        *judge_host(host, num_gpus=num_gpus, needs_passwd=flavour != "none"),
    )
    return Diagnosis(findings, inventory, _collect_versions(inventory, software=software))


def _collect_versions(inventory: Inventory, *, software: Software) -> dict[str, str | None]:
    cuda = inventory.cuda_version
    return {
        "shardline": _find_version("shardline"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.release()} {platform.machine()}",
        "driver": inventory.driver_version,
        "driver_cuda": None if cuda is None else f"{cuda[0]}.{cuda[1]}",
        "torch": software.torch_version,
        "torch_cuda": software.torch_cuda,
        "nccl": software.nccl_version,
        "triton": _find_version("triton"),
        **software.distributions,
    }


def _find_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
