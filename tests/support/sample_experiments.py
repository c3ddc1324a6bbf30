"""An experiment small enough for tests of what runs experiments; importable, so that other processes can run it too."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.models import tokens
from turboquant.cache.build import build_cache, cache_report
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.methods import Method
from turboquant.models.load import LoadedModel
from turboquant.records.base import Record
from turboquant.run.generate import check_length


class SizeSettings(Record):
    """What the caches hold after `context` random tokens; the rest is mischief for one method."""

    context: int = 96
    seed: int = 0
    seconds: float = 0.0
    fails_for: str | None = None
    dies_for: str | None = None
    forgets: str | None = None
    lives: str | None = None
    """A file whose bytes are counted: the process dies once a byte. Without it the process always dies."""


def _die(lives: str | None) -> None:
    if lives is not None:
        path = Path(lives)
        left = path.read_bytes()
        if not left:
            return
        path.write_bytes(left[1:])
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    loaded: LoadedModel, methods: Sequence[Method], settings: SizeSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    check_length(loaded, settings.context, 0)
    ids = tokens(1, settings.context, settings.seed)
    for number, method in enumerate(methods):
        watch.check()
        watch.progress(number / len(methods), f"measuring {method}")
        if str(method) == settings.forgets:
            continue
        if str(method) == settings.fails_for:
            raise ValueError(f"{method} cannot be measured")
        if str(method) == settings.dies_for:
            _die(settings.lives)
        time.sleep(settings.seconds)
        cache = build_cache(loaded.model.config, method)
        loaded.model(ids.to(loaded.model.device), past_key_values=cache)
        report = cache_report(cache)
        yield (
            method,
            Measurement(
                metrics={"bits_per_value": report.bits_per_value, "process": float(os.getpid())},
                cache=report,
                detail={"gpus": os.environ.get("CUDA_VISIBLE_DEVICES")},
            ),
        )


SIZE = Experiment("size", SizeSettings, run)
EXPERIMENTS = {"size": SIZE, "other": Experiment("other", SizeSettings, run)}
