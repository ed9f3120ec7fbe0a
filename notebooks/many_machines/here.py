"""A fallback for hosts.sh where virtual hosts are not available: each "host" is a local process.

    python here.py N -- COMMAND ...

Each host gets HOST, HOSTS, HOST_ADDRESS, FIRST_ADDRESS and GLOO_SOCKET_IFNAME in its environment.
`kill 1` and `start 1` on standard input control the hosts, as in hosts.sh. All hosts share the
loopback network at 127.0.0.1, so it cannot be slowed down, and no two of them can use one port.
"""

import os
import signal
import subprocess
import sys
import threading

import psutil

LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Here:
    """The processes of the hosts, and the threads that forward their output."""

    def __init__(self, count, command):
        self.count = count
        self.command = command
        self.lock = threading.Lock()
        self.processes = {}
        self.readers = []

    def boot(self, host):
        environment = {
            **os.environ,
            "HOST": str(host),
            "HOSTS": str(self.count),
            "HOST_ADDRESS": "127.0.0.1",
            "FIRST_ADDRESS": "127.0.0.1",
        }
        if sys.platform in LOOPBACK:
            environment["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
        process = subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes[host] = process
        reader = threading.Thread(target=self.forward, args=(host, process.stdout), daemon=True)
        self.readers.append(reader)
        reader.start()

    def forward(self, host, lines):
        for line in lines:
            self.say(f"[host {host}] {line.rstrip()}")

    def say(self, line):
        with self.lock:
            print(line, flush=True)

    def kill(self, host):
        """Kill the host's process and all its descendants.

        Killing its process group would not be enough: torchrun starts each rank in a new session.
        """
        try:
            host_process = psutil.Process(self.processes[host].pid)
            for process in [*host_process.children(recursive=True), host_process]:
                process.kill()
            self.processes[host].wait()
        except psutil.NoSuchProcess:
            pass

    def steer(self, lines):
        """Carry out the commands `kill HOST` and `start HOST`, one per line."""
        for line in lines:
            word, _, host = line.strip().partition(" ")
            host = int(host) if host.isdigit() and int(host) < self.count else None
            running = host is not None and self.processes[host].poll() is None
            if word == "kill" and running:
                self.kill(host)
                self.say(f"[host {host}] is killed")
            elif word == "start" and host is not None and not running:
                self.say(f"[host {host}] starts")
                self.boot(host)
            else:
                self.say(
                    f"here.py: {line.strip()!r} is not possible. Use `kill HOST` for a host that "
                    "is running, or `start HOST` for one that is not. "
                    f"Hosts are 0 to {self.count - 1}."
                )

    def run(self):
        """Boot all hosts and wait for their end. Returns 1 if the last run on any host failed."""
        try:
            for host in range(self.count):
                self.boot(host)
            threading.Thread(target=self.steer, args=(sys.stdin,), daemon=True).start()
            while any(process.poll() is None for process in list(self.processes.values())):
                threading.Event().wait(0.05)
            for reader in self.readers:
                reader.join(5)
            return int(any(process.returncode for process in self.processes.values()))
        finally:
            for host in self.processes:
                self.kill(host)


if __name__ == "__main__":
    if len(sys.argv) < 4 or not sys.argv[1].isdigit() or sys.argv[2] != "--":
        sys.exit("Usage: here.py N -- COMMAND ...")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(Here(int(sys.argv[1]), sys.argv[3:]).run())
