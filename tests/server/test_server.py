"""A real server, seen from outside: what it logs, what it counts, how it stops."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.models import tiny_loaded
from tests.support.process import Server
from tests.support.tab import Tab

MARKER = "Zanzibar-4711"
PROMPT = f"{MARKER} asks when the tide turns at the harbour. " * 4


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that loads at once and answers anything."""
    loaded = tiny_loaded("llama", max_position_embeddings=16384, chat_template=None)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(tmp_path: Path, tiny_folder: str) -> Iterator[Server]:
    """With settings from the environment and, as on Community Cloud, from the secrets."""
    secrets = tmp_path / "secrets.toml"
    secrets.write_text('TURBOQUANT_MAX_QUEUE = "1"\n')
    environment = {
        "TURBOQUANT_MODELS": tiny_folder,
        "TURBOQUANT_MAX_NEW_TOKENS": "8192",
        "TURBOQUANT_STOP_S": "5",
        "STREAMLIT_SECRETS_FILES": str(secrets),
    }
    with Server(tmp_path / "log.txt", environment) as server:
        yield server


async def ask(server: Server, prompt: str, tokens: int) -> Tab:
    """A tab whose run has begun."""
    tab = await Tab(server.address, tokens=tokens, chat=0).open()
    await tab.until(lambda: tab.first_run_s)
    await tab.press("Compare", tab.text_area("Prompt", prompt))
    return tab


@pytest.mark.nightly
def test_log_metrics_and_a_stop_that_lets_the_run_end(server: Server) -> None:
    async def visit() -> None:
        tab = await ask(server, PROMPT, 8)
        await tab.sees("Measured here")
        assert MARKER in tab.text
        done = server.metrics()
        assert done['turboquant_jobs_ended_total{outcome="done",page="compare"}'] == 1
        assert done["turboquant_tokens_generated_total"] == 16
        assert done["process_resident_memory_bytes"] > 10**8
        assert (done["turboquant_jobs_running"], done["turboquant_jobs_waiting"]) == (0, 0)

        long = await ask(server, f"long {PROMPT}", 8000)
        await long.sees("Both sides answer")
        queued = await ask(server, f"queued {PROMPT}", 8)
        await queued.until(lambda: "ahead of you" in queued.text)
        assert server.metrics()["turboquant_jobs_running"] == 1
        await tab.press("Compare", tab.text_area("Prompt", f"refused {PROMPT}"))
        await tab.sees("1 runs are waiting already")
        server.send(signal.SIGTERM)
        await queued.sees("Stopped by the shutdown of the server")
        await tab.press("Compare", tab.text_area("Prompt", f"late {PROMPT}"))
        await tab.sees("The server is being stopped")
        await long.until(lambda: "Stopped by the shutdown of the server" in long.text and "Measured" in long.text)
        await long.until(lambda: not long.connected)

    asyncio.run(visit())
    assert server.wait(10) == 128 + signal.SIGTERM
    log = server.log.read_text()
    assert MARKER not in log
    assert "Traceback" not in log
    events = [line["event"] for line in server.events() if "event" in line]
    assert (events[0], events[-1], events.count("model_loaded")) == ("server_started", "server_stopped", 1)
    (done,) = server.events("job_done")
    assert (done["generated_tokens"], done["methods"], done["results"]) == (16, ["turboquant:bits=4"], 1)
    assert done["prompt_tokens"] == len(PROMPT)
    assert 0 < done["work_s"] <= done["total_s"]
    assert [line["reason"] for line in server.events("job_refused")] == ["full", "stopping"]
    assert {line["reason"] for line in server.events("job_stopped")} == {"the shutdown of the server"}


@pytest.mark.nightly
def test_a_second_signal_ends_the_process_at_once(server: Server) -> None:
    async def visit() -> None:
        tab = await ask(server, PROMPT, 8000)
        await tab.sees("Both sides answer")
        server.send(signal.SIGINT)
        begun = time.monotonic()
        while not server.events("server_stopping"):
            await asyncio.sleep(0.05)
        assert server.healthy()
        server.send(signal.SIGINT)
        await asyncio.to_thread(server.wait, 2)
        assert time.monotonic() - begun < 2.5
        await tab.close()

    family = server.family()
    asyncio.run(visit())
    assert not [process for process in family if process.is_running()]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root")
def test_a_second_signal_ends_the_first_process_of_a_container(tmp_path: Path, tiny_folder: str) -> None:
    """The kernel keeps a signal without a handler from the first process of a PID namespace."""
    environment = {"TURBOQUANT_MODELS": tiny_folder, "TURBOQUANT_MAX_NEW_TOKENS": "8192"}
    alone = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with Server(tmp_path / "log.txt", environment, before=alone) as server:

        async def visit() -> None:
            tab = await ask(server, PROMPT, 8000)
            await tab.sees("Both sides answer")
            (first,) = psutil.Process(server.pid).children()
            first.send_signal(signal.SIGTERM)
            while not server.events("server_stopping"):
                await asyncio.sleep(0.05)
            first.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.wait, 3) == 128 + signal.SIGTERM
            await tab.close()

        asyncio.run(visit())
    assert "Traceback" not in server.log.read_text()


@pytest.mark.nightly
def test_a_client_that_reads_nothing_does_not_keep_the_server_from_stopping(server: Server) -> None:
    async def visit() -> None:
        tab = await Tab(server.address).open()
        await tab.until(lambda: tab.first_run_s)
        assert tab._socket is not None
        tab._socket.transport.pause_reading()
        for _ in range(80):
            await tab.rerun()
            await asyncio.sleep(0.1)
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 9) == 128 + signal.SIGTERM
        await tab.cut()

    asyncio.run(visit())
    assert "Traceback" not in server.log.read_text()
