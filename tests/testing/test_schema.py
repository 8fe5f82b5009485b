import json
from datetime import date, datetime
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, ConfigDict, Field

from asyncbucket.testing.provider.schema import smallest_instance


class Colour(Enum):
    """An enumeration."""

    RED = "red"
    BLUE = "blue"


class Tree(BaseModel):
    """Refers to itself."""

    model_config = ConfigDict(extra="forbid")
    value: int
    left: "Tree | None" = None
    right: "Tree | None" = None


class Everything(BaseModel):
    """What pydantic writes into schemas."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(min_length=10, max_length=20)]
    short: Annotated[str, Field(max_length=2)]
    positive: Annotated[int, Field(gt=4)]
    negative: Annotated[float, Field(lt=-0.5)]
    even: Annotated[int, Field(multiple_of=2, ge=3)]
    flag: bool
    colour: Colour
    kind: Literal["this"]
    either: int | str
    maybe: int | None
    pair: Annotated[list[Colour], Field(min_length=2)]
    day: date
    moment: datetime
    key: UUID
    tree: Tree
    table: dict[str, int]
    anything: Any


@pytest.mark.parametrize("model", [Everything, Tree])
def test_instance_is_valid_for_pydantic_schemas(model: type[BaseModel]) -> None:
    """It is valid for pydantic's schema and for the strict one that OpenAI's SDK makes of it."""
    for schema in (model.model_json_schema(), to_strict_json_schema(model)):
        model.model_validate_json(json.dumps(smallest_instance(schema)))


def test_instance_has_only_required_properties() -> None:
    """They come in the order in which they are required."""
    schema = {
        "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {}},
        "required": ["b", "a"],
    }

    assert smallest_instance(schema, text="hello") == {"b": 1, "a": "hello"}


def test_empty_schema_gives_empty_object() -> None:
    """This is what `json_object` asks for."""
    assert smallest_instance({}) == {}


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        (
            {
                "allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}],
                "$defs": {"a": {"properties": {"a": {"const": 7}}, "required": ["a"]}},
            },
            {"a": 7, "b": "text"},
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, 1),
        ({"type": ["string", "null"]}, None),
        ({"type": ["integer", "string"]}, 1),
        ({"type": "integer", "maximum": -3}, -3),
        ({"type": "number", "exclusiveMaximum": 1}, 0),
        ({"enum": [None, 1]}, None),
    ],
)
def test_instance_fits_handwritten_schemas(schema: Any, instance: object) -> None:
    """It handles merged parts, alternatives, lists of types, and bounds."""
    assert smallest_instance(schema) == instance
