"""What thaw supports of vLLM, by name: of an engine's configuration once at boot, of one request when it comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from thaw.core.cache import FullKV, LatentKV, SlidingKV
from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.hf.config import overridden, windows
from thaw.engines.hf.groups import groups as groups_of
from thaw.engines.hf.latents import num_halved
from thaw.engines.served.protocol import KEY, MAX_RANKS, Message, Run, parse
from thaw.engines.vllm import recurrent, versions
from thaw.engines.vllm.settings import KEEPS_WINDOWS, LOGITS_PROCESSOR, STORED_FORMAT

CPU_BLOCKS = 32
ONE = "a session is one sequence; fork it and send a request for each child"
UNREAD = "a prompt whose KV is there is not read, so it has no log probabilities; leave one of the two out"
ALONE = (
    ("n", 1, ONE),
    ("structured_outputs", None, "say in the message where the completion began (grammar_from)"),
    ("prompt_logprobs", None, UNREAD),
    ("prompt_logprob_token_ids", None, UNREAD),
    ("skip_reading_prefix_cache", False, "a session goes on from KV that is there; leave one of the two out"),
)
"""Fields of vLLM's `SamplingParams` with their neutral value that cannot go with a message, and why."""


SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""What vLLM calls the specs of caches that are captured."""
OF_LATENTS = (
    ("tokens_per_state", 1, "a latent of several tokens is not captured"),
    ("state_content_bytes", None, "quantised latents are not captured; use kv_cache_dtype=auto"),
    ("model_version", None, "caches of DeepSeek V4 are not captured"),
)
"""Fields of a spec of latents with the value that plain ones have, and what another one is."""

SUPPORTED = "full attention, windows beside layers of full attention, and latents are supported"
FREED = (
    "vLLM's hybrid KV cache manager lets go of KV that has left a window while its session still runs; start vLLM with "
    f"--{KEEPS_WINDOWS.replace('_', '-')} ({KEEPS_WINDOWS}=True), as thaw's own boots do: it then keeps every token's"
)


def window_of(spec: Any) -> int | None:
    """How many tokens a token attends to in the layers of a cache spec, itself among them; None: all. vLLM keeps this
    in the spec of full attention that it makes of a window without its hybrid KV cache manager."""
    found = (getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return next((window for window in found if window is not None), None)


def require(config: Any, kv_cache_config: Any) -> None:
    """Raise `Unsupported` for the first thing that thaw cannot capture exactly."""
    require_config(config)
    _require_transfer(versions.whole(config).kv_transfer_config)
    groups = kv_cache_config.kv_cache_groups
    if recurrent.is_hybrid(config):
        recurrent.require_groups(groups)
        return
    if len(groups) != 1:
        sizes = sorted({window for group in groups if (window := window_of(group.kv_cache_spec)) is not None})
        if sizes:
            raise Unsupported(f"windows of {', '.join(map(str, sizes))} tokens: {FREED}")
        raise Unsupported(f"this model has {len(groups)} kinds of KV cache (hybrid); only one is supported")
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ not in SPECS:
        raise Unsupported(f"a cache of kind {type(spec).__name__}; {SUPPORTED}")
    for name, usual, why in OF_LATENTS:
        if getattr(spec, name, usual) != usual:
            raise Unsupported(f"latents with {name}={getattr(spec, name)}: {why}")
    if type(spec).__name__ == "FullAttentionSpec":
        _require_like_values(spec)
    elif window_of(spec) is not None:
        raise Unsupported(f"latents with a window of {window_of(spec)} tokens; {SUPPORTED}")


def _require_like_values(spec: Any) -> None:
    keys, values = getattr(spec, "head_size", None), getattr(spec, "head_size_v", None)
    if values not in (None, keys):
        raise Unsupported(f"values of {values} numbers beside keys of {keys}; {SUPPORTED}")


def require_config(config: Any) -> None:
    """The part of `require` that can be told before the engine starts."""
    _require_model(config.model_config, on_cpu=config.device_config.device_type == "cpu")
    _require_files(config)
    if recurrent.is_hybrid(config):
        recurrent.require(config)
    else:
        _require_attention(config)
    _require_transfer(config.kv_transfer_config)
    parallel = config.parallel_config
    if config.speculative_config is not None:
        method = getattr(config.speculative_config, "method", None)
        raise Unsupported(
            f"speculative decoding{f' ({method})' if method else ''}: a draft's state is not captured; start vLLM "
            "without speculative_config (--speculative-config). A model's own layers for drafts (MTP) do not run then"
        )
    if config.lora_config is not None:
        _require_lora(config)
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported(f"pipeline_parallel_size={parallel.pipeline_parallel_size}: ranks own layers; not supported")
    if parallel.tensor_parallel_size > MAX_RANKS:
        raise Unsupported(f"tensor_parallel_size={parallel.tensor_parallel_size}: at most {MAX_RANKS} are supported")
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise Unsupported("decode context parallelism shards a token's KV over ranks; not supported")
    if getattr(config, "watermark_config", None) is not None:
        raise Unsupported("watermarking looks back at what a request generated, not a session; start vLLM without it")
    if versions.runner(config) == "V1" and not _samples(config.model_config.logits_processors or ()):
        raise Unsupported(
            f"on vLLM's V1 runner thaw picks the tokens: name {LOGITS_PROCESSOR} in logits_processors, as the file of "
            "`thaw engine config vllm` and thaw.engines.vllm.settings.engine_args do"
        )
    cache = str(config.cache_config.cache_dtype)
    if cache not in ("auto", "bfloat16", "float16", "float32"):
        raise Unsupported(f"kv_cache_dtype={cache}: quantised KV is not captured; use auto")
    block_size = config.cache_config.block_size
    latents = getattr(config.model_config, "use_mla", False)  # whose attention has block sizes of its own
    if config.device_config.device_type == "cpu" and block_size % CPU_BLOCKS and not latents:
        raise Unsupported(
            f"block_size={block_size}: on a CPU vLLM's attention takes multiples of {CPU_BLOCKS}; leave it out for 128"
        )


def _require_lora(config: Any) -> None:
    """Where adapters may be: on releases and models that they were tested with."""
    import vllm

    if not versions.has_kinds(vllm.__version__):
        raise Unsupported(f"LoRA on vLLM {vllm.__version__}: adapters are part of a session from 0.32 on")
    if recurrent.is_hybrid(config):
        raise Unsupported("LoRA on a model with recurrent layers: this was not tested; start vLLM without enable_lora")


def require_adapter(lora: Any) -> None:
    """Raise `Unsupported` for a request's adapter whose content may change from step to step."""
    if getattr(lora, "load_inplace", False):
        raise Unsupported(
            f"adapter {lora.lora_name} was loaded in place (load_inplace): vLLM reads its files again with every step, "
            "so which content runs is not known; load it under another name"
        )


