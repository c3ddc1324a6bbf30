"""A command's options, made from the settings of its experiment: names, bounds, defaults and help stand there once.

    @app.command()
    @takes(NeedleSettings, several={"context": (1024, 2048)}, flags={"context": "--contexts"}, without=("chat",))
    def needle(model: ModelOption = "smollm2-135m", *, asked: Asked, output: OutputOption) -> None:
        grid = asked.grid()

gives `needle` an option for every field but those left out, in place of the parameter `asked`. A field in `several`
takes many values, of which each is measured with each of the others.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from itertools import product
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo

from turboquant.cli.errors import fail
from turboquant.records.base import Record, first_error
from turboquant.records.settings import CellSettings

F = TypeVar("F", bound=Callable[..., None])


class Asked:
    """What was asked of an experiment.

    Attributes:
        values: By field; None stands for a default, a list for several values.
        given: Those fields of several values for which any were named.
    """

    def __init__(self, kind: type[CellSettings], values: Mapping[str, Any], flags: Mapping[str, str]) -> None:
        self.kind, self.values, self.flags = kind, dict(values), flags
        self.given: frozenset[str] = frozenset()

    def grid(self, **more: Any) -> list[Any]:
        """Return the settings, one for each combination of values; leave with code 2 where one is refused.

        Args:
            more: Settings that are no options of the command; a list is several values of one.
        """
        values = {**self.values, **more}
        axes = {name: found for name, found in values.items() if isinstance(found, list)}
        rest = {name: found for name, found in values.items() if name not in axes}
        points = product(*(dict.fromkeys(found) for found in axes.values()))
        return [
            read_settings(self.kind, {**rest, **dict(zip(axes, point, strict=True))}, self.flags) for point in points
        ]

    def one(self, **more: Any) -> Any:
        """Return the settings of a command that takes one value of each."""
        (found,) = self.grid(**more)
        return found


def read_settings(kind: type[Record], values: Mapping[str, Any], flags: Mapping[str, str] = {}) -> Any:
    """Return settings, or leave with code 2; None stands for a setting's default.

    Args:
        kind: Their class.
        values: By field.
        flags: Options that are not called as their fields are, by field.
    """
    from pydantic import ValidationError

    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        field, *_ = map(str, error.errors()[0]["loc"] or ("",))
        fail(first_error(error, flags.get(field, field and _flag(field))), 2)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def takes(
    kind: type[CellSettings],
    *,
    several: Mapping[str, Sequence[Any]] = {},
    flags: Mapping[str, str] = {},
    without: Collection[str] = (),
    help: Mapping[str, str] = {},
) -> Callable[[F], F]:
    """Give a command an option for each setting, in place of its parameter `asked`.

    Args:
        kind: The settings.
        several: Fields that take several values, with those that are measured where none is given.
        flags: Options that are not called as their fields are, by field.
        without: Fields that are no options.
        help: Words about a field that differ from its own in this command.
    """
    fields = _fields(kind, without)

    def decorated(command: F) -> F:
        @wraps(command)
        def run(**values: Any) -> None:
            found = {name: values.pop(name) for name in fields}
            lists = {name: list(found[name] or usual) for name, usual in several.items()}
            whole = {name: tuple(found[name]) for name, field in fields.items() if _many(field) and found[name]}
            asked = Asked(kind, {**found, **whole, **lists}, flags)
            asked.given = frozenset(name for name in several if found[name])
            command(**values, asked=asked)

        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(command).parameters.values():
            own = [
                _parameter(name, field, several.get(name), flags.get(name, _flag(name)), help.get(name))
                for name, field in fields.items()
            ]
            parameters += own if one.name == "asked" else [one.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run  # type: ignore[return-value]

    return decorated


def _fields(kind: type[CellSettings], without: Collection[str]) -> dict[str, FieldInfo]:
    """Return the fields that can be chosen, inherited ones last; what this machine is (a default made here) cannot."""
    names = sorted(kind.model_fields, key=lambda name: name not in kind.__annotations__)
    return {name: kind.model_fields[name] for name in names if name not in without and not _made_here(kind, name)}


def _made_here(kind: type[CellSettings], name: str) -> bool:
    return kind.model_fields[name].default_factory is not None


def _many(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _parameter(
    name: str, field: FieldInfo, usual: Sequence[Any] | None, flag: str, words: str | None
) -> inspect.Parameter:
    """Return the parameter that typer makes an option of."""
    words = words or field.description or ""
    kind, default = _kind(field.annotation), field.get_default()
    if usual is None and _many(field):
        usual, default = tuple(default), None
    if usual is not None:
        shown = " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in usual)
        words, kind, default = f"{words.rstrip('.')}; one or several, default {shown}.", _list(kind), None
    elif default is None:
        kind = kind | None
    annotation: Any = Annotated[kind, typer.Option(flag, help=words, **_bounds(field))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _list(kind: Any) -> Any:
    return GenericAlias(list, (kind,)) | None


def _kind(annotation: Any) -> Any:
    """Return what typer reads a value as: int, float or str; pydantic judges the rest."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (one for one in get_args(annotation) if one is not NoneType)
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return str if get_origin(annotation) is Literal else annotation


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """Return the bounds of a number, which help shows."""
    found: dict[str, Any] = {}
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            found["min"] = rule.ge
        elif isinstance(rule, annotated_types.Le):
            found["max"] = rule.le
    return found
