"""A real Slurm cluster on this one machine: slurmctld, munged and several slurmd, for tests.

    python tests/slurm/cluster.py up /tmp/slurm-try     # as root; installs Debian's packages
    . /tmp/slurm-try/env.sh                             # then sbatch, squeue, ... use it
    python tests/slurm/cluster.py down /tmp/slurm-try

Nothing of /etc/slurm or of a munged of the system is used or changed: configuration, key, sockets,
state and logs are in the directory. Where the kernel lets us, each node has a host name, network,
process space and mounts of its own ("namespaces"), so that what only works on one machine fails
here as it would on two; elsewhere the nodes share this machine's ("shared").
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
os.environ["PATH"] += ":/usr/sbin:/sbin"
# Slurm's commands talk to the wrong cluster, or ask for the wrong things, if these are inherited.
FOREIGN = ("SLURM", "SBATCH", "SRUN", "SALLOC")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_delay}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=60
KillWait={kill_wait}
MinJobAge=3600
"""


class NoCluster(Exception):
    """Why this machine cannot run one."""


@dataclass(frozen=True)
class Settings:
    """What a cluster claims to be; CPUs and memory need not exist."""

    nodes: int = 2
    cpus: int = 64
    memory_mb: int = 1_000_000
    kill_wait: int = 30
    slurmd_timeout: int = 15
    requeue_delay: int = 5
    grace: int = 60


