"""Ctrl-C at the command line: not lost where somebody swallows it, and always the same exit code.

Python raises KeyboardInterrupt wherever the program happens to be. In a weak reference's callback,
or inside a library's ``except BaseException``, it vanishes; having passed through ``exec`` it makes
CPython end the process by the signal, whoever has caught it meanwhile.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

__all__ = ["Interrupted", "check", "handled", "watch"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, as a class of its own: in ``exec`` CPython looks for KeyboardInterrupt itself."""


_pending = False


def watch() -> None:
    """Has Ctrl-C raise :class:`Interrupted` from now on.

    Does nothing outside the main thread, or where the signal is ignored or has a handler already.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = True
    raise Interrupted


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    # It will be raised again, and needs no traceback of its own.
    if not isinstance(lost.exc_value, Interrupted):
        sys.__unraisablehook__(lost)


def check() -> None:
    """Raises an interrupt that nobody has :func:`handled`."""
    if _pending:
        raise Interrupted


def handled() -> None:
    """To be called by whoever catches an interrupt and does as it says."""
    global _pending
    _pending = False
