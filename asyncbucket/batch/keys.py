"""Recognize an item: a hash that is the same in the next process."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Final

#: Bytes of a key; the chance that two of a billion items share one is under 1e-20.
SIZE: Final = 16


def key_of(item: object) -> bytes:
    """Return a key that depends on what ``item`` holds, and on nothing else.

    It may consist of text, bytes, numbers, None, lists, tuples, dicts, dataclasses and pydantic
    models, nested at will. Different types are different items; the order of a dict's keys does not
    matter.

    Raises:
        TypeError: it holds something else, whose `repr` may differ from one process to the next.
    """
    if isinstance(item, str):
        return digest(b"s" + item.encode("utf-8", "surrogatepass"))
    if isinstance(item, bytes):
        return digest(b"b" + item)
    text = json.dumps(_with_types(item), separators=(",", ":"))
    return digest(b"j" + text.encode("utf-8", "surrogatepass"))


def digest(data: bytes) -> bytes:
    """Return the key of bytes."""
    return hashlib.sha256(data).digest()[:SIZE]


def _with_types(value: Any) -> object:
    """Return ``value`` in a form that JSON can hold: anything with parts as a list, its type first.

    JSON alone would not distinguish tuples from lists, or the key 1 from "1".
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    type_name = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "__pydantic_fields_set__"):
        return [type_name, _with_types(_model_dump(value))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return [
            type_name,
            *([field.name, _with_types(getattr(value, field.name))] for field in fields),
        ]
    if isinstance(value, (bytes, bytearray)):
        return [type_name, value.hex()]
    if isinstance(value, Mapping):
        pairs = ([_with_types(key), _with_types(part)] for key, part in value.items())
        return [type_name, *sorted(pairs, key=json.dumps)]
    if isinstance(value, (list, tuple)):
        return [type_name, *map(_with_types, value)]
    raise _unknown_type_error(value)


def _model_dump(model: Any) -> object:
    """Return what a pydantic model holds, also what only a subclass of a field's type has."""
    try:
        return model.model_dump(mode="json", serialize_as_any=True)
    except Exception as error:
        raise _unknown_type_error(model) from error


def _unknown_type_error(value: object) -> TypeError:
    return TypeError(
        f"a checkpoint cannot recognise an item that contains {type(value).__name__}: give "
        f"Checkpoint(..., key=...), a function from the item to a string"
    )


def is_plain(value: object) -> bool:
    """Tell whether JSON returns ``value`` unchanged."""
    value_type = type(value)
    if value is None or value_type is str or value_type is bool or value_type is int:
        return True
    if isinstance(value, float):
        return value_type is float and math.isfinite(value)
    if isinstance(value, list):
        return value_type is list and all(map(is_plain, value))
    if isinstance(value, dict):
        return value_type is dict and all(
            type(name) is str and is_plain(part) for name, part in value.items()
        )
    return False
