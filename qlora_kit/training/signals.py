"""Stopping cleanly: the first SIGINT or SIGTERM asks, the second stops at once. Imported by: training.loop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from qlora_kit.console import note


class StopRequest:
    """Becomes true when a signal has asked the run to stop."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM set the yielded request instead of ending the process."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            os._exit(128 + number)  # asked twice: what is durable stays, nothing else is waited for
        request.signal_number = number
        note("stopping: the state is saved after this micro-batch; a second signal stops at once")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
