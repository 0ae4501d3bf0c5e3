"""An EC2 instance with an operating system of its own: Debian, booted by systemd-nspawn.

tests/machine.sh has made the system's root, which all machines share and none changes: what a machine writes lies on
a layer of its own above it, and an image is a copy of such a layer. The network is that of the tests, loopback only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from local_cloud import REGION, LocalCloud, Machine
from workplace import await_that

ROOM = Path(__file__).resolve().parent / "room"
SEED = "/var/lib/cloud/seed/nocloud"
LEDGER = "/var/tmp/ledger"
HOME = Path("home/ubuntu/comfy")
SHUTDOWN_S = 180.0
BOOT_S = 300.0


class RealMachine(Machine):
    """One EC2 instance: a disk, a metadata service, and systemd as its first process."""

    before_boot: ClassVar[Callable[[RealMachine], None] | None] = None
    """A scene sets it: what to change on a new instance's disk before it is switched on."""

    def __init__(self, cloud: LocalCloud, instance_id: str, folder: Path) -> None:
        super().__init__(cloud, instance_id, folder)
        self.layer, self.root = folder / "layer", folder / "root"
        self.home = self.root / HOME
        self.shared: dict[Path, str] = {}  # folders of the host, and where the machine sees them
        self._process: subprocess.Popen[bytes] | None = None
        self._switching = threading.Lock()

    # --- Disk -----------------------------------------------------------------------------------------------

    def insert_disk(self, image: Path | None = None) -> None:
        """A disk that is what the image is, or a bare one."""
        for folder in (self.layer, self.root, self.folder / "work"):
            folder.mkdir(parents=True)
        below = [str(image)] if image else []
        below += [f"{os.environ['MACHINE_PLACE']}/ground", os.environ["MACHINE_ROOT"]]
        options = f"lowerdir={':'.join(below)},upperdir={self.layer},workdir={self.folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def copy_disk(self, image: Path) -> None:
        """Make an image of it: what is mounted on the machine is mounted in there only."""
        image.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", str(self.layer), str(image)], check=True)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file on the disk, from outside."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def drop_in(self, **variables: str | int) -> None:
        """Have both services see more variables: limits of seconds instead of minutes."""
        words = " ".join(f'"{name}={value}"' for name, value in variables.items())
        for unit in ("comfyui", "comfy-manage"):
            self.write(f"/etc/systemd/system/{unit}.service.d/scene.conf", f"[Service]\nEnvironment={words}\n")

    def set(self, **settings: str | int) -> None:
        """Settings that are this machine's from its first boot."""
        lines = (self.home / "env").read_text().splitlines()
        kept = [line for line in lines if line.partition("=")[0] not in settings]
        new = [f"{name}={value}" for name, value in settings.items()]
        (self.home / "env").write_text("\n".join([*kept, *new]) + "\n")

    def seed(self, user_data: str = "", vendor_data: str = "") -> None:
        """What cloud-init finds where on EC2 it asks the metadata service."""
        self.write(f"{SEED}/meta-data", f"instance-id: {self.instance_id}\nlocal-hostname: {self.instance_id}\n")
        self.write(f"{SEED}/user-data", user_data)
        self.write(f"{SEED}/vendor-data", vendor_data)

    # --- Power ----------------------------------------------------------------------------------------------

    def variables(self) -> dict[str, str]:
        """What every process there sees. On EC2 it needs none: AWS is where AWS is."""
        return {
            "STANDIN_LEDGER": LEDGER,
            "AWS_ENDPOINT_URL": self.cloud.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_endpoint,
            "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "10",
            "AWS_METADATA_SERVICE_TIMEOUT": "5",
            "BOOTED_AT": str(self.booted_at),  # the kernel is the host's
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "COMFY_ADDRESS": f"127.0.0.1:{self.comfy_port}",  # all machines have one loopback
        }

    def boot(self, image: Path, user_data: str) -> None:
        """The first boot of an instance of a group."""
        self.metadata["autoscaling/target-lifecycle-state"] = "InService"
        self.metadata["user-data"] = user_data

        def start() -> None:
            self.insert_disk(image)
            self.seed(user_data)
            if RealMachine.before_boot is not None:
                RealMachine.before_boot(self)
            with self._switching:
                if not self.off.is_set():
                    self.power_on()

        threading.Thread(target=start, daemon=True).start()

    def power_on(self) -> None:
        """Switch it on. It boots by itself; nothing is awaited."""
        self.booted_at = int(time.time())
        words = " ".join(f'"{name}={value}"' for name, value in self.variables().items())
        self.write("/etc/systemd/system.conf.d/local-cloud.conf", f"[Manager]\nDefaultEnvironment={words}\n")
        command = [
            *("systemd-nspawn", "--boot", "--directory", str(self.root), "--machine", self.instance_id),
            *("--register=no", "--keep-unit", "--network-namespace-path=/proc/self/ns/net"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
            f"--bind={Path(os.environ['MACHINE_PLACE']) / 'fuse'}:/dev/fuse",
            *(f"--bind-ro={folder}:{place}" for folder, place in self.shared.items()),
        ]
        # A control group of its own, as systemd-nspawn without a manager of machines puts each of its machines into
        # the same place below ours.
        groups = own_control_groups(self.instance_id)
        into = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        with (self.side / "console").open("ab") as console:
            self._process = subprocess.Popen(
                ["/bin/sh", "-ec", f'{into}exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self.booted = True

    def leader(self) -> int | None:
        """The process that is the first one on the machine, None as long as there is none."""
        process = self._process
        if process is None or process.poll() is not None:
            return None
        with suppress(OSError):
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        return None

    def await_boot(self) -> None:
        """Wait until systemd has started all that it starts at boot, cloud-init's stages too."""
        await_that(f"{self.instance_id} has a disk and is on", lambda: self.booted and self.leader(), BOOT_S)

        def is_up() -> bool:
            said = self.try_to("systemctl is-system-running", user="root").stdout.strip()
            return said in ("running", "degraded")

        await_that(f"{self.instance_id} has booted", is_up, BOOT_S)

    def reboot(self) -> None:
        """As from a shell on it. Without a manager of machines systemd-nspawn leaves switching it on again to us."""
        assert self._process is not None
        self.run("systemctl reboot", user="root")
        self._process.wait(SHUTDOWN_S)
        self.power_on()

    def shut_down(self) -> None:
        """Shut it down as AWS does, by the power button."""
        process, leader = self._process, self.leader()
        if process is not None:
            if leader is not None:
                os.kill(leader, signal.SIGRTMIN + 4)
            try:
                process.wait(SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                self.pull_the_plug()

    def pull_the_plug(self) -> None:
        """No process there has another moment. Returns when none is left, whose long poll might else take a message."""
        process, leader = self._process, self.leader()
        if process is None:
            return
        if leader is None:  # it is just being switched on
            process.kill()
        else:
            os.kill(leader, signal.SIGKILL)
        process.wait(SHUTDOWN_S)

    def end(self) -> None:
        """End the instance without another word from it."""
        self.off.set()
        with self._switching:
            self.pull_the_plug()
        self.end_metadata()

    def switch_off(self) -> threading.Thread:
        """End the instance. Returns the thread that does it."""
        self.off.set()

        def end() -> None:
            with self._switching:
                self.shut_down()
            self.end_metadata()

        thread = threading.Thread(target=end)
        thread.start()
        return thread

    def state(self) -> dict[str, Any]:
        """For the demo's and the tests' words."""
        return {"on": self.is_on(), "booted": self.booted, "services": {}, "comfy_port": self.comfy_port}

    # --- A shell on it --------------------------------------------------------------------------------------

    def try_to(
        self, script: str, *, user: str = "ubuntu", said: str = "", limit_s: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a Bash script there as in a shell of that user, in its home. `said` is what is typed meanwhile."""
        leader = self.leader()
        assert leader is not None, f"{self.instance_id} is off"
        words = [f"{name}={value}" for name, value in self.variables().items()]
        home = "/root" if user == "root" else f"/home/{user}"
        return subprocess.run(
            [
                *("nsenter", "--all", "--target", str(leader), "--", "setpriv", "--init-groups"),
                *(f"--reuid={user}", f"--regid={user}", "--reset-env", "env", f"--chdir={home}", *words),
                *("LANG=C.UTF-8", "bash", "-c", script),
            ],
            input=said,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def run(self, script: str, *, user: str = "ubuntu", said: str = "", limit_s: float = 600.0) -> str:
        """Like try_to, for what must succeed. Returns what it printed."""
        done = self.try_to(script, user=user, said=said, limit_s=limit_s)
        assert done.returncode == 0, f"on {self.instance_id}: {script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def property(self, unit: str, name: str) -> str:
        """What systemd knows of a unit, such as its MainPID."""
        return self.run(f"systemctl show --property={name} --value {unit}", user="root").strip()

    def journal(self, unit: str = "", *options: str) -> str:
        """What the machine, or one unit, has said in all its boots. It may be off.

        The image brought along what the base machine had said.
        """
        command = ["journalctl", f"--directory={self.root}/var/log/journal", "--output=short-monotonic", "--no-pager"]
        command += [f"_HOSTNAME={self.instance_id}", *([f"--unit={unit}"] if unit else [])]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def ended_badly(self) -> str:
        """For a scene that failed: what this machine said."""
        parts = [f"===== {self.instance_id} ====="]
        output = self.root / "var/log/cloud-init-output.log"
        if output.exists():
            parts += ["--- cloud-init", *output.read_text(errors="replace").splitlines()[-20:]]
        for unit in ("comfyui", "comfy-manage"):
            parts += [f"--- {unit}", *self.journal(unit).splitlines()[-60:]]
        return "\n".join(parts)


def own_control_groups(name: str) -> list[Path]:
    """A control group for one machine in each hierarchy that systemd uses (one of them, or two side by side)."""
    top = Path("/sys/fs/cgroup")
    found = [top] if (top / "cgroup.procs").exists() else [top / "systemd", top / "unified"]
    groups = [hierarchy / f"comfy-{os.environ['MACHINE_RUN']}-{name}" for hierarchy in found if hierarchy.is_dir()]
    for group in groups:
        group.mkdir(exist_ok=True)
    return groups


def lay_ground(folder: Path) -> None:
    """What every machine's disk has above Debian: the room's files, with their owners and modes."""
    shutil.copytree(ROOM, folder, dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, 0)
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
