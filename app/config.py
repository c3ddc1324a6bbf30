"""Settings of the app, read from the environment once at start.

| Variable | Meaning | Default |
| --- | --- | --- |
| TURBOQUANT_MODELS | comma-separated names, hub ids, folders or GGUF files a visitor may pick | every known model |
| TURBOQUANT_ALLOW_ANY_MODEL | may a visitor type another hub id | 1 |
| TURBOQUANT_DEFAULT_MODEL | the model that is loaded at start | smollm2-135m |
| TURBOQUANT_LOCK_MODEL | offer the default model only | 0 |
| TURBOQUANT_WEIGHTS | how weights are loaded: auto, fp32, bf16, 8bit, 4bit | auto |
| TURBOQUANT_WARM_UP | load the default model at start | 1 |
| TURBOQUANT_MAX_NEW_TOKENS | longest answer, in tokens | 512 |
| TURBOQUANT_MAX_PROMPT_CHARS | longest prompt, in characters | 20000 |
| TURBOQUANT_MAX_PROMPTS | prompts in one set | 32 |
| TURBOQUANT_MAX_CONTEXT_TOKENS | longest context of a measurement, in tokens | 8192 |
| TURBOQUANT_MAX_CELLS | cells (method x setting) in one measurement; a search for a setting takes 100 | 200 |
| TURBOQUANT_MAX_RUN_S | seconds of work after which a run is stopped | 1800 |
| TURBOQUANT_MAX_QUEUE | runs that may wait for the worker | 8 |
| TURBOQUANT_MAX_RUNS | runs kept for one visitor | 24 |
| TURBOQUANT_MAX_CACHED | results kept for repeated settings, over all visitors; 0 keeps none | 64 |
| TURBOQUANT_DISCONNECT_GRACE_S | seconds a run goes on after its tab was closed | 20 |
| TURBOQUANT_STOP_S | seconds a run may take to end once the server is told to stop | 10 |
| TURBOQUANT_LOG | what is logged: debug, info, warning, error; debug includes messages of exceptions | info |
| TURBOQUANT_LOG_FORMAT | a line of the log: json, text | json |
| TURBOQUANT_METRICS | serve metrics for Prometheus at /metrics | 1 |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

WEIGHTS = ("auto", "fp32", "bf16", "8bit", "4bit")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("json", "text")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class ConfigError(ValueError):
    """A setting in the environment cannot be used; the message names the variable, its value and the rule."""


@dataclass(frozen=True)
class AppConfig:
    """What this deployment allows. An empty `models` means every known model."""

    models: tuple[str, ...] = ()
    allow_any_model: bool = True
    default_model: str = "smollm2-135m"
    lock_model: bool = False
    weights: str = "auto"
    warm_up: bool = True
    max_new_tokens: int = 512
    max_prompt_chars: int = 20_000
    max_prompts: int = 32
    max_context_tokens: int = 8192
    max_cells: int = 200
    max_run_s: float = 1800.0
    max_queue: int = 8
    max_runs: int = 24
    max_cached: int = 64
    disconnect_grace_s: float = 20.0
    stop_s: float = 10.0
    log: str = "info"
    log_format: str = "json"
    metrics: bool = True


def load_config(environ: Mapping[str, str] | None = None) -> AppConfig:
    """Read the settings from the environment.

    Raises:
        ConfigError: A value cannot be used.
    """
    env = os.environ if environ is None else environ
    default = AppConfig()
    models = tuple(name.strip() for name in env.get("TURBOQUANT_MODELS", "").split(",") if name.strip())
    default_model = env.get("TURBOQUANT_DEFAULT_MODEL", "").strip() or (
        default.default_model if not models or default.default_model in models else models[0]
    )
    if models and default_model not in models:
        raise ConfigError(
            f"TURBOQUANT_DEFAULT_MODEL must be one of TURBOQUANT_MODELS ({', '.join(models)}), got {default_model!r}"
        )
    locked = _flag(env, "TURBOQUANT_LOCK_MODEL", default=default.lock_model)
    any_model = _flag(env, "TURBOQUANT_ALLOW_ANY_MODEL", default=default.allow_any_model)
    return AppConfig(
        models=(default_model,) if locked else models,
        allow_any_model=any_model and not locked,
        default_model=default_model,
        lock_model=locked,
        weights=_choice(env, "TURBOQUANT_WEIGHTS", WEIGHTS, default.weights),
        warm_up=_flag(env, "TURBOQUANT_WARM_UP", default=default.warm_up),
        max_new_tokens=_whole(env, "TURBOQUANT_MAX_NEW_TOKENS", default.max_new_tokens, 1, 65_536),
        max_prompt_chars=_whole(env, "TURBOQUANT_MAX_PROMPT_CHARS", default.max_prompt_chars, 1, 10_000_000),
        max_prompts=_whole(env, "TURBOQUANT_MAX_PROMPTS", default.max_prompts, 1, 10_000),
        max_context_tokens=_whole(env, "TURBOQUANT_MAX_CONTEXT_TOKENS", default.max_context_tokens, 256, 10_000_000),
        max_cells=_whole(env, "TURBOQUANT_MAX_CELLS", default.max_cells, 1, 100_000),
        max_run_s=_seconds(env, "TURBOQUANT_MAX_RUN_S", default.max_run_s),
        max_queue=_whole(env, "TURBOQUANT_MAX_QUEUE", default.max_queue, 1, 10_000),
        max_runs=_whole(env, "TURBOQUANT_MAX_RUNS", default.max_runs, 1, 1_000),
        max_cached=_whole(env, "TURBOQUANT_MAX_CACHED", default.max_cached, 0, 100_000),
        disconnect_grace_s=_seconds(env, "TURBOQUANT_DISCONNECT_GRACE_S", default.disconnect_grace_s),
        stop_s=_seconds(env, "TURBOQUANT_STOP_S", default.stop_s),
        log=_choice(env, "TURBOQUANT_LOG", LOG_LEVELS, default.log),
        log_format=_choice(env, "TURBOQUANT_LOG_FORMAT", LOG_FORMATS, default.log_format),
        metrics=_flag(env, "TURBOQUANT_METRICS", default=default.metrics),
    )


def _flag(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = env.get(name, "").strip().lower()
    if not text:
        return default
    if text not in _TRUE + _FALSE:
        raise ConfigError(f"{name} must be 1 or 0, got {env[name]!r}")
    return text in _TRUE


def _choice(env: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    text = env.get(name, "").strip().lower() or default
    if text not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {env[name]!r}")
    return text


def _whole(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not low <= int(text) <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {env[name]!r}")
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 86_400.0:
        raise ConfigError(f"{name} must be a number of seconds from 0 to 86400, got {env[name]!r}")
    return value
