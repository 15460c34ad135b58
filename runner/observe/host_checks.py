"""Judge what a host or container gives: shared memory, limits, disk, memory, CPUs, loopback.

Every judge is a pure function of readings. Not here: taking the readings (`host`, `cgroup`).
"""

from runner.observe.cgroup import CgroupLimits
from runner.observe.finding import Finding, Status, say_bytes
from runner.observe.host import Directory, Host, Limits, Space

MIB = 1 << 20
GIB = 1 << 30

# NCCL's shared-memory transport takes several MiB for each connection of two ranks. The 64 MiB
# that Docker gives by default are known to end in "unhandled system error".
SHM_ERROR_BYTES = 256 * MIB
SHM_WARNING_BYTES = 1 * GIB

STACK_WARNING_BYTES = 8 * MIB
NOFILE_WARNING = 4096
NOFILE_ERROR = 256

DISK_ERROR_BYTES = 128 * MIB
DISK_WARNING_BYTES = 2 * GIB

# A rank's Python, PyTorch and CUDA context take 2 to 3 GiB of host memory before any weight.
RANK_MEMORY_BYTES = 4 * GIB
MEMORY_ERROR_BYTES = 1 * GIB

# A rank has a thread that launches kernels; a second one serves, tokenizes or watches.
CPUS_PER_RANK = 2


def judge_host(host: Host, *, num_gpus: int, needs_passwd: bool) -> list[Finding]:
    """Judge one reading of the host for a job of `num_gpus` ranks (0 = one CPU run).

    Args:
        needs_passwd: a package is installed that crashes without a line in the user database.
    """
    inside = host.container is not None
    return [
        Finding("container", "ok", host.container or "none detected"),
        judge_shm(host.shm, num_gpus=num_gpus, in_container=inside),
        *judge_limits(host.limits, num_gpus=num_gpus, in_container=inside),
        judge_temp_dir(host.temp_dir, in_container=inside),
        judge_home_dir(host.home_dir, in_container=inside),
        judge_passwd(host.uid, gid=host.gid, has_line=host.has_passwd_line, required=needs_passwd),
        judge_memory(
            host.memory_total_bytes,
            available_bytes=host.memory_available_bytes,
            cgroup=host.cgroup,
            num_gpus=num_gpus,
        ),
        judge_cpus(host.num_cpus, cgroup_cpus=host.cgroup.num_cpus, num_gpus=num_gpus),
        judge_loopback(host.loopback_error),
    ]


def judge_shm(space: Space | None, *, num_gpus: int, in_container: bool) -> Finding:
    """/dev/shm: several ranks fail below 256 MiB; below 1 GiB is a warning, for one rank too."""
    docker = "docker run --shm-size=1g   (compose: shm_size: 1gb)"
    fix = docker if in_container else "mount -o remount,size=1G /dev/shm"
    severe: Status = "error" if num_gpus > 1 else "warning"
    if space is None:
        return Finding("shm", severe, "no /dev/shm", fix)
    detail = f"/dev/shm is {say_bytes(space.total_bytes)}, {say_bytes(space.free_bytes)} free"
    if space.total_bytes < SHM_WARNING_BYTES:
        too_small = space.total_bytes < SHM_ERROR_BYTES
        limit = SHM_ERROR_BYTES if too_small else SHM_WARNING_BYTES
        status: Status = severe if too_small else "warning"
        return Finding("shm", status, f"{detail}; several ranks need {say_bytes(limit)}", fix)
    if space.free_bytes < SHM_ERROR_BYTES:
        left_over = "remove what dead processes left: ls -l /dev/shm"
        return Finding("shm", severe, f"{detail}; it is nearly full", left_over)
    return Finding("shm", "ok", detail)


def judge_limits(limits: Limits, *, num_gpus: int, in_container: bool) -> list[Finding]:
    """The three limits that a container gets with `docker run --ulimit`."""
    return [
        judge_memlock(limits.memlock_bytes, num_gpus=num_gpus, in_container=in_container),
        judge_stack(limits.stack_bytes, in_container=in_container),
        judge_nofile(limits.nofile, in_container=in_container),
    ]


def judge_memlock(limit_bytes: int | None, *, num_gpus: int, in_container: bool) -> Finding:
    """Locked memory: NCCL registers buffers when several GPUs talk, so any limit is a warning."""
    if limit_bytes is None:
        return Finding("memlock", "ok", "unlimited")
    detail = f"limited to {say_bytes(limit_bytes)}"
    if num_gpus < 2:
        return Finding("memlock", "ok", detail)
    fix = "docker run --ulimit memlock=-1" if in_container else "ulimit -l unlimited"
    return Finding("memlock", "warning", f"{detail}; NCCL may fail to register buffers", fix)


def judge_stack(limit_bytes: int | None, *, in_container: bool) -> Finding:
    """Stack: compilers recurse deeply; less than the usual 8 MiB is a warning."""
    if limit_bytes is None or limit_bytes >= STACK_WARNING_BYTES:
        return Finding(
            "stack", "ok", "unlimited" if limit_bytes is None else say_bytes(limit_bytes)
        )
    fix = "docker run --ulimit stack=67108864" if in_container else "ulimit -s 65536"
    return Finding("stack", "warning", f"{say_bytes(limit_bytes)}; compilers need 8 MiB", fix)


def judge_nofile(limit: int | None, *, in_container: bool) -> Finding:
    """Open files that there may be: every weight file, rank and client takes some; 256 is an error,
    4096 enough.
    """
    if limit is None or limit >= NOFILE_WARNING:
        return Finding("nofile", "ok", "unlimited" if limit is None else f"{limit} open files")
    fix = "docker run --ulimit nofile=65536" if in_container else "ulimit -n 65536"
    status: Status = "error" if limit < NOFILE_ERROR else "warning"
    return Finding("nofile", status, f"{limit} open files; serving needs {NOFILE_WARNING}", fix)


