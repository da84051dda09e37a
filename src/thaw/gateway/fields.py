"""Bodies of requests, field by field, by one table an endpoint.

A field is *taken* (it stands in the struct), *ignored* (it cannot change the output; a header of the reply names it)
or *idle* (taken only with a value that asks for nothing). Any other is refused by name. `null` is a field not given.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Generic, TypeVar

import msgspec

from thaw.gateway.problems import ApiError, invalid, unsupported

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


class Fields(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """An endpoint's table. `idle`: the values with which a field asks for nothing."""

    taken: type[T]
    ignored: frozenset[str] = frozenset()
    idle: dict[str, tuple[object, ...]] = {}

    def read(self, body: bytes) -> tuple[T, list[str]]:
        """The request, and the names of what was ignored. Raises `ApiError` naming the field."""
        given = {name: value for name, value in _decoded(body).items() if value is not None}
        known = _names(self.taken)  # type: ignore[arg-type]
        taken, ignored = {}, []
        for name, value in given.items():
            if name in known:
                taken[name] = value
            elif name in self.ignored:
                ignored.append(name)
            elif not self._is_idle(name, value):
                raise unsupported(name[:80], self._why(name))
        try:
            return msgspec.convert(taken, self.taken), sorted(ignored)
        except msgspec.ValidationError as error:
            raise _refused(error) from None

    def _is_idle(self, name: str, value: object) -> bool:
        return any(value == nothing and type(value) is type(nothing) for nothing in self.idle.get(name, ()))

    def _why(self, name: str) -> str:
        if name in self.idle:
            return f"only {', '.join(map(repr, self.idle[name]))} is supported here; leave it out"
        return "this gateway does not support it, and it could change the output; leave it out"


@functools.cache
def _names(taken: type) -> frozenset[str]:
    """The fields of a struct, as bodies spell them."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(taken))


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return given


def _refused(error: msgspec.ValidationError) -> ApiError:
    text = str(error)
    found = _PATH.search(text)
    if found is not None:
        return invalid(found[1], text[: found.start()])
    missing = re.search(r"required field `([^`]+)`", text)
    return invalid(missing[1], "it is required") if missing else ApiError(400, text)
