"""What a rank prints: a pipe takes it to the notebook, which shows complete lines."""

import codecs
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

BAR_S = 2.0  # between two states of a progress bar that are shown
PAUSE_S = 0.3  # after such a pause, an incomplete line is shown
CAPACITY = 2**20  # bytes; more than a pipe holds
LINE_BUFFERED = 1  # _IOLBF of C's setvbuf
POSIX = os.name == "posix"


def redirect(pipe: Connection) -> None:
    """Send what this process, its C code and its child processes print into `pipe`.

    On Windows, whose pipes are no files, only what Python code of this process prints.
    """
    output: Any
    if not POSIX:
        output = LineForwarder(lambda line: pipe.send_bytes(f"{line}\n".encode()))
        sys.stdout = sys.stderr = output
        return
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    pipe.close()
    output = os.fdopen(
        1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    sys.stdout = sys.stderr = output
    with suppress(ValueError, AttributeError):  # another C library: `flush` is enough
        c_library = ctypes.CDLL(None)
        name = "__stdoutp" if sys.platform == "darwin" else "stdout"
        stdout = ctypes.c_void_p.in_dll(c_library, name)
        c_library.setvbuf(stdout, None, LINE_BUFFERED, ctypes.c_size_t(0))


def flush() -> None:
    """Write what Python and C have buffered."""
    sys.stdout.flush()
    if POSIX:
        ctypes.CDLL(None).fflush(None)


class LineForwarder:
    """Sends each complete line of a text, and the last state of an overwritten one."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self.send = send
        self.rest = ""  # an incomplete line
        self.next_bar = time.monotonic() + BAR_S
        self.lock = threading.RLock()

    def write(self, text: str) -> int:
        with self.lock:
            *lines, rest = (self.rest + text).split("\n")
            for line in lines:
                self._send_line(line)
            overwritten, _, last = rest.rpartition("\r")
            self.rest = "\r" + last if overwritten and last else rest
        return len(text)

    def flush(self) -> None:
        """Send an incomplete line; of a progress bar only some states."""
        with self.lock:
            if "\r" in self.rest:
                if time.monotonic() < self.next_bar:
                    return
                self.next_bar = time.monotonic() + BAR_S
            if self.rest.strip():
                self._send_line(self.rest)
                self.rest = "\r"  # What follows belongs to a line that has been shown.

    def isatty(self) -> bool:
        return False

    def _send_line(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2]
        if shown.strip() or "\r" not in line:  # A bar that is removed ends with an empty line.
            self.send(shown)


class PipeReader:
    """The notebook's end of the pipe of a rank, which sends its lines to `send`."""

    def __init__(self, pipe: Connection, send: Callable[[str], None]) -> None:
        self.pipe = pipe
        self.lines = LineForwarder(send)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if POSIX:
            os.set_blocking(pipe.fileno(), False)

    def read(self) -> None:
        """Take everything that is in the pipe now."""
        if self.pipe.closed:
            return
        data = self._read_bytes()
        self.lines.write(self.decoder.decode(data))
        if "\r" in self.lines.rest:
            self.lines.flush()

    def finish(self) -> None:
        """Take the rest, also an incomplete line."""
        self.read()
        self.lines.next_bar = 0
        self.lines.flush()
        self.pipe.close()

    def _read_bytes(self) -> bytes:
        try:
            if not POSIX:
                return self.pipe.recv_bytes() if self.pipe.poll() else b""
            data = os.read(self.pipe.fileno(), CAPACITY)
        except BlockingIOError:  # The pipe is empty.
            return b""
        except (EOFError, BrokenPipeError):
            data = b""
        if not data:  # Nobody can write to it any more.
            self.pipe.close()
        return data
