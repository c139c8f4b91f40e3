"""A Slurm cluster of one node on the loopback interface, for tests: munged, slurmctld and slurmd as root, no systemd.

    python tests/slurm/cluster.py sinfo                 # starts it, runs the command, stops it

Everything it writes lies in one temporary folder; /etc/slurm holds links to the configuration while it runs, since
Snakemake's executor takes SLURM_CONF out of the surroundings of jobs. The node has two stand-in GPUs, more CPUs than
the machine if that is small, and limits of memory and time that are enforced where control groups allow it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PACKAGES = ("slurm-wlm", "munge")
# apt-get changes the machine, so one of these must be set.
ALLOW_INSTALLING = ("SAT_INSTALL_SLURM", "CI")
CONFIGURATION = Path("/etc/slurm")
PREFIX = "sat-slurm-"
FILES = ("slurm.conf", "cgroup.conf", "gres.conf")
NUM_CPUS = 8
NUM_GPUS = 2

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType={proctrack}
TaskPlugin={task}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
EnforcePartLimits=ALL
MinJobAge=600
KillWait=15
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus}
PartitionName=cpu Nodes={host} MaxTime=INFINITE Default=YES
PartitionName=gpu Nodes={host} MaxTime=INFINITE
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    _remove_what_a_killed_run_left()
    if any((CONFIGURATION / name).exists() for name in FILES):
        return f"{CONFIGURATION} has a configuration, which may be a real cluster's"
    absent = [program for program in PROGRAMS if _find(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install {' '.join(PACKAGES)})"
    return None


def install() -> str | None:
    """Install Slurm with apt where it is missing and that is wanted; -> why there is none, or None."""
    reason = missing()
    if reason is None or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return reason
    if not any(os.environ.get(name) for name in ALLOW_INSTALLING):
        return f"{reason}; {ALLOW_INSTALLING[0]}=1 lets the tests install it on this machine"
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    surroundings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (command, ["apt-get", "update"], command):
        try:
            done = subprocess.run(
                arguments,
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=180,
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(arguments)} took more than 3 minutes"
        if arguments is command and done.returncode == 0:
            return missing()
    return f"apt-get could not install {' '.join(PACKAGES)}: {done.stdout.strip()[-300:]}"


@contextlib.contextmanager
def running():
    """A started cluster; yields the surroundings (os.environ and SLURM_CONF) for programs that use it.

    Raises RuntimeError with the daemons' logs when the node does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    surroundings = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen] = []
    lock = open(folder / "lock", "w")  # released when this process ends, however it ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        _configure(folder)
        CONFIGURATION.mkdir(exist_ok=True)
        for name in FILES:
            (CONFIGURATION / name).symlink_to(folder / name)
        user = pwd.getpwnam("munge")
        for path in (folder / "munge", *(folder / "munge").iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
        place = folder / "munge"
        daemons.append(
            _start(
                [_find("munged"), "--foreground", f"--key-file={place}/munge.key"]
                + [f"--socket={place}/munge.socket", f"--pid-file={place}/munged.pid"]
                + [f"--log-file={place}/munged.log", f"--seed-file={place}/munged.seed"],
                folder,
                surroundings,
                user=user.pw_uid,
                group=user.pw_gid,
            )
        )
        _wait(lambda: (place / "munge.socket").exists(), folder)
        daemons.append(_start([_find("slurmctld"), "-D", "-c"], folder, surroundings))
        daemons.append(_start([_find("slurmd"), "-D"], folder, surroundings))
        _wait(lambda: "idle" in _ask(["sinfo", "-h", "-o", "%T"], surroundings), folder)
        yield surroundings
    finally:
        _stop(daemons, surroundings)
        _remove(folder)
        lock.close()


def jobs(surroundings: dict[str, str]) -> list[dict[str, str]]:
    """What the controller knows of every job, oldest first: the fields of `scontrol show job`."""
    text = _ask(["scontrol", "--oneliner", "show", "job"], surroundings)
    fields = re.compile(r"(\S+?)=(.*?)(?= \S+?=|$)")  # paths may hold blanks
    return [dict(fields.findall(line)) for line in text.splitlines() if line.startswith("JobId=")]


def _configure(folder: Path) -> None:
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    # Slurm 22.05 knows control groups of version 1 well; elsewhere nothing enforces the limits of memory.
    enforced = Path("/sys/fs/cgroup/memory").is_dir() and Path("/sys/fs/cgroup/freezer").is_dir()
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    ports = _free_ports(2)
    conf = CONF.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        controller_port=ports[0],
        node_port=ports[1],
        proctrack="proctrack/cgroup" if enforced else "proctrack/linuxproc",
        task="task/cgroup" if enforced else "task/none",
        cpus=NUM_CPUS,
        gpus=NUM_GPUS,
        memory_mb=int(0.9 * total_mb),
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text(
        "CgroupAutomount=no\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\n"
        "ConstrainCores=no\nConstrainDevices=no\nMinRAMSpace=1\n"
    )
    gpus = []
    for number in range(NUM_GPUS):
        device = folder / f"gpu{number}"
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # a second name of /dev/null
        gpus.append(f"Name=gpu File={device}\n")
    (folder / "gres.conf").write_text("".join(gpus))


def _remove_what_a_killed_run_left() -> None:
    """The daemons, links and folder of a cluster whose starter is gone: its lock is free."""
    for link in [CONFIGURATION / name for name in FILES]:
        folder = link.readlink().parent if link.is_symlink() else Path()
        if not folder.name.startswith(PREFIX):
            continue
        if folder.is_dir():
            with open(folder / "lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
            for name in ("slurmd.pid", "slurmctld.pid", "munge/munged.pid"):
                _kill(folder / name)
        _remove(folder)


def _kill(pid_file: Path) -> None:
    """Kill the daemon that wrote the file, if its number has not become another program's."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == pid_file.stem:
            os.kill(pid, signal.SIGKILL)


def _remove(folder: Path) -> None:
    """What a cluster leaves behind when its daemons are stopped: links, mounts, control groups, its folder."""
    for name in FILES:
        link = CONFIGURATION / name
        if link.is_symlink() and link.readlink().parent == folder:
            link.unlink()
    for mount in Path("/proc/mounts").read_text().splitlines():
        if str(folder) in mount:
            subprocess.run(["umount", mount.split()[1]], capture_output=True)
    for group in Path("/sys/fs/cgroup").glob("*/slurm*"):
        for path in sorted(group.rglob("*/"), reverse=True) + [group]:
            with contextlib.suppress(OSError):  # one that is not empty is another's
                path.rmdir()
    shutil.rmtree(folder, ignore_errors=True)


def memory_is_enforced(surroundings: dict[str, str]) -> bool:
    return "task/cgroup" in Path(surroundings["SLURM_CONF"]).read_text()


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(command: list[str], folder: Path, surroundings: dict, **who) -> subprocess.Popen:
    name = Path(command[0]).name
    output = folder / ("munge" if name == "munged" else "") / f"{name}.out"
    with open(output, "w") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=surroundings,
            start_new_session=True,
            **who,
        )


def _ask(command: list[str], surroundings: dict) -> str:
    return subprocess.run(command, env=surroundings, capture_output=True, text=True).stdout


def _wait(ready, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = [*folder.glob("*.out"), *folder.glob("*.log"), *folder.glob("munge/*.out")]
            text = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in logs)
            raise RuntimeError(f"the Slurm cluster did not start:\n{text}")
        time.sleep(0.2)


def _stop(daemons: list[subprocess.Popen], surroundings: dict) -> None:
    if len(daemons) > 1:
        subprocess.run(["scancel", "--user", "root"], env=surroundings, capture_output=True)
        end = time.monotonic() + 30
        while _ask(["squeue", "-h"], surroundings).strip() and time.monotonic() < end:
            time.sleep(0.5)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def main() -> None:
    if reason := install():
        sys.exit(f"error: {reason}")
    with running() as surroundings:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env=surroundings).returncode)


if __name__ == "__main__":
    main()
