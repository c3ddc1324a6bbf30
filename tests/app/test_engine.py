"""The engine with a stand-in model: order, limits, cancelling, failures, switching, disconnects."""

import time

import pytest
import torch

from app.engine import Engine, EngineBusyError, out_of_memory
from app.jobs import Job, Request
from tests.app.conftest import Bench, until
from turboquant.comparison import Event
from turboquant.results import Settings


def request(prompt: str = "hello", model: str = "a") -> Request:
    settings = Settings(max_new_tokens=8, temperature=0.0, top_p=1.0, top_k=0, seed=0)
    return Request(model, "auto", prompt, "turboquant:bits=4", settings)


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
    with pytest.raises(EngineBusyError, match="already running in this tab"):
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
    with pytest.raises(EngineBusyError, match="3 comparisons are waiting"):
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
    until(lambda: job.view.original.tokens == 4)
    begun = time.monotonic()
    engine.cancel(job)
    assert job.wait(1)
    assert time.monotonic() - begun < 1
    assert job.view.state == "stopped"
    assert job.result is not None
    assert job.result.original.finish == "cancelled"
    assert job.view.original.text == " word1 word2 word3 word4"


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
    assert any(record.exc_info for record in caplog.records)


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
    stream = job.stream(poll=0.01, pause=0)
    batch = next(stream)
    assert [event.tokens for event in batch] == [1, 2, 3]
    assert [event.text for event in batch] == ["", "", "xxx"]
    assert next(stream) == []
    job.finish("done")
    job.finish("failed", error="too late")
    assert list(stream) == [[]]
    assert job.view.state == "done"
    assert list(job.stream(start=2, pause=0)) == [[batch[2]]]
