"""A model's tokenizer from its files, without transformers: `tokenizers` reads tokenizer.json, jinja2 the template.

As much of transformers' tokenizer as `HFCodec` asks for, and the same in it. Only for files that say all of it: where
transformers builds a tokenizer in code of its own (SentencePiece alone, a class for a Metaspace vocabulary, Mistral's
format, code that comes with the model) `load_tokenizer` hands over to it, and a log line says so: that takes seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thaw.core.errors import IncompleteModel, NotFound, Unsupported
from thaw.engines.hf.beside import AGAIN, TOKENIZER, is_there, read_object, read_text, read_tokenizer
from thaw.engines.hf.config import refuse_foreign_code
from thaw.engines.hf.pieces import is_byte_level
from thaw.engines.hf.rendering import Messages, render

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_AS_FILED = ("PreTrainedTokenizer", "TokenizersBackend")
"""Classes (without "Fast") that transformers makes of tokenizer.json as it is."""
log = logging.getLogger(__name__)


class FileTokenizer:
    """`backend_tokenizer`: the `tokenizers.Tokenizer`. `special_tokens_map`: the named special tokens that it has."""

    def __init__(self, backend: Any, config: Mapping[str, Any], chat_template: str | dict[str, str] | None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = {name: _content(config[name]) for name in NAMED if config.get(name) is not None}
        self._add_tokens(config.get("added_tokens_decoder") or {})
        if backend.post_processor is None:
            backend.post_processor = _nothing_around()

    def __getattr__(self, name: str) -> Any:
        """`eos_token_id` and its like; None for a token that there is not."""
        if not name.endswith("_token_id") or name.removesuffix("_id") not in NAMED:
            raise AttributeError(name)
        token = self.special_tokens_map.get(name.removesuffix("_id"))
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def apply_chat_template(
        self,
        conversation: Messages,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as transformers' method of this name renders it with `tokenize=False`."""
        assert not tokenize
        return render(
            self._template(tools),
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens_map, **variables},
        )

    def _template(self, tools: Sequence[Any] | None) -> str:
        if not isinstance(self.chat_template, dict):
            return self.chat_template or ""
        names = ("tool_use", "default") if tools is not None else ("default",)
        found = next((self.chat_template[name] for name in names if name in self.chat_template), None)
        if found is None:
            raise Unsupported(f"the model has chat templates {sorted(self.chat_template)} and none is its default")
        return found

    def _add_tokens(self, added: Mapping[str, Any]) -> None:
        """Tokens that stand beside tokenizer.json only."""
        from tokenizers import AddedToken

        known = {token.content for token in self.backend_tokenizer.get_added_tokens_decoder().values()}
        listed = [token for _, token in sorted(added.items(), key=lambda item: int(item[0]))]
        more = [AddedToken(**token) for token in listed if token["content"] not in known]
        known |= {token["content"] for token in listed}
        more += [AddedToken(token, special=True) for token in self.special_tokens_map.values() if token not in known]
        if more:
            self.backend_tokenizer.add_tokens(more)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model in that folder, or of that hub id. Raises `NotFound`, `IncompleteModel` for files that
    are not whole, `Unsupported`."""
    try:
        config = _config(name)
        backend, why = _backend(name, config)
        template = _chat_template(name, config)
    except (OSError, ValueError) as error:  # of the hub
        raise _not_here(name, error) from None
    if backend is not None:
        return FileTokenizer(backend, config, template)
    log.warning("thaw: transformers reads the model's tokenizer, which takes some seconds: %s", why)
    try:
        return transformers_tokenizer(name)
    except ImportError as error:
        raise Unsupported(f"the tokenizer of {name} needs transformers ({why}), which is not here: {error}") from None


def transformers_tokenizer(name: str) -> Any:
    """The tokenizer that transformers makes of the model's files. Raises as `load_tokenizer`, and ImportError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_foreign_code(name, error)
        raise _not_here(name, error) from None
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 (the tokenizers library raises nothing narrower)
        raise IncompleteModel(f"transformers cannot read the tokenizer of {name}: {error!r}; {AGAIN}") from None


def _not_here(name: str, error: Exception) -> NotFound:
    return NotFound(f"the tokenizer of {name} could not be loaded here: {error}")


def _backend(name: str, config: Mapping[str, Any]) -> tuple[Any, str]:
    """tokenizer.json, or None and why it does not say what transformers would make of it."""
    filed = _find(name, TOKENIZER)
    if filed is None:
        return None, "it has no tokenizer.json"
    if "auto_map" in config:
        return None, "its code comes with the model"
    if _find(name, "tekken.json") is not None:
        return None, "it is in Mistral's format"
    backend, kind = read_tokenizer(filed), str(config.get("tokenizer_class"))
    if is_byte_level(backend) or kind.removesuffix("Fast") in _AS_FILED:
        return backend, ""
    return None, f"{kind} makes one of its own"


def _nothing_around() -> Any:
    """What transformers puts there; `add_bos_token` and `add_eos_token` do not count beside a tokenizer.json."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def _config(name: str) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens that older models have in a file of their own."""
    parts = [_read(name, file) for file in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for part in parts for key, value in part.items() if value is not None}


def _chat_template(name: str, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """A file goes before what stands in the config; several have names."""
    found: str | dict[str, str] | list[Any] | None = config.get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in found):
            raise ValueError("chat_template of tokenizer_config.json is a list of other than names and templates")
        found = {entry["name"]: entry["template"] for entry in found}
    file, more = _find(name, "chat_template.jinja"), sorted(Path(name, "additional_chat_templates").glob("*.jinja"))
    filed = {**({"default": file} if file is not None else {}), **{path.stem: path for path in more}}
    texts = {key: read_text(path) for key, path in filed.items() if is_there(path)}
    if not texts:
        return found
    return texts["default"] if list(texts) == ["default"] else texts


def _read(name: str, file: str) -> dict[str, Any]:
    path = _find(name, file)
    return {} if path is None else read_object(path)


def _find(name: str, file: str) -> Path | None:
    """A file of the model: in its folder, or of the hub; None where the model has no such file. Raises as `is_there`,
    and OSError or ValueError of the hub's."""
    if os.path.isdir(name):
        path = Path(name, file)
        return path if is_there(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)