class Cluster:
    """The cluster of one directory, running or not; `up` starts what is missing."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.folder = folder.resolve()
        if len(str(self.folder)) > 60:  # sockets have paths of at most 107 bytes
            raise NoCluster(f"{self.folder} is too long a path for sockets: give a shorter one")
        self._plan_file = self.folder / "cluster.json"
        self.settings = settings or Settings()
        if self._plan_file.exists():
            plan = json.loads(self._plan_file.read_text())
            self.namespaces, self._network = plan["namespaces"], plan["network"]
            self.settings = Settings(**plan["settings"])
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def nodes(self) -> list[str]:
        """The nodes' names."""
        return [f"node{index}" for index in range(self.settings.nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """For commands of this cluster's users."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(tuple(f"{word}_" for word in FOREIGN))
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, check: bool = True, **changes: str) -> str:
        """The output of a command of Slurm's."""
        finished = subprocess.run(
            words,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and finished.returncode:
            raise NoCluster(f"{' '.join(words)}: {finished.stderr.strip()}")
        return finished.stdout

    def up(self) -> None:
        """Start every part that does not run, and wait until all nodes take jobs."""
        install_packages()
        if not self._plan_file.exists():
            self._plan()
        self._start_controller()
        for node in self.nodes:
            self.start_node(node)
        _wait(self._all_ready, 60, f"nodes of {self.folder}: see {self.folder}/log")

    def start_node(self, node: str) -> None:
        """Start a node, or its slurmd, if it does not run."""
        if self.namespaces and not self._runs(f"machine.{node}"):
            self._start_machine(node)
        if not self._runs(f"slurmd.{node}"):
            (self.folder / f"spool.{node}").mkdir(exist_ok=True)
            daemon = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
            self._start(f"slurmd.{node}", [*self._within(node), *daemon])

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's slurmd; its jobs' processes live on."""
        self._stop(f"slurmd.{node}", signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """Power off: every process of the node ends at once (needs namespaces)."""
        assert self.namespaces
        self._stop(f"machine.{node}", signal.SIGKILL)
        self._stop(f"slurmd.{node}", signal.SIGKILL)

    def on_node(self, node: str, *words: str) -> str:
        """The output of a command that runs on a node, outside of Slurm."""
        return self.command(*self._within(node), *words)

    def states(self) -> dict[str, str]:
        """Node -> its state in Slurm's short form."""
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %t", check=False).split("\n")
        return dict(line.split() for line in lines if line)

    def down(self) -> None:
        """End all jobs and daemons and remove the directory."""
        if not self._plan_file.exists():
            return
        with contextlib.suppress(NoCluster, subprocess.TimeoutExpired):
            jobs = self.command("squeue", "-h", "-o", "%A").split()
            for force in ([], ["-f", "-s", "KILL"]):
                if jobs:
                    self.command("scancel", *force, *jobs, check=False)
            with contextlib.suppress(TimeoutError):
                _wait(lambda: not self.command("squeue", "-h"), 15, "jobs")
        for node in self.nodes:
            if self.namespaces:
                self._stop(f"machine.{node}", signal.SIGKILL)
            self._stop(f"slurmd.{node}", signal.SIGTERM)
        self._kill_left_over_tasks()
        self._stop("slurmctld", signal.SIGTERM)
        self._stop("munged", signal.SIGTERM)
        if self.namespaces:
            subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
        shutil.rmtree(self.folder)

    # What belongs to the cluster as a whole.

    def _plan(self) -> None:
        self.namespaces = can_have_namespaces()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise NoCluster(f"{self.folder} holds something else: give another directory")
        for name in ("log", "state", "munge", "pids"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._network = _free_network() if self.namespaces else 0
        address = self._address(0) if self.namespaces else "127.0.0.1"
        controller, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        text = CONFIGURATION.format(
            folder=self.folder,
            controller=controller,
            address=address,
            port=ports[0],
            **vars(self.settings),
        )
        hosts = ["127.0.0.1 localhost", f"{address} {controller}"]
        for index, (node, port) in enumerate(zip(self.nodes, ports[1:]), start=10):
            place = self._address(index) if self.namespaces else "127.0.0.1"
            hosts.append(f"{place} {node}")
            text += (
                f"NodeName={node} NodeHostname={node if self.namespaces else controller} "
                f"NodeAddr={place} Port={port} CPUs={self.settings.cpus} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={self.settings.cpus} ThreadsPerCore=1 "
                f"RealMemory={self.settings.memory_mb} State=UNKNOWN\n"
            )
        text += (
            f"PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 "
            f"GraceTime={self.settings.grace}\n"
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10\n"
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for name in ("plugstack.conf", "cgroup.conf"):
            (self.folder / name).touch()
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "env.sh").write_text(f"export SLURM_CONF={self.folder}/slurm.conf\n")
        plan = {
            "namespaces": self.namespaces,
            "network": self._network,
            "settings": vars(self.settings),
        }
        self._plan_file.write_text(json.dumps(plan))

    def _start_controller(self) -> None:
        munge = self.folder / "munge"
        if not self._runs("munged"):
            for stale in munge.glob("socket*"):
                stale.unlink()
            files = {
                "key-file": munge / "key",
                "socket": munge / "socket",
                "pid-file": munge / "pid",
                "log-file": self.folder / "log/munged.log",
                "seed-file": munge / "seed",
            }
            options = [f"--{name}={path}" for name, path in files.items()]
            self._start("munged", ["munged", "--foreground", "--force", *options])
            _wait((munge / "socket").exists, 20, f"munged: see {self.folder}/log/munged.log")
        if self.namespaces and not Path(f"/sys/class/net/{self._bridge}").exists():
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self._address(0)}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        if not self._runs("slurmctld"):
            self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
            answers = lambda: "UP" in self.command("scontrol", "ping", check=False)  # noqa: E731
            _wait(answers, 20, f"slurmctld: see {self.folder}/log/slurmctld.log")

    def _all_ready(self) -> bool:
        for name in ["munged", "slurmctld", *(f"slurmd.{node}" for node in self.nodes)]:
            if not self._runs(name):
                raise NoCluster(f"{name} ended: see {self.folder}/log")
        states = self.states()
        for node, state in states.items():
            if state.startswith(("down", "drain")):
                self.command("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        ready = [state in ("idle", "mix", "alloc", "comp") for state in states.values()]
        return len(ready) == len(self.nodes) and all(ready)

    def _kill_left_over_tasks(self) -> None:
        """End what outlived its slurmd: a power-off did it already where nodes are namespaces."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "environ").read_bytes().split(b"\0")
                in_job = any(word.startswith(b"SLURM_JOB_ID=") for word in words)
                steps = (process / "comm").read_text().strip() == "slurmstepd"
                if ours in words and (in_job or steps):
                    os.kill(int(process.name), signal.SIGKILL)

    # What belongs to one node.

    @property
    def _bridge(self) -> str:
        return f"slurm{self._network}"

    def _address(self, index: int) -> str:
        return f"10.221.{self._network}.{index + 1}"

    def _start_machine(self, node: str) -> None:
        """The first process of a node's namespaces; with it ends all that runs there."""
        index = self.nodes.index(node)
        outside, inside = f"{self._bridge}n{index}", f"{self._bridge}p{index}"
        subprocess.run(["ip", "link", "del", outside], capture_output=True)
        spaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc"]
        spaces += ["--kill-child", "--propagation", "private"]
        self._start(f"machine.{node}", ["unshare", *spaces, "sleep", "infinity"], forks=True)
        self.on_node(node, "hostname", node)
        self.on_node(node, "mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        self.on_node(node, "mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
        machine = str(self._pid(f"machine.{node}"))
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", machine)
        _ip("link", "set", outside, "master", self._bridge, "up")
        self.on_node(node, "ip", "link", "set", inside, "name", "eth0")
        self.on_node(node, "ip", "addr", "add", f"{self._address(index + 10)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            self.on_node(node, "ip", "link", "set", device, "up")

    def _within(self, node: str) -> list[str]:
        """What stands before a command to let it run on a node."""
        if self.namespaces:
            return [
                "nsenter",
                "-t",
                str(self._pid(f"machine.{node}")),
                "-n",
                "-u",
                "-m",
                "-p",
                "--",
            ]
        try:  # node names have to resolve: in an /etc/hosts that only the node's processes see
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        bind = f'mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", bind, "sh"]

    # Processes, known by number and time of start: a number that was given away is not ours.

    def _start(self, name: str, words: Sequence[str], *, forks: bool = False) -> None:
        with (self.folder / f"log/{name}.out").open("ab") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        self._started[name] = process
        pid = process.pid
        if forks or words[0] == "nsenter":
            pid = _wait(lambda: _child_of(process.pid), 10, f"{name}: see {self.folder}/log")
        (self.folder / "pids" / name).write_text(f"{pid} {_start_time(pid)}")

    def _pid(self, name: str) -> int:
        return int((self.folder / "pids" / name).read_text().split()[0])

    def _runs(self, name: str) -> bool:
        try:
            pid, started = (self.folder / "pids" / name).read_text().split()
        except FileNotFoundError:
            return False
        return _start_time(int(pid)) == started

    def _stop(self, name: str, number: signal.Signals) -> None:
        for sent in (number, signal.SIGKILL):
            if not self._runs(name):
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid(name), sent)
            with contextlib.suppress(TimeoutError):
                _wait(lambda: not self._runs(name), 10, name)
        if name in self._started:
            self._started.pop(name).wait(timeout=10)


def install_packages() -> None:
    """Install what is missing of Slurm; raises NoCluster where that cannot be."""
    if os.geteuid() != 0:
        raise NoCluster("a Slurm cluster is started by root alone")
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoCluster(f"{', '.join(missing)} not installed, and this is no Debian to do it on")
    policy = Path("/usr/sbin/policy-rc.d")  # services of the packages are not to start
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    try:
        for words in (install, ["apt-get", "update", "-qq"], install):
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            if words == install and done.returncode == 0:
                return
    finally:
        if made:
            policy.unlink()
    raise NoCluster(f"apt-get cannot install {', '.join(missing)}: {done.stderr.strip()[-300:]}")


def can_have_namespaces() -> bool:
    """Whether nodes can have a network and process space of their own."""
    probe = "ip link add slurmprobe type bridge && ip link add sp0 type veth peer name sp1"
    spaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run(["unshare", *spaces, "sh", "-c", probe], capture_output=True)
    return tried.returncode == 0


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise NoCluster(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _free_network() -> int:
    taken = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True).stdout
    return next(
        number
        for number in (secrets.randbelow(250) + 1 for _ in range(1000))
        if f"10.221.{number}." not in taken
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _start_time(pid: int) -> str | None:
    """A process's time of start in the kernel's ticks, or None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _child_of(parent: int) -> int | None:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0]) if children else None


def _wait(condition: Callable[[], object], seconds: float, what: str) -> object:
    """What `condition` gives once it is true; TimeoutError naming `what` is not."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not ready after {seconds} s: {what}")
        time.sleep(0.1)
    return found


def main() -> int:
    """The command: up or down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    try:
        cluster = Cluster(arguments.folder, Settings(nodes=arguments.nodes))
        if arguments.action == "down":
            cluster.down()
        else:
            cluster.up()
            kind = "with" if cluster.namespaces else "without"
            print(f"{len(cluster.nodes)} nodes {kind} namespaces; now: . {cluster.folder}/env.sh")
    except (NoCluster, TimeoutError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
