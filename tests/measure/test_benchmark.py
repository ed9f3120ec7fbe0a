"""The timer: what it calls, how often, and how it reports failures."""

from helpers import ordered

from cnnlab.measure import benchmark


def test_functions_run_interleaved_and_the_first_call_is_separate():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = benchmark.benchmark_interleaved(functions, "cpu", 3, calls=2)
    assert "".join(order) == "ab" + "aabb" * 3
    assert found["a"]["n"] == 3 and ordered(found["a"]) and ordered(found["b"])


def test_a_gpu_has_more_warmup_calls():
    calls = []
    benchmark.benchmark_interleaved({"a": lambda: calls.append(1)}, "cuda", 2)
    assert len(calls) == 1 + benchmark.WARMUP_CALLS + 2


def test_repeats_stop_when_time_is_up_but_not_before_the_second():
    found = benchmark.benchmark_interleaved({"a": lambda: None}, "cpu", 50, seconds=0)
    assert found["a"]["n"] == 2


def test_a_function_that_fails_does_not_affect_the_others():
    def fails():
        raise RuntimeError("out of\n memory")

    found = benchmark.benchmark_interleaved({"bad": fails, "good": lambda: None}, "cpu", 2)
    assert found["bad"] == {"failed": "RuntimeError: out of memory"} and ordered(found["good"])
    assert list(found) == ["bad", "good"]


def test_a_call_has_returned_before_the_device_has_finished(monkeypatch):
    """On a synthetic clock: the call takes 2 s, and the device needs 10 s more."""
    now = 0.0

    def call():
        nonlocal now
        now += 2.0

    def synchronized_clock():
        nonlocal now
        now += 10.0
        return now

    monkeypatch.setattr(benchmark, "timer", synchronized_clock)
    monkeypatch.setattr(benchmark, "default_timer", lambda: now)
    assert benchmark.time_call(call, calls=4) == (8.0 / 4, 18.0 / 4)
