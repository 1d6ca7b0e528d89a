"""A Docker engine of the tests' own, and stand-ins for images that cannot be fetched, under the names of those."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = "/usr/bin/docker"
"""The distribution's own client, which builds with the engine's BuildKit; another one on PATH may lack a plugin."""
PYTHON_BASE, POSTGRES, REDIS = "python:3.12-slim-bookworm", "postgres:17-bookworm", "redis:7-bookworm"
STAND_INS = Path(__file__).parent / "stand_ins"
CERTIFICATES = Path("/usr/local/share/ca-certificates")
NEEDED = ("dockerd", DOCKER, "docker-compose", "debootstrap")


def missing() -> list[str]:
    """Name what this machine lacks for an engine."""
    lacks = [name for name in NEEDED if shutil.which(name) is None]
    return lacks if os.geteuid() == 0 else [*lacks, "root"]


class Engine:
    """dockerd with everything it keeps in one folder; it leaves the machine's firewall and bridges alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2",
            f"--data-root={self.folder / 'data'}", f"--exec-root={self.folder / 'run'}",
            f"--host=unix://{self.socket}", f"--pidfile={self.folder / 'pid'}",
        ]  # fmt: skip
        with (self.folder / "dockerd.log").open("wb") as log:
            self._daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while self.docker("info", check=False).returncode:
            said = (self.folder / "dockerd.log").read_text(errors="replace")[-3000:]
            assert self._daemon.poll() is None, f"dockerd ended:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.5)

    def stop(self) -> None:
        """End every container and the daemon."""
        if self._daemon is None:
            return
        if running := self.docker("ps", "--quiet", check=False).stdout.split():
            self.docker("kill", *running, check=False)
        self._daemon.terminate()
        self._daemon.wait(60)

    def docker(self, *arguments: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run the docker command against this engine."""
        return self._run([DOCKER, *arguments], check=check, timeout=timeout)

    def run(self, image: str, *command: str, options: tuple[str, ...] = (), check: bool = True) -> str:
        """Run a command in a new container without network; return what it printed."""
        done = self.docker("run", "--rm", "--network", "none", *options, image, *command, check=check)
        return done.stdout + done.stderr

    def compose(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run compose on docker/compose.yaml against this engine."""
        command = ["docker-compose", "--file", str(ROOT / "docker/compose.yaml"), *arguments]
        return self._run(command, check=check, timeout=900, environment=environment)

    def make(self, *arguments: str) -> None:
        """Run make in the project's root against this engine."""
        self._run(["make", "--directory", str(ROOT), f"DOCKER={DOCKER}", *arguments], check=True, timeout=1800)

    def _run(
        self, command: list[str], *, check: bool, timeout: float, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not (check and done.returncode), (
            f"{command}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done

    def has(self, image: str) -> bool:
        """Tell whether the image is here."""
        return self.docker("image", "inspect", image, check=False).returncode == 0

    def make_python_base(self) -> None:
        """Import a small Debian with Python under the name of the CPU target's base."""
        tree = self.folder / "base"
        shutil.rmtree(tree, ignore_errors=True)
        packages = "ca-certificates,python3,python3-venv,python3-pip"
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tree)]
        self._run(bootstrap, check=True, timeout=900)
        _trust(tree)
        _hand_over_pip_settings(tree)
        with subprocess.Popen(["tar", "-C", str(tree), "-c", "."], stdout=subprocess.PIPE) as tar:
            importing = [DOCKER, "import", "-", PYTHON_BASE]
            subprocess.run(importing, stdin=tar.stdout, env=self.environment, capture_output=True, check=True)
        shutil.rmtree(tree)

    def build_stand_in(self, image: str) -> None:
        """Build a stand-in for a database image from Debian's packages, with the same user, volume and settings."""
        name = image.partition(":")[0]
        self.docker(
            "build", "--network", "host", "--build-arg", f"BASE={PYTHON_BASE}", "--tag", image, str(STAND_INS / name)
        )


def _trust(tree: Path) -> None:
    """Let the image trust the certificate authorities that this machine trusts beside Debian's."""
    for certificate in CERTIFICATES.glob("*.crt"):
        shutil.copy(certificate, tree / CERTIFICATES.relative_to("/"))
    subprocess.run(["chroot", str(tree), "update-ca-certificates"], capture_output=True, check=True)


def _hand_over_pip_settings(tree: Path) -> None:
    """Let pip in the image find packages where this machine's does; folders with wheels are copied."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, cwd="/"
    )
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    settings = {key.rsplit(".", 1)[-1].lower(): value.strip("'") for key, _, value in pairs}
    folders = [Path(found) for found in settings.get("find-links", "").split() if Path(found).is_dir()]
    for folder in folders:
        shutil.copytree(folder, tree / folder.relative_to("/"), dirs_exist_ok=True)
    lines = ["[global]", "find-links ="] + [f"    {folder}" for folder in folders]
    lines += [f"index-url = {settings['index-url']}"] if "index-url" in settings else []
    (tree / "etc/pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def running(folder: Path) -> Iterator[Engine]:
    """Run an engine that has the CPU target's base."""
    engine = Engine(folder)
    try:
        engine.start()
        if not engine.has(PYTHON_BASE):
            engine.make_python_base()
        yield engine
    finally:
        engine.stop()
