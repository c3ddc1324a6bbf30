"""What the widgets say, checked again on the server: a browser can send anything."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from pydantic import ValidationError

from app.config import WEIGHTS, AppConfig
from app.tab.examples import name_of
from turboquant.methods import METHODS, BitsMethod, in_order, parse_method, settings_of
from turboquant.models.registry import MODELS
from turboquant.records.comparison import Settings

SAME = "same"
BIT_CHOICES = (2, 3, 4)
EACH_BITS = (SAME, *(str(bits) for bits in range(1, 9)))
SECOND_CHOICES = tuple(settings_of("presets"))
MAX_EXACT = 4096
LINK_PROMPT_CHARS = 1500
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class RequestError(ValueError):
    """A choice cannot be run; the message is one sentence for the visitor."""


@dataclass(frozen=True)
class Choices:
    """The settings of the sidebar, named as in the URL."""

    model: str = "smollm2-135m"
    bits: int = 4
    recipe: str = "turboquant"
    key_bits: str = SAME
    value_bits: str = SAME
    residual: int = 64
    sinks: int = 4
    rotation: int = 0
    tokens: int = 128
    seed: int = 0
    temperature: float = 0.0
    weights: str = "auto"
    chat: bool = True
    second: str = ""


def defaults(config: AppConfig) -> Choices:
    """The settings a visitor starts with."""
    window = _field_defaults("turboquant")
    return Choices(
        model=config.default_model,
        weights=config.weights,
        residual=window["residual_length"],
        sinks=window["sink_length"],
        tokens=min(Choices.tokens, config.max_new_tokens),
    )


def recipes() -> list[str]:
    """The methods that can be picked: those with a number of bits, the recommended one first."""
    return in_order(name for name, method in METHODS.items() if issubclass(method, BitsMethod))


def has_window(recipe: str) -> bool:
    """Does the recipe keep some tokens exact? Then their numbers can be chosen."""
    window = _field_defaults(recipe) if recipe in METHODS else {}
    return bool(window.get("residual_length") or window.get("sink_length"))


def _field_defaults(recipe: str) -> dict[str, Any]:
    return {field.name: field.default for field in fields(METHODS[recipe])}


def selectable_models(config: AppConfig) -> list[str]:
    """The model names on offer, the default one first."""
    names = list(config.models or MODELS)
    return sorted(names, key=lambda name: name != config.default_model)


def check_model(name: object, config: AppConfig) -> str:
    """The model's name, if this deployment allows it.

    Raises:
        RequestError: It does not, or the text is no model name.
    """
    if isinstance(name, str) and name.strip() in selectable_models(config):
        return name.strip()
    shown = str(name).strip()[:80]
    if not config.allow_any_model:
        raise RequestError(
            f"The model {shown!r} is not offered here; choose from {', '.join(selectable_models(config))}."
        )
    text = str(name).strip()
    if _HUB_ID.fullmatch(text) and ".." not in text:
        return text
    raise RequestError(f"{shown!r} is no known model and no hub id such as org/name.")


def check_prompt(prompt: object, config: AppConfig) -> str:
    """The prompt, if it is one that may be run.

    Raises:
        RequestError: It is empty or too long.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("Type a prompt, or pick one of the examples.")
    if len(prompt) > config.max_prompt_chars:
        raise RequestError(
            f"The prompt has {len(prompt):,} characters; the limit here is {config.max_prompt_chars:,}. Shorten it."
        )
    return prompt


def check_bound(name: str, value: object, low: int, high: int) -> int:
    """The whole number, if it is within its bounds.

    Raises:
        RequestError: It is not, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low:,} to {high:,}, got {str(value)[:40]}.")
    return value


def check_loading(choices: Choices, config: AppConfig) -> tuple[str, str]:
    """The model's name and how its weights are loaded, if this deployment allows them.

    Raises:
        RequestError: It does not.
    """
    if choices.weights not in WEIGHTS:
        raise RequestError(f"Weights must be one of {', '.join(WEIGHTS)}, got {str(choices.weights)[:20]!r}.")
    return check_model(choices.model, config), choices.weights


def method_texts(choices: Choices) -> list[str]:
    """The sidebar's method and, where there is one, its second setting, as `parse_method` reads them.

    Raises:
        RequestError: One of them is no method.
    """
    first = method_text(choices)
    try:
        return [first, str(parse_method(choices.second))] if choices.second else [first]
    except ValueError as error:
        raise RequestError(f"The second setting cannot be used: {error}.") from None


def method_text(choices: Choices) -> str:
    """The chosen method as `parse_method` reads it, checked.

    Raises:
        RequestError: A number is out of range, or the recipe is unknown.
    """
    if choices.recipe not in recipes():
        raise RequestError(f"The recipe must be one of {', '.join(recipes())}, got {str(choices.recipe)[:40]!r}.")
    each = {
        name: choices.bits if value == SAME else value
        for name, value in (("key_bits", choices.key_bits), ("value_bits", choices.value_bits))
    }
    options: dict[str, Any] = {**each, "seed": choices.rotation}
    if has_window(choices.recipe):
        for name, value in (("residual", choices.residual), ("sinks", choices.sinks)):
            if not 0 <= value <= MAX_EXACT:
                raise RequestError(f"{name.capitalize()} must be a whole number from 0 to {MAX_EXACT}, got {value}.")
        options |= {"residual_length": choices.residual, "sink_length": choices.sinks}
    try:
        return str(parse_method(f"{choices.recipe}:{','.join(f'{k}={v}' for k, v in options.items())}"))
    except ValueError as error:
        raise RequestError(f"The method cannot be used: {error}.") from None


def sampling_settings(choices: Choices, config: AppConfig) -> Settings:
    """How answers are chosen, checked.

    Raises:
        RequestError: A number is out of range.
    """
    if not 1 <= choices.tokens <= config.max_new_tokens:
        raise RequestError(f"Max new tokens must be from 1 to {config.max_new_tokens}, got {choices.tokens}.")
    try:
        return Settings(
            max_new_tokens=choices.tokens, temperature=choices.temperature, top_p=1.0, top_k=0, seed=choices.seed
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestError(f"{str(first['loc'][0]).capitalize()}: {first['msg'].lower()}.") from None


def read_choices(values: Mapping[str, Any], config: AppConfig) -> Choices:
    """Choices from loose values (session state): what is missing or of the wrong type takes its default."""
    start = defaults(config)
    kept: dict[str, Any] = {}
    for field in fields(Choices):
        value, default = values.get(field.name), getattr(start, field.name)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        kept[field.name] = value if type(value) is type(default) else default
    return Choices(**kept)


def query(choices: Choices, prompt: str, config: AppConfig) -> str:
    """The query string of a link that opens these settings, with the prompt when it is short enough for an address."""
    start = asdict(defaults(config))
    changed = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in asdict(choices).items()
        if value != start[key]
    }
    return urlencode(changed | prompt_query(prompt))


def prompt_query(prompt: str) -> dict[str, str]:
    """The part of the address that holds the prompt: an example's name, a short prompt, or nothing."""
    if name := name_of(prompt):
        return {"example": name}
    return {"prompt": prompt} if prompt and len(prompt) <= LINK_PROMPT_CHARS else {}
