"""What a process of SGLang imports before it does anything (`tests/warm`)."""

import importlib
from contextlib import suppress

for name in (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.llama",
    "thaw.engines.sglang.cache",
    "thaw.engines.sglang.plugin",
    "thaw.engines.sglang.serve",
):
    with suppress(ImportError):  # releases differ; what is not imported here is where it is needed
        importlib.import_module(name)
