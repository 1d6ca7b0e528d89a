"""Prefect's log lines in a process that imported Prefect before it was known how they are wanted."""

import os

from prefect.logging.configuration import PROCESS_LOGGING_CONFIG, setup_logging

from flows import JSON_LOGS
from memfit.log_lines import LogFormat, log_format


def follow_log_format() -> None:
    """Have Prefect write JSON on stdout from now on, if $MEMFIT_LOG_FORMAT asks for it and it does not yet."""
    if log_format() is not LogFormat.json:
        return
    for name, value in JSON_LOGS.items():
        os.environ.setdefault(name, value)
    if PROCESS_LOGGING_CONFIG and PROCESS_LOGGING_CONFIG["handlers"]["console"]["formatter"] != "json":
        setup_logging(incremental=False)
