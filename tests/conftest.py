"""What every test finds: few threads, no terminal tricks, no downloads, nothing left behind."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A script's background jobs begin with SIGINT ignored, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Data and caches of the person who runs the tests do not reach them."""
    monkeypatch.delenv("COATNET_DATA_DIR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "110")
