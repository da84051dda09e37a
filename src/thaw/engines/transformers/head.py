"""From hidden states to logits as the model's own class does it: its head, and what it does to the logits afterwards.

The class's own forward pass runs over a body that answers with the given hidden states, so scales and soft caps are
those of its code.
"""

from __future__ import annotations

from typing import Any

import torch


def body_of(module: Any) -> Any:
    """The language model without its head, which of a multimodal class is one part."""
    decoder = module.get_decoder()
    return getattr(decoder, "model", decoder)


class GivenHidden:
    """A body's output: the last hidden state, and None for whatever else the class may ask for."""

    def __init__(self, hidden_1ND: torch.Tensor) -> None:
        self.last_hidden_state = hidden_1ND

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state, *(None,) * 7)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class GivenBody(torch.nn.Module):
    """Stands where the body stood; its answer is set before each call. Whatever else the class reads of its body, such
    as a scale for the logits, is the body's own."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_stood_here"] = body
        self.__dict__["decoder"] = self  # what OPT's class calls
        self.answer: GivenHidden | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_here"], name)

    def forward(self, *_: Any, **__: Any) -> GivenHidden | None:
        return self.answer


class StockHead:
    """`module`'s forward pass after its body. Shares everything with `module` and changes nothing of it."""

    def __init__(self, module: Any) -> None:
        top, decoder = _with_head(module), body_of(module)
        self._body = GivenBody(decoder)
        self._top = object.__new__(type(top))
        inside = {name: self._body if _has(child, decoder) else child for name, child in top._modules.items()}
        self._top.__dict__.update({**top.__dict__, "_modules": inside})
        self._ids = torch.zeros((1, 1), dtype=torch.long, device=module.device)

    def __call__(self, row_D: torch.Tensor) -> torch.Tensor:
        """[vocabulary], of one token's last hidden state."""
        self._body.answer = GivenHidden(row_D[None, None])
        logits: torch.Tensor = self._top(input_ids=self._ids, use_cache=False, return_dict=True).logits
        return logits[0, -1]


def _with_head(module: Any) -> Any:
    """The module that has the head as its own child: of a multimodal class it may be one inside."""
    head = module.get_output_embeddings()
    while not any(child is head for child in module.children()):
        module = next(child for child in module.children() if _has(child, head))
    return module


def _has(module: Any, part: Any) -> bool:
    return module is not None and any(inner is part for inner in module.modules())
