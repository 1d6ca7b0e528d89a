"""Prefect flows, one per file. Deployment code: it stays out of the wheel, like `tasks`.

Prefect reads its settings when it is first imported, so what memfit wants of it is said here, before any flow is:
nothing phones home, a server that a flow starts for itself has time to come up on a small machine, runs say often that
they live, and log lines are JSON where $MEMFIT_LOG_FORMAT says so.
"""

import os
import sys

from memfit.log_lines import LogFormat, log_format

JSON_LOGS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_STREAM": "ext://sys.stdout",
    "PREFECT_LOGGING_HANDLERS_DEBUG_FORMATTER": "json",
    "PREFECT_LOGGING_HANDLERS_DEBUG_STREAM": "ext://sys.stdout",
    "PREFECT_LOGGING_FORMATTERS_JSON_CLASS": "memfit.log_lines.JsonFormatter",
    "PREFECT_LOGGING_COLORS": "false",
}
"""What makes Prefect's lines JSON. Where Prefect comes first, as in a worker and its flow runs, set it from outside."""

for _name, _value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    **(JSON_LOGS if log_format() is LogFormat.json else {}),
}.items():
    os.environ.setdefault(_name, _value)

if "prefect" in sys.modules:
    from flows.prefect_logs import follow_log_format

    follow_log_format()
