"""`Host`: what compiled code is bound to, and whether this host is like the one it was built on.

Not here: whether this host is fit to run at all; that is `runner.observe`'s doctor.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from parallel.errors import IncompatibleError, PreflightError
from runner.bundle.layout import rebuild_command
from runner.observe.software import distributions_by_name, find_distributions

DISTRIBUTION = "shardline"


@dataclass(frozen=True)
class Host:
    """A device, the processor beside it, and the versions that matter.

    Attributes:
        cpu: architecture and the vector extension that torch uses, such as "x86_64 AVX512".
        cpu_features: the instruction sets of the processor; inductor compiles for all of them.
        gpu: name, such as "NVIDIA H200"; None for a CPU, and for any GPU of a compute capability.
        compute_capability: such as "9.0"; None for a CPU.
        versions: of torch, shardline and the distributions of the TensorRT family.
    """

    device: Literal["cpu", "cuda"]
    cpu: str
    cpu_features: tuple[str, ...]
    gpu: str | None
    compute_capability: str | None
    versions: dict[str, str]

    @classmethod
    def current(cls, device: str) -> "Host":
        """This host, with its CPU or the GPU that `device` names, such as "cuda:1".

        Raises:
            PreflightError: shardline is not installed, or there is no such GPU.
        """
        import torch

        if torch.device(device).type == "cpu":
            return cls._with_gpu("cpu", None, None)
        try:
            gpu = torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError) as error:
            raise PreflightError(f"{device}: {error}; see `shardline doctor`") from None
        return cls._with_gpu("cuda", gpu.name, f"{gpu.major}.{gpu.minor}")

    @classmethod
    def of_target(cls, target: str) -> "Host":
        """Any GPU of a compute capability, such as "sm89", with the versions that are here.

        Raises:
            PreflightError: shardline is not installed.
        """
        number = target.removeprefix("sm")
        return cls._with_gpu("cuda", None, f"{number[:-1]}.{number[-1]}")

    @classmethod
    def _with_gpu(
        cls, device: Literal["cpu", "cuda"], gpu: str | None, compute_capability: str | None
    ) -> "Host":
        import torch

        from runner.compiler.host import cpu_features, cpu_isa

        versions = _versions(str(torch.__version__))
        return cls(device, cpu_isa(), cpu_features(), gpu, compute_capability, versions)

    @property
    def is_target(self) -> bool:
        """Whether it stands for every GPU of a compute capability."""
        return self.device == "cuda" and self.gpu is None

    def describe(self) -> str:
        """In a line."""
        gpu = f"{self.gpu or 'any GPU'} (SM {self.compute_capability})"
        device = f"CPU {self.cpu}" if self.device == "cpu" else gpu
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return ", ".join([device, *versions])


@dataclass(frozen=True)
class Difference:
    """What a bundle is bound to and this host has not."""

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what} is {self.found}, it was built for {self.expected}"


def differences(built: Host, here: Host, backends: Collection[str]) -> list[Difference]:
    """What keeps artefacts of these backends from running here.

    eager code runs wherever torch's and shardline's series are the same; a library of inductor
    needs the same torch and the instruction sets, or the SM, that it was compiled for; a TensorRT
    engine the same GPU and the same TensorRT. Of a backend that is not known, all is asked. What
    was built without a device runs on every GPU of its compute capability, and torch may be another
    build of the same series: that of the host without a device was one without CUDA.
    """
    checks = [
        Difference("device", built.device, here.device),
        *(_version(name, built, here, exact=False) for name in ("torch", DISTRIBUTION)),
    ]
    for backend in sorted(set(backends) - {"eager"}):
        checks.append(_version("torch", built, here, exact=not built.is_target))
        if built.device == "cpu":
            checks += _processor(built, here)
        else:
            checks.append(_compute_capability(built, here))
        if backend != "inductor":
            checks += _tensorrt(built, here)
    return [check for check in dict.fromkeys(checks) if check.expected != check.found]


def check_host(built: Host, here: Host, backends: Collection[str], *, bundle: Path) -> None:
    """Raises IncompatibleError: the bundle cannot run here; names all that differs."""
    if found := differences(built, here, backends):
        raise IncompatibleError(
            f"{bundle} was compiled for another host: {'; '.join(map(str, found))}; compile it "
            f"here: {rebuild_command(bundle)}"
        )


def own_version() -> str:
    """Raises PreflightError: shardline runs from a folder, and nothing says which version it is."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise PreflightError(
            f"{DISTRIBUTION} is not installed, so a bundle cannot be bound to its version; "
            f"run `pip install .` in its folder"
        ) from None


def _versions(torch_version: str) -> dict[str, str]:
    family = sorted(find_distributions(distributions_by_name(metadata.distributions())).items())
    return {"torch": torch_version, DISTRIBUTION: own_version(), **dict(family)}


def _version(name: str, built: Host, here: Host, *, exact: bool) -> Difference:
    expected, found = (host.versions.get(name, "not installed") for host in (built, here))
    if not exact and _series(expected) == _series(found):
        return Difference(name, expected, expected)
    return Difference(name, expected, found)


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _processor(built: Host, here: Host) -> Iterator[Difference]:
    yield Difference("CPU", built.cpu, here.cpu)
    if lacking := sorted(set(built.cpu_features) - set(here.cpu_features)):
        names = " ".join(lacking)
        yield Difference("CPU", f"one with {names}", f"without {names}")


def _compute_capability(built: Host, here: Host) -> Difference:
    capabilities = (host.compute_capability for host in (built, here))
    return Difference("GPU", *(f"SM {found}" if found else "none" for found in capabilities))


def _tensorrt(built: Host, here: Host) -> Iterator[Difference]:
    if not built.is_target:
        yield Difference("GPU", built.gpu or "none", here.gpu or "none")
    for name in sorted(built.versions):
        if name not in ("torch", DISTRIBUTION):
            yield _version(name, built, here, exact=True)
