"""Signals that end a run from outside: SIGTERM of a scheduler, SIGHUP of a terminal that closes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Windows has no SIGHUP.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ended(KeyboardInterrupt):
    """A signal has come. It is a KeyboardInterrupt, on which Lightning shuts down and ends its ranks."""


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, and the process with 128 + the signal's number.

    Lightning itself ends a run on SIGTERM with exit code 0, as if it were finished, and knows no SIGHUP. A
    second signal ends the process at once. Signals that are ignored, as under nohup, or that have a handler
    of the caller's stay as they are.

    Raises:
        SystemExit: a signal has come, whatever the block raised on it.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        received.append(number)
        raise Ended

    # Python sets handlers in its main thread only.
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in _ENDING if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except BaseException as error:
        if received:
            raise SystemExit(128 + received[0]) from error
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


__all__ = ["Ended", "ending_on_signals"]