def judge_temp_dir(directory: Directory, *, in_container: bool) -> Finding:
    """Where compilers write: unusable below 128 MiB, a warning below 2 GiB."""
    docker = "docker run --tmpfs /tmp:exec,size=4g   (or -v /big/disk:/tmp)"
    fix = docker if in_container else "export TMPDIR=/a/writable/directory/with/space"
    return _judge_directory("temp_dir", directory, severe="error", fix=fix)


def judge_home_dir(directory: Directory, *, in_container: bool) -> Finding:
    """Where Triton and CUDA cache kernels: without it they build again at every start."""
    fix = "docker run -e HOME=/tmp" if in_container else "export HOME=/a/writable/directory"
    return _judge_directory("home_dir", directory, severe="warning", fix=fix)


def judge_cache_dir(directory: Directory, *, uid: int) -> Finding:
    """Where the image keeps the caches of compilers and drivers: it has to be writable."""
    path = directory.path
    fix = (
        f"docker run -v shardline-cache:{path}   (or a folder of this user's: chown {uid} FOLDER; "
        f"compose: volumes: [shardline-cache:{path}])"
    )
    return _judge_directory("cache", directory, severe="error", fix=fix)


def judge_socket_dir(directory: Directory, *, gid: int, in_container: bool) -> Finding:
    """Where a server makes its Unix socket; Docker makes a folder that is absent for root alone."""
    path = directory.path
    if directory.space is not None and directory.writable:
        return Finding("socket_dir", "ok", path)
    fix = f"as root: install -d -m 0770 -g {gid} {path}"
    if in_container:
        mount = f"FOLDER:{path}"
        fix = (
            f"on the host, as root: install -d -m 0770 -g {gid} FOLDER; docker run -v {mount}   "
            f"(compose: volumes: [{mount}])"
        )
    lack = "is not writable" if directory.space else "does not exist"
    return Finding("socket_dir", "error", f"{path} {lack}; no socket can be made there", fix)


def judge_passwd(uid: int, *, gid: int, has_line: bool, required: bool) -> Finding:
    """A line for the uid in the user database; `torch_tensorrt` crashes at import without one."""
    if has_line:
        return Finding("passwd", "ok", f"uid {uid} has a line in /etc/passwd")
    detail = f"uid {uid} has no line in /etc/passwd; Torch-TensorRT crashes at import"
    fix = f"as root: echo 'shardline:x:{uid}:{gid}::/tmp:/sbin/nologin' >> /etc/passwd"
    return Finding("passwd", "error" if required else "warning", detail, fix)


def judge_memory(
    total_bytes: int, *, available_bytes: int, cgroup: CgroupLimits, num_gpus: int
) -> Finding:
    """Host memory: 4 GiB for each rank, or a warning; less than 1 GiB in all is an error."""
    free_in_group = cgroup.memory_free_bytes
    free = available_bytes if free_in_group is None else min(available_bytes, free_in_group)
    detail = f"{say_bytes(free)} available of {say_bytes(total_bytes)}"
    if cgroup.memory_limit_bytes is not None:
        detail += f"; control group limit {say_bytes(cgroup.memory_limit_bytes)}"
    needed = RANK_MEMORY_BYTES * max(1, num_gpus)
    if free >= needed:
        return Finding("memory", "ok", detail)
    grouped = free_in_group is not None and free_in_group < available_bytes
    fix = f"docker run --memory={needed // GIB}g" if grouped else "stop other processes, add memory"
    status: Status = "error" if free < MEMORY_ERROR_BYTES else "warning"
    return Finding("memory", status, f"{detail}; the ranks need {say_bytes(needed)}", fix)


def judge_cpus(num_cpus: int, *, cgroup_cpus: float | None, num_gpus: int) -> Finding:
    """CPU cores that this process may use: two for each rank, or a warning."""
    usable = num_cpus if cgroup_cpus is None else min(num_cpus, cgroup_cpus)
    detail = f"{num_cpus} cores"
    if cgroup_cpus is not None:
        detail += f"; control group limit {cgroup_cpus:g}"
    needed = CPUS_PER_RANK * max(1, num_gpus)
    if usable >= needed:
        return Finding("cpus", "ok", detail)
    grouped = cgroup_cpus is not None and cgroup_cpus < num_cpus
    fix = f"docker run --cpus={needed}" if grouped else f"run on a host with {needed} cores"
    return Finding("cpus", "warning", f"{detail}; the ranks need {needed}", fix)


def judge_loopback(error: str | None) -> Finding:
    """127.0.0.1, over which the ranks of one host find each other; --network none keeps it."""
    if error is None:
        return Finding("loopback", "ok", "127.0.0.1 accepts connections")
    detail = f"127.0.0.1 is not usable: {error}; the ranks cannot meet"
    return Finding("loopback", "error", detail, "ip link set lo up")


def _judge_directory(check: str, directory: Directory, *, severe: Status, fix: str) -> Finding:
    path, space = directory.path, directory.space
    if space is None:
        return Finding(check, severe, f"{path} does not exist", fix)
    if not directory.writable:
        return Finding(check, severe, f"{path} is not writable", fix)
    detail = f"{path} has {say_bytes(space.free_bytes)} free"
    if space.free_bytes >= DISK_WARNING_BYTES:
        return Finding(check, "ok", detail)
    status: Status = severe if space.free_bytes < DISK_ERROR_BYTES else "warning"
    return Finding(check, status, f"{detail}; compiling needs {say_bytes(DISK_WARNING_BYTES)}", fix)
