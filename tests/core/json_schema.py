"""A JSON schema, read strictly: a keyword or a reference that it doesn't know is an error, not a shrug.

It knows the keywords that pydantic writes for our documents, as JSON Schema 2020-12 defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES: dict[str, Any] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": int | float,
    "object": dict,
    "string": str,
}
ANNOTATIONS = {"title", "description", "default"}


class JsonSchema:
    """What a schema says of documents.

    Parameters
    ----------
    schema : mapping
        With its definitions under ``$defs``.

    Raises
    ------
    ValueError
        When it is no schema: an unknown keyword, type or reference, anywhere in it.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.definitions: Mapping[str, Any] = schema.get("$defs", {})
        self.schema = {key: value for key, value in schema.items() if key != "$defs"}
        for part in [self.schema, *self.definitions.values()]:
            self._check(part)

    def accepts(self, document: Any) -> bool:
        """Return whether a document, made of what JSON knows, is valid."""
        return self._valid(self.schema, document)

    def _check(self, part: Any) -> None:
        """Walk through all of a schema, also where no document has led yet."""
        for keyword, value in part.items():
            if not hasattr(self, f"_{keyword.replace('$', '')}") and keyword not in ANNOTATIONS:
                message = f"unknown keyword {keyword!r}"
                raise ValueError(message)
            if keyword == "properties":
                for inner in value.values():
                    self._check(inner)
            elif keyword in {"anyOf", "allOf"}:
                for inner in value:
                    self._check(inner)
            elif keyword == "items" or (keyword == "additionalProperties" and not isinstance(value, bool)):
                self._check(value)
            elif keyword == "$ref" and value.removeprefix("#/$defs/") not in self.definitions:
                message = f"no definition for {value!r}"
                raise ValueError(message)
            elif keyword == "type" and value not in TYPES:
                message = f"unknown type {value!r}"
                raise ValueError(message)
            elif keyword == "required" and not set(value) <= set(part["properties"]):
                message = f"required but not there: {value!r}"
                raise ValueError(message)

    def _valid(self, part: Mapping[str, Any], value: Any) -> bool:
        return all(
            getattr(self, f"_{keyword.replace('$', '')}")(asked, value, part)
            for keyword, asked in part.items()
            if keyword not in ANNOTATIONS
        )

    def _type(self, asked: str, value: Any, _: Any) -> bool:
        return isinstance(value, TYPES[asked]) and not (isinstance(value, bool) and asked != "boolean")

    def _enum(self, asked: list[Any], value: Any, _: Any) -> bool:
        return value in asked

    def _const(self, asked: Any, value: Any, _: Any) -> bool:
        return bool(value == asked)

    def _anyOf(self, asked: list[Any], value: Any, _: Any) -> bool:  # noqa: N802 - the keyword's spelling
        return any(self._valid(part, value) for part in asked)

    def _allOf(self, asked: list[Any], value: Any, _: Any) -> bool:  # noqa: N802 - as above
        return all(self._valid(part, value) for part in asked)

    def _ref(self, asked: str, value: Any, _: Any) -> bool:
        return self._valid(self.definitions[asked.removeprefix("#/$defs/")], value)

    def _items(self, asked: Any, value: Any, _: Any) -> bool:
        return not isinstance(value, list) or all(self._valid(asked, item) for item in value)

    def _required(self, asked: list[str], value: Any, _: Any) -> bool:
        return not isinstance(value, dict) or set(asked) <= set(value)

    def _properties(self, asked: Mapping[str, Any], value: Any, _: Any) -> bool:
        return not isinstance(value, dict) or all(
            self._valid(part, value[name]) for name, part in asked.items() if name in value
        )

    def _additionalProperties(self, asked: Any, value: Any, part: Mapping[str, Any]) -> bool:  # noqa: N802 - as above
        if asked is True or not isinstance(value, dict):
            return True
        others = [other for name, other in value.items() if name not in part.get("properties", {})]
        return not others if asked is False else all(self._valid(asked, other) for other in others)

    def _minLength(self, asked: int, value: Any, _: Any) -> bool:  # noqa: N802 - as above
        return not isinstance(value, str) or len(value) >= asked

    def _minimum(self, asked: float, value: Any, _: Any) -> bool:
        return not isinstance(value, int | float) or value >= asked

    def _maximum(self, asked: float, value: Any, _: Any) -> bool:
        return not isinstance(value, int | float) or value <= asked

    def _exclusiveMinimum(self, asked: float, value: Any, _: Any) -> bool:  # noqa: N802 - as above
        return not isinstance(value, int | float) or value > asked
