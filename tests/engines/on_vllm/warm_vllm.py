"""What a process of vLLM imports before it does anything (`tests/warm`)."""

import importlib
from contextlib import suppress

for name in (
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.openai.api_server",
    "thaw.engines.vllm.connector",
    "thaw.engines.vllm.sampling",
    "thaw.engines.vllm.scheduler",
    "thaw.engines.vllm.worker",
):
    with suppress(ImportError):  # releases differ; what is not imported here is where it is needed
        importlib.import_module(name)
