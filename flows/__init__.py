"""Prefect flows, one per file. Deployment code: it stays out of the wheel, like `tasks`.

Prefect reads its settings when it is first imported, so what memfit wants of it is said here, before any flow is:
nothing phones home, a server that a flow starts for itself has time to come up on a small machine, and runs say often
that they live.
"""

import os

for _name, _value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}.items():
    os.environ.setdefault(_name, _value)
