"""What a rank prints arrives: output of Python, of C code and of children, also at a crash."""

import ctypes
import faulthandler
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from cnnlab.launch import output
from cnnlab.launch.failures import RankError
from cnnlab.launch.launcher import ranks
from cnnlab.launch.output import LineForwarder, PipeReader

pytestmark = pytest.mark.usefixtures("nothing_is_left")
needs_files = pytest.mark.skipif(os.name != "posix", reason="pipes are no files on this system")


@needs_files
def test_the_output_of_c_code_and_of_child_processes_is_shown():
    def function():
        faulthandler.enable()
        print("Python", end=" ")
        print("and Python", file=sys.stderr)
        ctypes.CDLL(None).puts(b"C")
        os.system("echo child")
        subprocess.run(["echo", "subprocess"], stdout=sys.stdout, check=True)
        os.write(1, b"no end")
        return sys.stdout.fileno(), sys.stderr.isatty()

    lines = []
    assert ranks(function, 1, say=lines.append) == [(1, False)]
    words = ["Python and Python", "C", "child", "subprocess", "no end"]
    assert lines == [f"[rank 0] {word}" for word in words]


@needs_files
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_no_line_before_a_crash_is_lost(number):
    def function():
        for line in range(1000):
            print(line)
        ctypes.CDLL(None).puts(b"C")
        os.kill(os.getpid(), getattr(signal, number))

    lines = []
    with pytest.raises(RankError):
        ranks(function, 1, say=lines.append)
    assert lines == [f"[rank 0] {line}" for line in (*range(1000), "C")]


@pytest.mark.parametrize("width", [100, 10_000_000])
def test_megabytes_of_output_do_not_block(width):
    def function():
        for _ in range(10_000_000 // width):
            print("x" * width)

    lines = []
    ranks(function, 2, say=lines.append, timeout=60)
    assert len(lines) == 2 * 10_000_000 // width
    assert {len(line) for line in lines} == {len("[rank 0] ") + width}


def test_output_comes_before_the_events_that_follow_it():
    def function():
        print("before")
        return 7

    order = []
    order.append(ranks(function, 1, say=order.append))
    assert order == ["[rank 0] before", [7]]


def test_an_incomplete_line_is_shown_after_a_pause():
    def function():
        print("working ...", end="", flush=True)
        time.sleep(2)
        print(" done")

    lines = []
    ranks(function, 1, say=lines.append)
    assert lines == ["[rank 0] working ...", "[rank 0]  done"]


@needs_files
def test_a_rank_that_closes_its_output_can_still_return_a_value():
    def function():
        print("last words")
        os.closerange(1, 3)
        time.sleep(0.5)
        sys.stdout = sys.stderr = io.StringIO()
        return 7

    lines = []
    assert ranks(function, 1, say=lines.append) == [7]
    assert lines == ["[rank 0] last words"]


@needs_files
def test_characters_may_be_split_between_two_reads():
    reading, writing = multiprocessing.Pipe(duplex=False)
    lines = []
    reader = PipeReader(reading, lines.append)
    for byte in "größer\n\xff".encode():
        os.write(writing.fileno(), bytes([byte]))
        reader.read()
    writing.close()
    reader.finish()
    assert lines == ["größer", "\xff"]


def test_where_pipes_are_no_files_lines_are_sent(monkeypatch):
    monkeypatch.setattr(output, "POSIX", False)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    reading, writing = multiprocessing.Pipe(duplex=False)
    lines = []
    reader = PipeReader(reading, lines.append)
    output.redirect(writing)
    assert isinstance(sys.stdout, LineForwarder)
    print("größer", file=sys.stderr)
    print("no end", end="")
    output.flush()
    writing.close()
    reader.read()
    reader.finish()
    assert lines == ["größer", "no end"]
