"""A loaded module as thaw runs it: modules of thaw's own over the owner's parameters.

The owner goes on using the module, usually to train it. thaw must run it in eval mode, with its own attention and
cache, and may not change any of that under the owner, not even for a moment: the two run on different threads. So the
tree of modules is copied and the tensors are not. Each copy shares the original's dicts of parameters, buffers and
hooks, which is why an optimizer's step, and also a parameter that is put in another's place, is seen at once. What is
thaw's own: the train/eval flag, and the config (the attention implementation is chosen there).
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from blake3 import blake3
from transformers import PreTrainedConfig

from thaw.core.errors import StaleSession, Unsupported

Module = Any
"""A torch module; transformers' classes carry no usable types."""


def over(owner: Module) -> Module:
    """The same model in eval mode over the same tensors; nothing of `owner` is changed, now or when it runs.

    Raises `Unsupported`, naming it, for what hides the model or its weights: a wrapper, an adapter, shards.
    """
    _require_whole(owner)
    shells: dict[int, Module] = {}
    configs: dict[int, Any] = {}
    top = _shell(owner, shells, configs)
    for shell in shells.values():
        _rebind(shell, shells)
    return top.eval()


def stamp(owner: Module, shell: Module) -> str:
    """Changes when a parameter is moved, or updated in place however little: where each one lies, and torch's count of
    its updates. A fused optimizer does not count; its steps show in the values that `sample_weights` looks at.

    Raises `StaleSession` when the owner has other modules or parameters than when thaw joined it."""
    theirs = list(owner.parameters())
    if [id(p) for p in theirs] != [id(p) for p in shell.parameters()]:
        raise StaleSession(
            f"{type(owner).__name__} has other modules than when thaw joined it (an adapter was put in, or a layer "
            "replaced), so what thaw would run is no longer that model; attach it again"
        )
    return blake3(repr([(p.data_ptr(), _updates(p)) for p in theirs]).encode()).hexdigest()


def _updates(parameter: torch.Tensor) -> int:
    """torch counts in-place updates, except of tensors made in inference mode."""
    return -1 if parameter.is_inference() else parameter._version


def _require_whole(owner: Module) -> None:
    name = type(owner).__name__
    if hasattr(owner, "peft_config") or getattr(owner, "_hf_peft_config_loaded", False):
        raise Unsupported(f"{name} carries an adapter (PEFT): merge it into the model (merge_and_unload), then attach")
    if not hasattr(owner, "config") or not hasattr(owner, "base_model"):
        raise Unsupported(
            f"{name} is no transformers model, perhaps a wrapper around one: attach the model inside it "
            "(accelerator.unwrap_model(trainer.model), or its .module)"
        )
    devices = {str(p.device) for p in owner.parameters()}
    if len(devices) != 1:
        raise Unsupported(f"{name}'s weights lie on {', '.join(sorted(devices))}: all on one device are supported")
    for parameter_name, p in owner.named_parameters():
        if hasattr(p, "ds_id") or hasattr(p, "device_mesh"):
            raise Unsupported(f"{parameter_name} is sharded over processes (ZeRO-3, FSDP); gather the model first")


def _shell(module: Module, shells: dict[int, Module], configs: dict[int, Any]) -> Module:
    known = shells.get(id(module))
    if known is not None:
        return known
    shell = shells[id(module)] = object.__new__(type(module))
    own = {name: _own_config(value, configs) for name, value in module.__dict__.items()}
    own["_modules"] = {
        name: None if child is None else _shell(child, shells, configs) for name, child in module._modules.items()
    }
    shell.__dict__.update(own)
    return shell


def _own_config(value: Any, configs: dict[int, Any]) -> Any:
    """A config's copy, the same one wherever the same config stood; anything else as it is."""
    if not isinstance(value, PreTrainedConfig):
        return value
    return configs.setdefault(id(value), copy.deepcopy(value))


def _rebind(shell: Module, shells: dict[int, Module]) -> None:
    """Methods that were patched into a module's instance (kernels, autocast) run on its shell, not on the original."""
    for name, value in list(shell.__dict__.items()):
        if isinstance(value, MethodType) and id(value.__self__) in shells:
            shell.__dict__[name] = MethodType(value.__func__, shells[id(value.__self__)])
