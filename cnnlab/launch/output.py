"""The standard output of a rank: complete lines go to the notebook."""

import threading
import time
from collections.abc import Callable

BAR_S = 2.0  # between two states of a progress bar that are shown


class StdoutForwarder:
    """The standard output of a rank: sends complete lines, the last state of overwritten ones."""

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
        """Send an incomplete line; of a progress bar, which flushes each state, only some."""
        with self.lock:
            if "\r" in self.rest:
                if time.monotonic() < self.next_bar:
                    return
                self.next_bar = time.monotonic() + BAR_S
            if self.rest:
                self.write("\n")

    def isatty(self) -> bool:
        return False

    def _send_line(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2]
        if shown.strip() or "\r" not in line:  # A bar that is removed ends with an empty line.
            self.send(shown)
