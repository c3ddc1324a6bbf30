"""What all records share."""

import reprlib

from pydantic import BaseModel, ConfigDict, ValidationError

Matrix = list[list[float | None]]


class Record(BaseModel):
    """Base of all records: unknown fields are refused, NaN and infinity travel as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


def first_error(error: ValidationError, where: str | None = None) -> str:
    """Return what pydantic found wrong first, in one line: where, the rule and the value.

    Args:
        error: What pydantic raised.
        where: What was checked, in place of the path of fields.
    """
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) if where is None else where
    rule = first["msg"].removeprefix("Value error, ").split(", unable to parse")[0].rstrip(".")
    value = reprlib.repr(first["input"])
    said = isinstance(first["input"], str) and value in rule
    got = "" if first["type"] == "missing" or not where or said else f", got {value}"
    if where and rule.startswith("Input should "):
        return f"{where} {rule.removeprefix('Input ')}{got}"
    return (f"{where}: " if where else "") + rule + got
