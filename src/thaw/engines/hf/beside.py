"""The small files beside a model's weights: its config, what ends its texts, its tokenizer, its chat templates.

Each is read whole and its fields are looked at before an engine reads it, because engines treat a damaged one
differently: transformers and vLLM ignore a truncated generation_config.json, and a text then ends elsewhere.
No torch and no transformers here, as clients of served engines read these files, too.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import IncompleteModel, StorageFailed

AGAIN = "get the files again"
CUT = f"Its download was cut short, or it was damaged; {AGAIN}"
LFS_HEAD = b"version https://git-lfs.github.com/spec/"
LFS_NBYTES = 1024
"""A pointer is shorter than this."""
POINTER = "{} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
MAX_NBYTES = 256 << 20
"""The largest tokenizer.json there is has an eighth of it."""


class Token(msgspec.Struct):
    content: str


class Template(msgspec.Struct):
    name: str
    template: str


Named = str | Token | None
Ends = int | list[int] | None


class Config(msgspec.Struct):
    model_type: str | None = None
    architectures: list[str] | None = None
    eos_token_id: Ends = None
    quantization_config: dict[str, Any] | None = None


class GenerationConfig(msgspec.Struct):
    eos_token_id: Ends = None


class SpecialTokens(msgspec.Struct):
    bos_token: Named = None
    eos_token: Named = None
    unk_token: Named = None
    sep_token: Named = None
    pad_token: Named = None
    cls_token: Named = None
    mask_token: Named = None


class TokenizerConfig(SpecialTokens):
    added_tokens_decoder: dict[int, Token] | None = None
    chat_template: str | list[Template] | dict[str, str] | None = None
    tokenizer_class: str | None = None


FIELDS: dict[str, Any] = {
    "config.json": Config,
    "generation_config.json": GenerationConfig,
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": SpecialTokens,
    "added_tokens.json": dict[str, int],
    "vocab.json": dict,
}
"""The fields that a boot reads of each JSON object; others are left to the engine."""
TOKENIZER = "tokenizer.json"
NAMES = (*FIELDS, TOKENIZER, "merges.txt", "vocab.txt")
PATTERNS = ("*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""With `NAMES` every file beside the weights that a boot may read."""


def require_beside(folder: Path) -> None:
    """Raise `IncompleteModel` for the first file beside the weights in `folder` that is a Git LFS pointer, a link to
    nothing, cut short, or not of the kind that its name says; `StorageFailed` for one that may not be read."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise may_not_read(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    more = (path for pattern in PATTERNS for path in sorted(folder.glob(pattern)))
    for path in (*(folder / name for name in NAMES), *more):
        if not is_there(path):
            continue
        if path.name in FIELDS:
            read_object(path)
        elif path.name == TOKENIZER:
            read_tokenizer(path)
        elif path.suffix == ".model":
            refuse_pointer(path)
        else:
            read_text(path)


def is_there(path: Path) -> bool:
    """Whether the model has this file. Raises `IncompleteModel` for a link to nothing, a folder, a pipe."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise may_not_read(path, error) from None
        if not path.is_symlink():
            return False
        raise IncompleteModel(f"{path} is a link to {os.readlink(path)}, which is not there; {AGAIN}") from None
    if not stat.S_ISREG(mode):
        raise IncompleteModel(f"{path} is no file but a folder, a pipe or a device; {AGAIN}")
    return True


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of the `FIELDS`' files, its fields of the kinds that engines take."""
    text = read_text(path)
    try:
        return parse_object(text, path, FIELDS[path.name])
    except ValueError as error:
        raise IncompleteModel(str(error)) from None


def parse_object(text: str, path: Path, fields: Any) -> dict[str, Any]:
    """The JSON object in `text`, which is that of `path`. Raises ValueError, which says what is wrong with the file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} ({len(text)} characters) is not JSON: {str(error)[:200]}. {CUT}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object but a {type(found).__name__}; {AGAIN}")
    try:
        msgspec.convert(found, fields, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}; correct it, or {AGAIN}") from None
    return found


def read_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json."""
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise IncompleteModel(f"{path} is no tokenizer that the tokenizers library reads: {error}. {CUT}") from None


def read_text(path: Path) -> str:
    refuse_pointer(path)
    data = _read(path, MAX_NBYTES + 1)
    if len(data) > MAX_NBYTES:
        raise IncompleteModel(f"{path} has more than {MAX_NBYTES:,} bytes, more than any model's; {AGAIN}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IncompleteModel(f"{path} is not text in UTF-8: {error}; {AGAIN}") from None


def refuse_pointer(path: Path) -> None:
    if is_pointer(_read(path, LFS_NBYTES)):
        raise IncompleteModel(POINTER.format(path))


def is_pointer(data: bytes) -> bool:
    return data.startswith(LFS_HEAD)


def may_not_read(path: Path, error: OSError) -> StorageFailed:
    """The error for a file or folder of the model that the operating system does not let this user read."""
    code = errno.errorcode.get(error.errno or 0, "?")
    return StorageFailed(
        f"cannot read {path}: {error.strerror} ({code}). Give this user the right to read the model's files and the "
        "folders above them"
    )


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise may_not_read(path, error) from None