def require_one_rank(parallel: Any) -> None:
    """An engine inside a program is one engine: which rank gets a request is vLLM's choice there."""
    if parallel.data_parallel_size > 1:
        raise Unsupported(
            f"data_parallel_size={parallel.data_parallel_size} inside a program: start a server with it and attach to "
            "its address; sessions are then spread over its ranks"
        )


ATTENTIONS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""What a model's config calls layers that keep KV."""


def _require_attention(config: Any) -> None:
    """By the config alone; `require` looks at the caches that vLLM made of it."""
    model, cache = config.model_config, config.cache_config
    layers = set(getattr(model.hf_text_config, "layer_types", None) or ())
    others = sorted(layers - ATTENTIONS)
    if model.is_hybrid or model.is_attention_free or others:
        which = f" (layers of {', '.join(others)})" if others else ""
        raise Unsupported(
            f"a hybrid model or one without attention{which}: its layers keep a state, not KV; {SUPPORTED}"
        )
    if cache.sliding_window is not None:
        raise Unsupported(
            f"sliding_window={cache.sliding_window} in every layer: vLLM always lets go of KV that has left it; "
            f"{SUPPORTED}"
        )
    _require_like_heads(model.hf_text_config.to_dict(), latents=bool(getattr(model, "use_mla", False)))
    found = windows(vars(model.hf_text_config))
    sizes = ", ".join(f"{field}={window}" for field, window in found.items())
    if found:
        _require_windows(sizes)
    if found and not getattr(config.scheduler_config, KEEPS_WINDOWS, False):
        raise Unsupported(f"{sizes}: {FREED}")


