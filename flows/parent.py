"""The process that started this one: a flow run's worker, or a temporary server's flow."""

import os
import threading
import time
from collections.abc import Callable

_CHECK_SECONDS = 0.5


def when_gone(parent: int, act: Callable[[], None]) -> None:
    """Do something once, in a thread of its own, as soon as the parent process has ended.

    The kernel's own message (PR_SET_PDEATHSIG) comes once for every thread of a parent that is killed: to a program
    that takes a second SIGTERM as an order to stop at once, that is one too many.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_CHECK_SECONDS)
        act()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
