"""A Python function as a tool, by its type hints and docstring, as transformers reads them."""

from __future__ import annotations

from collections.abc import Callable

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Message


def schema_of(function: Callable[..., object]) -> Message:
    """The function's JSON schema. Raises `InvalidRequest` where hints or docstring do not tell it."""
    from transformers.utils import chat_template_utils as hf

    try:
        schema: Message = hf.get_json_schema(function)
    except (hf.DocstringParsingException, hf.TypeHintParsingException, TypeError, ValueError, NameError) as error:
        name = getattr(function, "__name__", repr(function))
        raise InvalidRequest(
            f"the function {name} cannot be offered as a tool: {error}. Give it type hints and a docstring with an "
            "Args: section that describes each argument, or pass the tool as a JSON schema."
        ) from None
    return schema
