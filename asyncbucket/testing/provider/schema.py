"""The smallest instance of a JSON schema, for the schemas that SDKs and LlamaIndex write."""

from collections.abc import Mapping
from typing import Any

_FORMATS = {
    "date": "2025-01-01",
    "date-time": "2025-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "PT0S",
    "email": "a@example.com",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
}


def smallest_instance(schema: Mapping[str, Any], *, text: str = "text") -> Any:
    """Return a value that `schema` accepts, with only the required properties.

    References into the schema itself, `enum`, `const`, `anyOf`, `oneOf`, `allOf` (merged), bounds of
    numbers, lengths and common formats are understood; `pattern` isn't.

    Args:
        schema: A JSON schema; an empty one stands for any object.
        text: What free strings hold.
    """
    return _Writer(schema, text).write(schema or {"type": "object"})


class _Writer:
    def __init__(self, root: Mapping[str, Any], text: str) -> None:
        self._root = root
        self._text = text

    def write(self, schema: Mapping[str, Any]) -> Any:
        schema = self._resolve(schema)
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices:
            return choices[0]
        json_type = schema.get("type") or ("object" if "properties" in schema else "string")
        if isinstance(json_type, list):
            json_type = "null" if "null" in json_type else json_type[0]
        match json_type:
            case "object":
                return self._object(schema)
            case "array":
                return [
                    self.write(schema.get("items") or {}) for _ in range(schema.get("minItems", 0))
                ]
            case "integer" | "number":
                return _number(schema, whole=json_type == "integer")
            case _:
                return {"boolean": True, "null": None}.get(json_type, self._string(schema))

    def _resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Follow `$ref` and choose among alternatives until a plain schema is left."""
        if "$ref" in schema:
            target: Any = self._root
            for step in str(schema["$ref"]).removeprefix("#/").split("/"):
                target = target[step]
            return self._resolve(target)
        for choice in ("anyOf", "oneOf"):
            if schema.get(choice):
                options = [self._resolve(option) for option in schema[choice]]
                # Null if it is allowed: a strict schema of a tree requires a child, or null.
                return next(
                    (option for option in options if option.get("type") == "null"), options[0]
                )
        if "allOf" in schema:
            merged = {key: value for key, value in schema.items() if key != "allOf"}
            for part in schema["allOf"]:
                merged = _merge(merged, self._resolve(part))
            return merged
        return schema

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        return {name: self.write(properties.get(name) or {}) for name in schema.get("required", ())}

    def _string(self, schema: Mapping[str, Any]) -> str:
        text = _FORMATS.get(str(schema.get("format")), self._text)
        shortest = int(schema.get("minLength", 0))
        return text.ljust(shortest, "x")[: schema.get("maxLength")]


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**first, **second}
    merged["properties"] = {**first.get("properties", {}), **second.get("properties", {})}
    merged["required"] = [*first.get("required", ()), *second.get("required", ())]
    return merged


def _number(schema: Mapping[str, Any], *, whole: bool) -> float:
    step = 1 if whole else schema.get("multipleOf", 1)
    low = schema.get("minimum")
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + step
    high = schema.get("maximum")
    if "exclusiveMaximum" in schema:
        high = schema["exclusiveMaximum"] - step
    value = 1 if low is None else max(1, low)
    value = value if high is None else min(value, high)
    multiple = schema.get("multipleOf")
    value = value if not multiple else -(-value // multiple) * multiple
    return int(value) if whole else value
