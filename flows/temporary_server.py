"""Prefect's temporary server as memfit starts it: deaf to signals for the flow's process group, and gone with the flow.

python -m flows.temporary_server PORT PARENT
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from flows.parent import when_gone

GRACE_SECONDS = 10.0
"""What an orphaned server gets to write down what it has heard."""


class TemporaryServer(SubprocessASGIServer):
    """The one temporary server of this process: who asks for a client without an API gets this one, once it is made.

    Prefect's own is of the flow's process group: Ctrl-C or a group's SIGTERM ends it first, and the flow then spends
    minutes on telling it how the run ended. And it outlives a flow that is killed.
    """

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        return subprocess.Popen(
            [sys.executable, "-m", "flows.temporary_server", str(self.port), str(os.getpid())],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **own, **settings},
            start_new_session=True,
        )


def main(port: int, parent: int) -> None:
    """Serve Prefect's API on the loopback interface for as long as the parent lives. Ends with 3 if it cannot start."""
    when_gone(parent, _end)
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
