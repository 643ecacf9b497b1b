"""Processes that end when the one that started them does, however it ended; a killed one cannot end its children."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import wait

CHECK_SECONDS = 1.0
SAVING_SECONDS = 600.0  # that a process has after the signal, as under a scheduler


def end_with_parent() -> None:
    """In a worker process: exit at once when the process that uses it ends, also in the middle of a computation.

    Asking the system for a signal (PR_SET_PDEATHSIG) would not do: the parent of a worker is the fork server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])  # a pipe, whose other end the system closes
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def stop_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """In a process of torchrun: send SIGTERM to this process when torchrun is gone, so that it saves and ends."""
    if "TORCHELASTIC_RUN_ID" not in environment or not hasattr(os, "getppid"):
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="stop-with-launcher").start()
