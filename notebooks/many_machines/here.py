"""The same as hosts.sh where virtual hosts cannot be had: N "hosts" that are only processes of this machine, at 127.0.0.1.

    python here.py N -- COMMAND ...

Each finds HOST, HOSTS, HOST_ADDRESS, FIRST_ADDRESS and GLOO_SOCKET_IFNAME in its environment; `kill 1` and `start 1` on standard
input steer. What they lack: a network of their own, so nothing can be slowed down, and ports that this machine has only once.
"""

import os
import signal
import subprocess
import sys
import threading

import psutil

LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Here:
    """The hosts' processes, and the threads that pass on what they print."""

    def __init__(self, count, command):
        self.count, self.command, self.lock = count, command, threading.Lock()
        self.processes, self.readers = {}, []

    def boot(self, host):
        environment = {**os.environ, "HOST": str(host), "HOSTS": str(self.count), "HOST_ADDRESS": "127.0.0.1", "FIRST_ADDRESS": "127.0.0.1"}
        if sys.platform in LOOPBACK:
            environment["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
        process = subprocess.Popen(self.command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.processes[host] = process
        self.readers.append(threading.Thread(target=self.pass_on, args=(host, process.stdout), daemon=True))
        self.readers[-1].start()

    def pass_on(self, host, lines):
        for line in lines:
            self.say(f"[host {host}] {line.rstrip()}")

    def say(self, line):
        with self.lock:
            print(line, flush=True)

    def kill(self, host):
        """End a host with all that runs in it: torchrun puts its ranks into sessions of their own, which the tree still holds."""
        try:
            tree = psutil.Process(self.processes[host].pid)
            for process in [*tree.children(recursive=True), tree]:
                process.kill()
            self.processes[host].wait()
        except psutil.NoSuchProcess:
            pass

    def steer(self, lines):
        for line in lines:
            word, _, host = line.strip().partition(" ")
            host = int(host) if host.isdigit() and int(host) < self.count else None
            lives = host is not None and self.processes[host].poll() is None
            if word == "kill" and lives:
                self.kill(host)
                self.say(f"[host {host}] is killed")
            elif word == "start" and host is not None and not lives:
                self.say(f"[host {host}] starts")
                self.boot(host)
            else:
                self.say(f"here.py: {line.strip()!r} cannot be done: kill HOST that lives, start HOST that does not; hosts are 0 to {self.count - 1}")

    def run(self):
        """Boot all, wait until none lives; 1 when the last run of the command failed in any."""
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
