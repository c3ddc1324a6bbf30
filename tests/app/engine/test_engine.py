"""The engine with a stand-in model: order, limits, cancelling, failures, switching, disconnects."""

import ctypes
import threading
import time

import pytest
import torch

from app.compare.request import CompareRequest
from app.engine.engine import Engine, EngineBusyError
from app.engine.job import Job
from app.prompts.request import PromptsRequest
from app.tab.examples import EXAMPLES
from tests.support.asked import compare_asked, prompts_asked
from tests.support.bench import Bench, until
from turboquant.records.comparison import Settings
from turboquant.records.faults import out_of_memory
from turboquant.run.compare import Event

SETTINGS = Settings(max_new_tokens=8, temperature=0.0, top_p=1.0, top_k=0, seed=0)


def request(prompt: str = "hello", model: str = "a") -> CompareRequest:
    return compare_asked(prompt, SETTINGS, model)


def long_request(*prompts: str, model: str = "a") -> PromptsRequest:
    return prompts_asked(prompts, SETTINGS, model)


def test_jobs_run_first_in_first_out(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    jobs = [engine.submit(f"s{i}", request(f"p{i}")) for i in range(3)]
    until(lambda: jobs[0].view.state == "running")
    assert [engine.ahead(job) for job in jobs] == [0, 1, 2]
    bench.hold_run.set()
    assert all(job.wait(5) for job in jobs)
    assert bench.served == ["p0", "p1", "p2"]
    assert [job.view.state for job in jobs] == ["done"] * 3
    assert bench.loads == ["a"]


def test_one_live_job_a_session(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    first = engine.submit("me", request())
    with pytest.raises(EngineBusyError, match=r"already at work in this tab \(Compare\)"):
        engine.submit("me", request("again"))
    other = engine.submit("you", request())
    bench.hold_run.set()
    assert first.wait(5)
    assert other.wait(5)
    assert engine.submit("me", request("again")).wait(5)


def test_a_full_queue_refuses(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    running = engine.submit("s", request())
    until(lambda: running.view.state == "running")
    for i in range(3):
        engine.submit(f"s{i}", request())
    with pytest.raises(EngineBusyError, match="3 runs are waiting"):
        engine.submit("late", request())


def test_cancel_a_queued_job_at_once(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    running = engine.submit("a", request("first"))
    queued = engine.submit("b", request("second"))
    until(lambda: running.view.state == "running")
    engine.cancel(queued)
    assert queued.view.state == "stopped"
    bench.hold_run.set()
    assert running.wait(5)
    assert bench.served == ["first"]


def test_cancel_a_running_job_keeps_what_it_has(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    job = engine.submit("a", request())
    until(lambda: job.view.sides[0].tokens == 4)
    begun = time.monotonic()
    engine.cancel(job)
    assert job.wait(1)
    assert time.monotonic() - begun < 1
    assert job.view.state == "stopped"
    (comparison,) = job.results[0]
    assert comparison.original.finish == "cancelled"
    assert job.view.sides[0].text == " word1 word2 word3 word4"


def test_cancel_while_loading_frees_the_worker(engine: Engine, bench: Bench) -> None:
    bench.hold_load.clear()
    job = engine.submit("a", request())
    until(lambda: job.view.state == "loading")
    assert job.view.phase == "Reading a"
    engine.cancel(job)
    assert job.view.state == "stopped"
    bench.hold_load.set()
    assert engine.submit("a", request("next")).wait(5)
    assert bench.served == ["next"]


def test_a_failed_load_is_told_and_not_remembered(engine: Engine, bench: Bench) -> None:
    bench.load_error = LookupError("cannot reach the hub; these models are on this machine: a")
    job = engine.submit("a", request())
    assert job.wait(5)
    assert job.view.state == "failed"
    assert job.view.error == "cannot reach the hub; these models are on this machine: a"
    bench.load_error = None
    again = engine.submit("a", request())
    assert again.wait(5)
    assert again.view.state == "done"
    assert bench.loads == ["a", "a"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_frees_the_model_and_the_next_job_works(
    engine: Engine, bench: Bench, error: BaseException
) -> None:
    assert out_of_memory(error)
    bench.run_error = error
    job = engine.submit("a", request())
    assert job.wait(5)
    assert "Not enough memory" in str(job.view.error)
    bench.run_error = None
    until(lambda: bench.resident == 0)
    again = engine.submit("a", request())
    assert again.wait(5)
    assert again.view.state == "done"


def test_an_unexpected_failure_is_logged_and_summarised(
    engine: Engine, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run_error = ValueError("secret inside")
    job = engine.submit("a", request())
    assert job.wait(5)
    assert "ValueError" in str(job.view.error)
    assert "secret" not in str(job.view.error)
    until(lambda: any(record.exc_info for record in caplog.records))


def test_two_models_are_never_resident_at_once(engine: Engine, bench: Bench) -> None:
    jobs = [engine.submit(f"s{name}", request(model=name)) for name in "abc"]
    assert all(job.wait(5) for job in jobs)
    jobs = [engine.submit(f"t{name}", request(model=name)) for name in "cab"]
    assert all(job.wait(5) for job in jobs)
    assert bench.loads == ["a", "b", "c", "a", "b"]
    assert bench.most_resident == 1


def test_warm_up_loads_without_a_job_and_a_failure_is_harmless(engine: Engine, bench: Bench) -> None:
    bench.load_error = LookupError("no")
    engine.warm_up("a", "auto")
    until(lambda: bench.loads == ["a"])
    bench.load_error = None
    engine.warm_up("a", "auto")
    until(lambda: engine.status().state == "ready")
    assert engine.status().weights == "fp32"
    assert engine.submit("s", request()).wait(5)
    assert bench.loads == ["a", "a"]


def test_a_closed_tab_is_cancelled_after_the_grace(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    job = engine.submit("gone", request())
    until(lambda: job.view.state == "running")
    engine.disconnect("gone")
    assert job.wait(2)
    assert job.view.state == "stopped"
    assert engine.job("gone") is None


def test_a_reconnect_in_time_keeps_the_job(engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace is long enough here that a busy machine cannot let it run out between the two calls."""
    monkeypatch.setattr(engine, "_grace_s", 2.0)
    bench.hold_run.clear()
    job = engine.submit("back", request())
    engine.disconnect("back")
    engine.connect("back")
    assert not job.wait(2.5)
    bench.hold_run.set()
    assert job.wait(5)
    assert job.view.state == "done"
    assert engine.job("back") is job


def test_the_estimate_comes_from_runs_that_ended(engine: Engine, bench: Bench) -> None:
    first = engine.submit("a", request())
    assert engine.estimate_s(first) is None
    assert first.wait(5)
    bench.hold_run.clear()
    running, queued = engine.submit("b", request()), engine.submit("c", request())
    until(lambda: running.view.state == "running")
    assert (engine.estimate_s(queued) or 0) > 0


def test_a_late_reader_sees_everything_and_heartbeats_come() -> None:
    job = Job("s", request())
    for step in range(1, 4):
        job.publish(Event("token", "original", "x" * step, step, 10 * step))
    job.publish(Event("token", "compressed", "y", 1, 5))
    stream = job.stream(poll=0.01, pause=0)
    first = next(stream)
    assert [side.text for side in first.sides] == ["xxx", "y"]
    assert next(stream) is first
    job.finish("done")
    job.finish("failed", error="too late")
    assert [view.state for view in stream] == ["done"]
    assert job.view.error is None


def test_a_short_run_waits_for_one_item_of_a_long_one(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    long = engine.submit("set", long_request("l0", "l1", "l2"))
    until(lambda: bench.served == ["l0"])
    short = engine.submit("me", request("s"))
    assert engine.ahead(short) == 1
    bench.hold_run.set()
    assert short.wait(5)
    assert long.wait(5)
    assert bench.served == ["l0", "s", "l1", "l2"]
    assert [long.results[i].prompt for i in range(3)] == ["l0", "l1", "l2"]
    assert long.view.state == "done"
    assert long.fraction == 1


def test_a_long_run_is_not_passed_for_ever(engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_max_queue", 20)
    bench.hold_run.clear()
    first = engine.submit("x", request("first"))
    until(lambda: bench.served == ["first"])
    engine.submit("set", long_request("l0", "l1"))
    jobs = [engine.submit(f"s{i}", request(f"s{i}")) for i in range(6)]
    bench.hold_run.set()
    assert all(job.wait(5) for job in (first, *jobs))
    assert bench.served.index("l0") == 5  # behind four short runs
    assert bench.served.index("l1") > bench.served.index("s5")


def test_long_runs_take_turns(engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.queue.TURN_S", 0.0)
    bench.hold_run.clear()
    jobs = [engine.submit("a", long_request("a0", "a1"))]
    until(lambda: bench.served == ["a0"])
    jobs.append(engine.submit("b", long_request("b0", "b1", model="b")))
    bench.hold_run.set()
    assert all(job.wait(5) for job in jobs)
    assert bench.served == ["a0", "b0", "a1", "b1"]
    assert bench.most_resident == 1


def test_stopping_a_long_run_keeps_its_results(engine: Engine, bench: Bench) -> None:
    job = engine.submit("a", long_request("p0", "p1", "p2"))
    assert job.wait(5)
    bench.hold_run.clear()
    job = engine.submit("a", long_request("p0", "p1", "q2", "q3"))
    until(lambda: bench.served[-1] == "q2")
    assert job.cached == {0, 1}
    engine.cancel(job)
    assert job.wait(2)
    assert job.view.state == "stopped"
    assert sorted(job.results) == [0, 1, 2]
    bench.hold_run.set()
    again = engine.submit("a", long_request("q2"))
    assert again.wait(5)
    assert again.cached == frozenset()  # what was stopped half-way is measured again


def test_repeated_settings_are_answered_from_the_cache_and_say_so(engine: Engine, bench: Bench) -> None:
    first = engine.submit("me", request("mine"))
    assert first.wait(5)
    again = engine.submit("me", request("mine"))
    assert again.view.state == "done"
    assert again.cached == {0}
    assert again.results[0] == first.results[0]
    assert bench.served == ["mine"]


def test_what_a_visitor_wrote_is_not_given_to_another(engine: Engine, bench: Bench) -> None:
    """Only results of shipped examples are shared."""
    assert engine.submit("me", request("secret")).wait(5)
    other = engine.submit("you", request("secret"))
    assert other.wait(5)
    assert other.cached == frozenset()
    example = EXAMPLES[0].prompt
    assert engine.submit("me", request(example)).wait(5)
    assert engine.submit("you", request(example)).cached == {0}
    engine.disconnect("me")
    until(lambda: engine.job("me") is None)
    until(lambda: not engine.submit("me", request("secret")).cached)


def test_the_time_limit_stops_a_run_and_names_itself(engine: Engine, bench: Bench) -> None:
    engine._max_run_s = 0.05
    bench.hold_run.clear()
    job = engine.submit("me", request())
    assert job.wait(5)
    assert job.view.state == "stopped"
    assert "time limit" in str(job.stop_reason)
    assert job.results


def test_a_run_whose_worker_is_killed_says_so_and_the_next_one_works(engine: Engine, bench: Bench) -> None:
    bench.hold_run.clear()
    job = engine.submit("me", request())
    until(lambda: job.view.state == "running" and bench.served)
    kill(engine._thread)
    assert job.wait(5)
    assert job.view.state == "failed"
    assert "ended unexpectedly" in str(job.view.error)
    bench.hold_run.set()
    again = engine.submit("me", request("next"))
    assert again.wait(5)
    assert again.view.state == "done"


def test_a_fault_of_the_engine_itself_fails_one_job_only(
    engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_attempt", None)
        job = engine.submit("me", request())
        assert job.wait(5)
        assert "ended unexpectedly" in str(job.view.error)
    again = engine.submit("me", request("next"))
    assert again.wait(5)
    assert again.view.state == "done"


def kill(thread: threading.Thread) -> None:
    """End a thread from outside, as nothing in the app does."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def test_fifty_sessions_queue_in_order_and_leave_nothing_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bench.load, bench.run, max_queue=60, grace_s=0.05, max_cached=10)
    bench.hold_run.clear()
    first = engine.submit("first", request("first"))
    until(lambda: bench.served == ["first"])
    jobs = [engine.submit(f"s{i}", request(f"p{i}", model="ab"[i % 2])) for i in range(40)]
    sets = [engine.submit(f"l{i}", long_request(f"l{i}a", f"l{i}b")) for i in range(10)]
    assert [engine.ahead(job) for job in jobs] == list(range(1, 41))
    for job in jobs[10:15]:
        engine.cancel(job)
    engine.disconnect("l3")
    bench.hold_run.set()
    assert all(job.wait(30) for job in (first, *jobs, *sets))
    served = [prompt for prompt in bench.served if prompt.startswith("p")]
    assert served == [f"p{i}" for i in range(40) if not 10 <= i < 15]
    assert [job.view.state for job in jobs].count("stopped") == 5
    assert bench.most_resident == 1
    for name in [job.session for job in (first, *jobs, *sets)]:
        engine.disconnect(name)
    until(lambda: not engine._jobs and not engine._timers)
    assert not engine._cache._results
    engine.close()
    until(lambda: bench.resident == 0)
