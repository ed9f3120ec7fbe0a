"""Send messages from host 0 to host 1 and back, and print latency and bandwidth of the network."""

import os
import socket
import statistics
import time

LARGE = 250_000  # bytes
FIRST = os.environ["HOST"] == "0"


def connect():
    where = (os.environ["FIRST_ADDRESS"], int(os.environ["PORT"]))
    if FIRST:
        server = socket.create_server(where)
        server.settimeout(60)
        return server.accept()[0]
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(where, timeout=60)
        except OSError:  # Host 0 is not listening yet.
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def receive(connection, size):
    while size:
        received = len(connection.recv(min(size, 2**20)))
        if not received:
            raise ConnectionError("the other host is gone")
        size -= received


def one_way_seconds(connection, size):
    """Half of the time of a message there and back."""
    start = time.perf_counter()
    if FIRST:
        connection.sendall(bytes(size))
    receive(connection, size)
    if not FIRST:
        connection.sendall(bytes(size))
    return (time.perf_counter() - start) / 2


connection = connect()
connection.settimeout(60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Send short messages at once.
medians = []
for size in (1, LARGE):
    times = [one_way_seconds(connection, size) for _ in range(9)]
    medians.append(statistics.median(times[2:]))
if FIRST:
    alpha, large = medians
    print(f"latency {alpha:.9f} s, bandwidth {LARGE / max(large - alpha, 1e-9):.0f} bytes/s")
