"""Settings of the app, read from the environment once at start.

| Variable | Meaning | Default |
| --- | --- | --- |
| TURBOQUANT_MODELS | comma-separated names a visitor may pick | every known model |
| TURBOQUANT_ALLOW_ANY_MODEL | may a visitor type a hub id or a local folder | 1 |
| TURBOQUANT_DEFAULT_MODEL | the model that is loaded at start | smollm2-135m |
| TURBOQUANT_WEIGHTS | how weights are loaded: auto, fp32, bf16, 8bit, 4bit | auto |
| TURBOQUANT_WARM_UP | load the default model at start | 1 |
| TURBOQUANT_MAX_NEW_TOKENS | longest answer, in tokens | 512 |
| TURBOQUANT_MAX_PROMPT_CHARS | longest prompt, in characters | 20000 |
| TURBOQUANT_MAX_QUEUE | runs that may wait for the worker | 8 |
| TURBOQUANT_MAX_RUNS | runs kept for one visitor | 12 |
| TURBOQUANT_DISCONNECT_GRACE_S | seconds a run goes on after its tab was closed | 20 |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

WEIGHTS = ("auto", "fp32", "bf16", "8bit", "4bit")
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
    weights: str = "auto"
    warm_up: bool = True
    max_new_tokens: int = 512
    max_prompt_chars: int = 20_000
    max_queue: int = 8
    max_runs: int = 12
    disconnect_grace_s: float = 20.0


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
    return AppConfig(
        models=models,
        allow_any_model=_flag(env, "TURBOQUANT_ALLOW_ANY_MODEL", default=default.allow_any_model),
        default_model=default_model,
        weights=_choice(env, "TURBOQUANT_WEIGHTS", WEIGHTS, default.weights),
        warm_up=_flag(env, "TURBOQUANT_WARM_UP", default=default.warm_up),
        max_new_tokens=_whole(env, "TURBOQUANT_MAX_NEW_TOKENS", default.max_new_tokens, 1, 65_536),
        max_prompt_chars=_whole(env, "TURBOQUANT_MAX_PROMPT_CHARS", default.max_prompt_chars, 1, 10_000_000),
        max_queue=_whole(env, "TURBOQUANT_MAX_QUEUE", default.max_queue, 1, 10_000),
        max_runs=_whole(env, "TURBOQUANT_MAX_RUNS", default.max_runs, 1, 1_000),
        disconnect_grace_s=_seconds(env, "TURBOQUANT_DISCONNECT_GRACE_S", default.disconnect_grace_s),
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