def _require_like_heads(text: Mapping[str, Any], *, latents: bool) -> None:
    """vLLM makes one group of unlike specs of layers whose heads are others than those of the rest. `latents`: whether
    it keeps latents."""
    groups = groups_of(text, "bfloat16")
    if not latents and any(isinstance(group, LatentKV) for group in groups):
        raise Unsupported(
            f"{text.get('model_type')}: vLLM keeps keys and values where other engines keep its latents (MLA); "
            f"{SUPPORTED}"
        )
    found = [group for group in groups if isinstance(group, (FullKV, SlidingKV))]
    if len({(group.num_kv_heads, group.layer_planes) for group in found}) > 1:
        raise Unsupported(
            f"layers whose KV differs in more than its window ({'; '.join(map(str, found))}); {SUPPORTED}"
        )
    for group in found:
        if len({width for _, width in group.layer_planes}) > 1:
            raise Unsupported(f"values of other sizes than keys ({group}); {SUPPORTED}")


def _require_windows(sizes: str) -> None:
    """Older releases were not made right: some end at the first request of such a model."""
    import vllm

    if not versions.has_kinds(vllm.__version__):
        raise Unsupported(f"windows ({sizes}) on vLLM {vllm.__version__}: they are captured from 0.32 on")


def _require_transfer(transfer: Any) -> None:
    """A request that must not go on ends by a load that fails: computed again, it would go on unseen."""
    if transfer is not None and transfer.kv_load_failure_policy != "fail":
        raise Unsupported(
            f"kv_load_failure_policy={transfer.kv_load_failure_policy}: vLLM would compute again what thaw refuses to "
            "load; leave it out of kv_transfer_config for fail"
        )


def _require_model(model: Any, *, on_cpu: bool) -> None:
    if model.is_encoder_decoder:
        raise Unsupported("encoder-decoder models: their cross attention cache is not captured")
    if getattr(model, "is_multimodal_model", False):
        _require_text_only(model)
    if getattr(model, "use_mla", False):
        _require_latents(model, on_cpu=on_cpu)
    _require_tied(model.hf_text_config)
    if model.enable_prompt_embeds:
        raise Unsupported("enable_prompt_embeds: a session is made of tokens; start vLLM without it")
    if model.logprobs_mode != "raw_logprobs":
        raise Unsupported(
            f"logprobs_mode={model.logprobs_mode}: a session's log probabilities are of raw logits; use raw_logprobs"
        )


def _require_text_only(model: Any) -> None:
    """A multimodal class is of several parts; what counts is whether the others run. (vLLM's own property says that it
    takes media wherever a connector is loaded: their embeddings may come. `require_text` refuses those.)"""
    import vllm

    if not versions.has_kinds(vllm.__version__):
        raise Unsupported(f"multimodal models on vLLM {vllm.__version__}: their text part is supported from 0.32 on")
    if not getattr(model.multimodal_config, "language_model_only", False):
        raise Unsupported(
            "multimodal models: media are not part of a session yet. Their text part is supported: start vLLM with "
            "language_model_only=True (--language-model-only)"
        )


ALWAYS_TIED = ("gemma2", "lfm2", "lfm2_moe")
"""Types whose classes in vLLM have no head beside the embedding, whatever the config says and the files hold."""


def _require_tied(text: Any) -> None:
    kind = getattr(text, "model_type", "")
    if kind in ALWAYS_TIED and not getattr(text, "tie_word_embeddings", True):
        raise Unsupported(
            f"{kind} with a head of its own (tie_word_embeddings=false): vLLM takes its embedding for the head, so its "
            "answers would not be those of the files; run it on transformers"
        )


OTHER_LATENTS = {
    "index_topk": "sparse attention (DSA): its indexer keeps a cache of its own",
    "compress_ratios": "compressed attention (DeepSeek V4): its compressor keeps states",
}
"""Fields of a config by which a model keeps more than one latent a token and layer."""


def _require_latents(model: Any, *, on_cpu: bool) -> None:
    import vllm

    if not versions.has_kinds(vllm.__version__):
        raise Unsupported(f"MLA (latent attention) on vLLM {vllm.__version__}: it is captured from 0.32 on")
    for name, what in OTHER_LATENTS.items():
        if getattr(model.hf_text_config, name, None) is not None:
            raise Unsupported(f"{what} ({name} in its config): only plain MLA is captured")
    num_halved(model.hf_text_config.to_dict())
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    if on_cpu and (rope.get("rope_type", "default") == "default" or rope.get("attention_factor") == 1.0):
        raise Unsupported(
            "MLA with a plain rope on a CPU: vLLM's operator there rotates its queries by wrong positions, and keys by "
            "what is read with them; use a GPU (yarn is computed by other code, and supported)"
        )


