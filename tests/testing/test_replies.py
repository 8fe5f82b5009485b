import json
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, ConfigDict, Field

from asyncbucket.testing.provider.app import go_duration
from asyncbucket.testing.provider.replies import smallest_instance


class Color(Enum):
    """An enumeration."""

    RED = "red"
    BLUE = "blue"


class Tree(BaseModel):
    """Refers to itself."""

    model_config = ConfigDict(extra="forbid")
    value: int
    left: "Tree | None" = None


class Everything(BaseModel):
    """What pydantic writes into schemas."""

    model_config = ConfigDict(extra="forbid")
    text: str
    positive: Annotated[int, Field(gt=4)]
    negative: Annotated[float, Field(lt=-0.5)]
    flag: bool
    color: Color
    kind: Literal["this"]
    either: int | str
    maybe: int | None
    pair: Annotated[list[Color], Field(min_length=2)]
    tree: Tree
    table: dict[str, int]
    anything: Any


def test_instance_is_valid_for_pydantic_schemas() -> None:
    for schema in (Everything.model_json_schema(), to_strict_json_schema(Everything)):
        Everything.model_validate_json(json.dumps(smallest_instance(schema)))


@pytest.mark.parametrize(
    ("schema", "instance"),
    [({}, {}), ({"type": "integer", "maximum": -3}, -3), ({"enum": [None, 1]}, None)],
)
def test_instance_fits_handwritten_schemas(schema: Any, instance: object) -> None:
    assert smallest_instance(schema) == instance


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (120_000_000, "120ms"),
        (999_000_000 + 1, "1s"),
        (8640_000_000, "8.64s"),
        (60_000_000_000, "1m0s"),
        (3661_000_000_000 + 500_000_000, "61m1.5s"),
    ],
)
def test_duration_is_written_in_go_format(nanoseconds: int, text: str) -> None:
    assert go_duration(nanoseconds) == text
