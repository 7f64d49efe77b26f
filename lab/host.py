"""Boot and stop one host: systemd-nspawn on an overlay root, in the lab's network, in control groups of its own.

One supervisor process a host holds everything that must not outlive it: its mount namespace has the overlay, its
death ends nspawn, and with it the host. What is known of a running host stands in RUN/hosts/<name>.json.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import bytecode
import network
from common import BYTECODE, CACHE, LAB, NETWORK, RUN, SSH_KEY, Host, LabError, run

HOSTS_DIR = CACHE / "hosts"
TRASH = CACHE / "trash"
STATES = RUN / "hosts"
CONTROL_SOCKETS = RUN / "ssh"
BOOT_SECONDS = 90
REBOOT_STATUS = 133
BINDS = {"wheelhouse": "/srv/wheelhouse", "models": "/srv/models"}


@dataclass(frozen=True)
class Running:
    """A host's supervisor (pid and start time, so that a reused pid is not mistaken for it) and its control groups."""

    name: str
    address: str
    pid: int
    started: int
    cgroups: list[str]
    loops: list[str]

    def alive(self) -> bool:
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which a process started; None when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def running(name: str) -> Running | None:
    """What is recorded of a host, whether or not it is alive."""
    try:
        return Running(**json.loads((STATES / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None


def recorded() -> list[Running]:
    return [found for path in sorted(STATES.glob("*.json")) if (found := running(path.stem))]


def _own_cgroups() -> Iterator[Path]:
    """This process's group in every mounted hierarchy."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup":
            mounts.update(dict.fromkeys(options.split(","), mount))
        elif kind == "cgroup2":
            mounts[""] = mount
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (top := mounts.get(controllers.split(",")[0])) is not None:
            yield Path(top + path)


def _make_cgroups(name: str) -> list[str]:
    """A group for this host below ours in every hierarchy: in one group two hosts would end each other's services."""
    made = []
    for parent in _own_cgroups():
        group = parent / f"lab-{name}"
        group.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (parent / file).exists() and (group / file).exists():
                (group / file).write_text((parent / file).read_text())
        if (group / "cpuset.cpus").exists() and (group / "cgroup.clone_children").exists():
            (group / "cgroup.clone_children").write_text("1")
        made.append(str(group))
    return made


def _remove_cgroups(groups: list[str]) -> None:
    """End what is left in the groups and remove them."""
    for top in map(Path, groups):
        for _ in range(100):
            folders = [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]
            for folder in folders:
                for pid in (folder / "cgroup.procs").read_text().split() if (folder / "cgroup.procs").exists() else []:
                    if int(pid):
                        _kill(int(pid), signal.SIGKILL)
                try:
                    folder.rmdir()
                except OSError:
                    continue
            if not top.exists():
                break
            time.sleep(0.05)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _seed(upper: Path, host: Host) -> None:
    """What a host must have before it boots: name, keys, the way to the packages."""

    def put(path: str, text: str, mode: int = 0o644) -> None:
        file = upper / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    upper.chmod(0o755)
    put("etc/hostname", host.name + "\n")
    put("etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n{host.address} {host.name}\n")
    put("etc/machine-id", "")
    put("etc/resolv.conf", "# The lab has no name server: packages come through the proxy, hosts by /etc/hosts.\n")
    put(
        "etc/systemd/network/90-lab.network",
        f"[Match]\nName=host0\n[Network]\nAddress={host.address}/{NETWORK.prefix}\nGateway={NETWORK.gateway}\nIPv6AcceptRA=no\n",
    )
    put(
        "etc/apt/apt.conf.d/90lab-proxy",
        f'Acquire::http::Proxy "{NETWORK.proxy}";\nAcquire::https::Proxy "{NETWORK.proxy}";\n',
    )
    put("etc/ssh/sshd_config.d/lab.conf", "UseDNS no\n")
    put("root/.ssh/authorized_keys", SSH_KEY.with_suffix(".pub").read_text(), 0o600)
    (upper / "root").chmod(0o700)
    (upper / "root/.ssh").chmod(0o700)
    put("usr/local/sbin/lab-init", (LAB / "init").read_text(), 0o755)
    put("usr/lib/python3/dist-packages/citadel_lab_bytecode.py", (LAB / "bytecode.py").read_text())
    put(
        "usr/lib/python3/dist-packages/citadel_lab_bytecode.pth",
        "import citadel_lab_bytecode; citadel_lab_bytecode.install()\n",
    )


def _free_loops(count: int) -> list[str]:
    """Loop devices that nobody uses, highest numbers first: the machine itself takes the lowest."""
    used = {line.split(":")[0] for line in run(["losetup", "-a"]).stdout.splitlines()} if count else set()
    lent = {device for other in recorded() for device in other.loops}
    free = [
        f"/dev/loop{n}"
        for n in range(7, 0, -1)
        if f"/dev/loop{n}" not in used | lent and Path(f"/dev/loop{n}").exists()
    ]
    if len(free) < count:
        raise LabError(f"{count} free loop devices are needed, {len(free)} are left (see losetup -a)")
    return free[:count]


def _nspawn_command(host: Host, root: Path, loops: list[str]) -> list[str]:
    binds = [f"--bind-ro={CACHE / name}:{target}" for name, target in BINDS.items() if (CACHE / name).is_dir()]
    binds.append(f"--bind={BYTECODE}:{bytecode.FOLDER}")
    devices = [f"--bind={device}" for device in ["/dev/loop-control", *loops]] if loops else []
    return [
        "systemd-nspawn", "--quiet", f"--directory={root}", "--register=no", "--keep-unit", f"--machine={host.name}",
        "--kill-signal=SIGRTMIN+3", "--console=pipe", f"--network-bridge={NETWORK.bridge}", *binds, *devices,
        f"--setenv=LAB_ADDRESS={host.address}/{NETWORK.prefix}", f"--setenv=LAB_GATEWAY={NETWORK.gateway}",
        "/usr/local/sbin/lab-init",
    ]  # fmt: skip


def _supervise(host: Host, folder: Path, lower: list[Path], groups: list[str], loops: list[str]) -> None:
    """The supervisor process: mount the root where nobody else sees it, run the host, again after each reboot."""
    os.setsid()
    log = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 1024)
    if not network.inside():
        network.enter()
    network.unshare_mounts()
    run(["mount", "--make-rslave", "/"])
    layers = ":".join(map(str, lower))
    options = f"lowerdir={layers},upperdir={folder / 'upper'},workdir={folder / 'work'},volatile"
    run(["mount", "-t", "overlay", "overlay", "-o", options, folder / "root"])

    def prepare() -> None:
        network.die_with_parent()
        for group in groups:
            (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

    environment = os.environ | {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
    command = _nspawn_command(host, folder / "root", loops)
    while True:
        with subprocess.Popen(command, env=environment, preexec_fn=prepare) as process:
            status = process.wait()
        if status != REBOOT_STATUS:
            return


def up(host: Host, lower: list[Path]) -> None:
    """Boot a host on the given layers (uppermost first) and wait until its systemd is up. Raises LabError."""
    if (found := running(host.name)) and found.alive():
        return
    down(host.name)
    folder = HOSTS_DIR / host.name
    for part in ("upper", "work", "root"):
        (folder / part).mkdir(parents=True)
    BYTECODE.mkdir(exist_ok=True)
    _seed(folder / "upper", host)
    loops, groups = _free_loops(host.loop), _make_cgroups(host.name)
    pid = os.fork()
    if pid == 0:
        try:
            _supervise(host, folder, lower, groups, loops)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    STATES.mkdir(parents=True, exist_ok=True)
    state = Running(host.name, host.address, pid, start_time(pid) or 0, groups, loops)
    (STATES / f"{host.name}.json").write_text(json.dumps(asdict(state)))
    try:
        _wait_until_up(host, folder, pid)
    except BaseException:
        down(host.name)
        raise


def _wait_until_up(host: Host, folder: Path, pid: int) -> None:
    """Until SSH greets and systemd has finished starting."""
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise LabError(f"{host.name} did not boot:\n{(folder / 'console.log').read_text()[-2000:]}")
        if greets(host.address):
            done = subprocess.run(
                ssh_command(host, ["systemctl is-system-running --wait"]), capture_output=True, text=True, check=False
            )
            if done.stdout.strip() in {"running", "degraded"}:
                return
        time.sleep(0.1)
    raise LabError(f"{host.name} was not up after {BOOT_SECONDS} s:\n{(folder / 'console.log').read_text()[-2000:]}")


def greets(address: str) -> bool:
    """Whether an SSH server answers there, asked from inside the lab's network."""
    probe = (
        "import socket,sys\ns=socket.create_connection((sys.argv[1],22),0.5)\nsys.exit(0 if s.recv(3)==b'SSH' else 1)"
    )
    command = inside_command(["python3", "-c", probe, address])
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def inside_command(command: list[str]) -> list[str]:
    """The command, to be run in the lab's network. (`ip netns exec` would hide /sys/fs/cgroup.)"""
    return command if network.inside() else ["nsenter", f"--net={NETWORK.path}", "--", *command]


def ssh_command(host: Host, command: list[str]) -> list[str]:
    """An ssh call to a host as root; host keys are new at each boot, so none is remembered."""
    options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "IdentitiesOnly=yes",
        "ConnectTimeout=5",
    ]
    flags = [word for option in options for word in ("-o", option)]
    return inside_command(["ssh", "-i", str(SSH_KEY), *flags, f"root@{host.address}", *command])


def leader(supervisor: int) -> int | None:
    """The host's PID 1, seen from here: supervisor, its nspawn, that one's child."""
    for nspawn in _children(supervisor):
        for child in _children(nspawn):
            return child
    return None


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _stop_masters(address: str) -> None:
    """End the SSH connections that Ansible keeps open to this address."""
    for path in CONTROL_SOCKETS.glob(f"{address}-*"):
        subprocess.run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", address], capture_output=True, check=False)
        path.unlink(missing_ok=True)


def down(name: str, keep: Path | None = None) -> None:
    """Stop a host and remove every trace of it; with ``keep`` it is shut down in order and its changes move there."""
    state = running(name)
    if state:
        _stop_masters(state.address)
        if state.alive():
            first = leader(state.pid)
            _kill(first or state.pid, signal.SIGRTMIN + 4 if keep and first else signal.SIGKILL)
            _wait_for_end(state, 60 if keep else 5)
        _remove_cgroups(state.cgroups)
        for device in state.loops:
            subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
        (STATES / f"{name}.json").unlink(missing_ok=True)
    folder = HOSTS_DIR / name
    if folder.exists():
        if keep:
            keep.parent.mkdir(parents=True, exist_ok=True)
            (folder / "upper").rename(keep)
        _throw_away(folder)


def _wait_for_end(state: Running, seconds: float) -> None:
    end = time.monotonic() + seconds
    while state.alive():
        if time.monotonic() > end:
            _kill(state.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # booted by another `lab/lab`: not ours to reap
            os.waitpid(state.pid, os.WNOHANG)
        time.sleep(0.05)


def _throw_away(folder: Path) -> None:
    """Rename at once, delete behind: unlinking gigabytes takes seconds."""
    TRASH.mkdir(parents=True, exist_ok=True)
    goal = TRASH / f"{folder.name}-{time.time_ns()}"
    folder.rename(goal)
    subprocess.Popen(["nice", "rm", "-rf", str(goal)], start_new_session=True)


def remove_leftovers() -> None:
    """What a crash may have left: folders without a host and groups without a record."""
    for folder in HOSTS_DIR.glob("*"):
        if not (STATES / f"{folder.name}.json").exists():
            _throw_away(folder)
    for parent in _own_cgroups():
        _remove_cgroups([str(group) for group in parent.glob("lab-*")])
    shutil.rmtree(CONTROL_SOCKETS, ignore_errors=True)
