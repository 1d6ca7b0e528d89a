"""A Prefect server of a test's own, its worker, and the prefect command pointed at it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what the condition does once it is true; fail when the time is up."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds} s still no {what}"
        time.sleep(0.1)
    return found


def alive_with(marker: str) -> dict[int, str]:
    """Return pid and command line of the living processes that carry a text in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ, stat = (folder / "environ").read_bytes(), (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if marker.encode() in environ and stat.rsplit(")")[1].split()[0] != "Z":
            found[int(folder.name)] = command.replace(b"\0", b" ").decode()
    return found


class Service:
    """A server and what runs beside it: every process carries the folder's path in its environment."""

    def __init__(self, folder: Path, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.root = folder, root
        self.url = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMFIT_"))}
        self.environment = {
            **kept,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES_ON_DISK,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "COLUMNS": "200",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start_server(self) -> subprocess.Popen[bytes]:
        """Start the server, or start it again, and wait until it answers."""
        server = self.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_until(lambda: self.up() or server.poll() is not None, 120, "Prefect server")
        assert server.poll() is None, self.log("server")
        return server

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start a process worker on the pool of prefect.yaml."""
        options = ["--pool", "memfit-process", "--type", "process"]
        return self.start("worker", "worker", "start", *options, MEMFIT_HOME=str(self.root))

    def start_stoppable_worker(self) -> subprocess.Popen[bytes]:
        """Start a process worker as memfit's image does."""
        paths = {"MEMFIT_HOME": str(self.root), "PYTHONPATH": str(self.root)}
        return self.start("worker", "--pool", "memfit-process", module="flows.start_worker", **paths)

    def start(self, name: str, *arguments: str, module: str = "prefect", **extra: str) -> subprocess.Popen[bytes]:
        """Start a command that stays, of prefect or another module, in a process group of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.folder,
                env={**self.environment, **extra},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End what was started, the last first, and whatever those had started."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """End at once what was started, and whatever carries its mark: runs that a failed test left."""
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.started(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a prefect command to its end, in the repository."""
        line = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return subprocess.run(line, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=300)

    def deploy(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run what `make deploy` runs, in the repository."""
        line = [sys.executable, "-W", "error", "-m", "flows.install_deployments", *arguments]
        environment = {**self.environment, **extra}
        return subprocess.run(line, cwd=self.root, env=environment, capture_output=True, text=True, timeout=300)

    def started(self, part: str) -> dict[int, str]:
        """Return pid and command line of what runs here now and has a text in its command line."""
        home = self.environment["PREFECT_HOME"]
        return {pid: command for pid, command in alive_with(home).items() if part in command}

    def get(self, path: str) -> Any:
        return self._ask("GET", path).raise_for_status().json()

    def post(self, path: str, document: Any) -> httpx.Response:
        return self._ask("POST", path, json=document)

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Ask the API, again if it is busy (SQLite is locked), as Prefect's own client does."""
        for _ in range(20):
            answer = httpx.request(method, f"{self.url}{path}", timeout=30, **content)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        return answer

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()