LOADED_FROM_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", STORED_FORMAT)
"""Values of `load_format` that read the files which the identity is made of."""
MISTRAL = "consolidated*.safetensors"
"""Files that vLLM takes before all others where `load_format` is auto."""


def _require_files(config: Any) -> None:
    """What runs must be what the folder says, for that is the model's identity; overridden fields are part of it."""
    model, load_format = config.model_config, str(config.load_config.load_format)
    if load_format not in LOADED_FROM_FILES:
        raise Unsupported(
            f"load_format={load_format}: the weights that run must be those of the folder's files; use auto"
        )
    if load_format == "auto" and _has_files(model.model, MISTRAL):
        raise Unsupported(
            f"load_format=auto: vLLM would load {MISTRAL} of {model.model}, in Mistral's format, and other engines "
            "load the files beside it; start vLLM with load_format=hf (--load-format hf)"
        )
    if model.quantization is not None and getattr(model.hf_config, "quantization_config", None) is None:
        raise Unsupported(
            f"quantization={model.quantization} of a checkpoint that is not quantised: other weights run than its "
            "files hold; start vLLM without it"
        )
    if model.hf_config_path not in (None, model.model):
        raise Unsupported(f"hf_config_path={model.hf_config_path}: the config must be the one beside the weights")
    if callable(model.hf_overrides):
        raise Unsupported("hf_overrides as a function: a session's identity cannot tell it; give the fields by name")


def _has_files(model: str, pattern: str) -> bool:
    from thaw.engines.hf.checkpoint import local_folder

    folder = local_folder(model)
    return folder is not None and any(folder.glob(pattern))


ALLOWED = "model_max_length"
"""The field of a config up to which vLLM takes a `max_model_len` beyond the one that it derives. The model computes
nothing from it."""
FITTED = -1
"""A `max_model_len` by which vLLM takes what fits into memory."""


def overrides(model: Any) -> dict[str, Any]:
    """The config's fields that vLLM was told to run in place of the folder's, as it resolved them."""
    return overridden(model.hf_config, model.hf_overrides.keys() - {ALLOWED})


def require_request(params: Any) -> None:
    """Raise `InvalidRequest` where a request carries a message that is none of thaw's, and `Unsupported` where it asks
    for what a session cannot continue with besides.

    `params` are its `SamplingParams`. Requests without a message are nobody's business here."""
    transfer = (params.extra_args or {}).get("kv_transfer_params")
    message = parse(transfer if isinstance(transfer, dict) else None)
    if message is not None:
        require_alone(params, message)


def require_text(request: Any) -> None:
    """Raise `Unsupported` for a request with an image or another medium in it."""
    media = sorted({str(feature.modality) for feature in getattr(request, "mm_features", None) or ()})
    if media:
        raise Unsupported(
            f"{media[0]} in a request that carries kv_transfer_params[{KEY!r}]: a session is of text alone"
        )


def require_alone(params: Any, message: Message) -> None:
    """Raise `Unsupported` for a parameter that cannot go with the message, `InvalidRequest` for a message that needs
    one which is not there."""
    if isinstance(message, Run) and message.grammar_from is not None and params.structured_outputs is None:
        raise InvalidRequest(
            f"kv_transfer_params.{KEY}: grammar_from={message.grammar_from} in a request without structured_outputs: "
            "there is no grammar; leave one out, or send the other, too"
        )
    for name, usual, why in ALONE:
        asked = getattr(params, name, None)
        if name == "structured_outputs" and getattr(message, "grammar_from", None) is not None:
            continue
        if asked is not None and (usual is None or asked != usual):
            raise Unsupported(f"{name} in a request that carries kv_transfer_params[{KEY!r}]: {why}")


def most_logprobs(model: Any) -> int:
    """How many log probabilities a request may ask for. -1 is vLLM's word for all of the vocabulary."""
    return int(model.max_logprobs) if model.max_logprobs >= 0 else int(model.get_vocab_size())


def _samples(processors: Iterable[str | type]) -> bool:
    """Whether thaw's logits processor is among them, by name or as the class itself."""
    names = (p if isinstance(p, str) else f"{p.__module__}:{p.__qualname__}" for p in processors)
    return LOGITS_PROCESSOR in names
