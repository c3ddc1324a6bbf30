"""What all records share."""

from pydantic import BaseModel, ConfigDict

Matrix = list[list[float | None]]


class Record(BaseModel):
    """Base of all records: unknown fields are refused, NaN and infinity travel as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")
