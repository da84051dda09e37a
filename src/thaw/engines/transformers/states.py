"""Recurrent states between transformers' cache layers and the blobs of a point state.

A session's state after n tokens is a tensor for each part, [H, L, …shape], made by a forward pass and never changed;
its blobs are `HeldBlob`s of these. A pass copies it into the layers of the cache, which the stock model updates in
place, and what they hold afterwards becomes the next state. So a state is read once, and forks share it until they run.

Shape letters: H heads of a part, L the group's layers, C channels of a convolution, K its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from thaw.core.cache import CacheGroup, PointState, StatePart, point_groups
from thaw.engines.embedded.pages import PagedKV, StateBlob, States
from thaw.engines.hf.recurrent import RECURRENT


@dataclass(frozen=True, eq=False)
class HeldBlob:
    """A blob of a state that lies in a tensor; its bytes are copied when somebody asks for them."""

    part_HL: torch.Tensor
    head: int

    def __len__(self) -> int:
        return self.part_HL[self.head].numel() * self.part_HL.element_size()

    def __bytes__(self) -> bytes:
        return bytes(self.part_HL[self.head].contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A recurrent layer's state of one session, as the stock model keeps it."""

    def __init__(self) -> None:
        super().__init__()

    def fill(self, conv_CK: torch.Tensor, recurrent_H: torch.Tensor | None) -> None:
        """Begin from a state; the tensors become this layer's own."""
        self.conv_states[0], self.conv_kernel_size[0] = conv_CK.unsqueeze(0), conv_CK.shape[-1]
        self.dtype, self.device = conv_CK.dtype, conv_CK.device
        self.is_conv_states_initialized[0] = self.has_previous_state[0] = True
        if recurrent_H is not None:
            self.recurrent_states[0] = recurrent_H.unsqueeze(0)
            self.is_recurrent_states_initialized[0] = True


class GroupStates:
    """The states of one point group; `layers` are lists of its layers' `StateLayer`, in order."""

    def __init__(self, group: PointState, device: torch.device) -> None:
        self.group, self._device = group, device
        self._convs = [part for part in group.parts if part.name != RECURRENT]
        self._recurrent = next((part for part in group.parts if part.name == RECURRENT), None)

    def fill(self, layers: Sequence[StateLayer], blobs: Sequence[StateBlob]) -> None:
        """Copy a state into the layers."""
        parts, at = {}, 0
        for part in self.group.parts:
            parts[part.name] = self._tensor(part, blobs[at : at + part.num_heads])
            at += part.num_heads
        for number, layer in enumerate(layers):
            columns = torch.cat([parts[part.name][:, number].flatten(0, 1) for part in self._convs])
            conv_CK = torch.nn.functional.pad(columns, (1, 0))
            layer.fill(conv_CK, None if self._recurrent is None else parts[RECURRENT][:, number].clone())

    def read(self, layers: Sequence[StateLayer]) -> States:
        """The blobs of what the layers hold now."""
        conv_LC = torch.stack([layer.conv_states[0][0, :, 1:] for layer in layers])
        found, at = [], 0
        for part in self._convs:
            channels = part.num_heads * part.shape[0]
            own_LH = conv_LC[:, at : at + channels].reshape(len(layers), part.num_heads, *part.shape)
            found.append(own_LH.transpose(0, 1).contiguous())
            at += channels
        if self._recurrent is not None:
            found.append(torch.stack([layer.recurrent_states[0][0] for layer in layers], 1))
        return tuple(HeldBlob(part_HL, head) for part_HL in found for head in range(part_HL.shape[0]))

    def _tensor(self, part: StatePart, blobs: Sequence[StateBlob]) -> torch.Tensor:
        """A part as [H, L, …shape]."""
        first = blobs[0]
        if isinstance(first, HeldBlob) and all(
            isinstance(blob, HeldBlob) and blob.part_HL is first.part_HL and blob.head == head
            for head, blob in enumerate(blobs)
        ):
            return first.part_HL
        dtype, shape = getattr(torch, part.dtype), (self.group.num_layers, *part.shape)
        heads = [torch.frombuffer(bytearray(bytes(blob)), dtype=dtype).view(shape) for blob in blobs]
        return torch.stack(heads).to(self._device)


class AllStates:
    """The states of a model's layers in one session; a model without recurrent layers has none."""

    def __init__(self, groups: Sequence[CacheGroup], device: torch.device) -> None:
        self._groups = [GroupStates(group, device) for group in point_groups(groups)]

    def fill(self, layers: Sequence[Any], kv: PagedKV) -> None:
        """Copy the state after the session's tokens into the layers of a cache; before the first there is none."""
        at = 0
        for one in self._groups if kv.num_tokens else ():
            blobs = kv.points[kv.num_tokens][at : at + one.group.num_blobs]
            one.fill([layers[number] for number in one.group.layer_numbers], blobs)
            at += one.group.num_blobs

    def keep(self, layers: Sequence[Any], kv: PagedKV) -> None:
        """Give the session what the layers hold after a pass, as the state after all its tokens."""
        if self._groups:
            found = [one.read([layers[number] for number in one.group.layer_numbers]) for one in self._groups]
            kv.keep(tuple(chain.from_iterable(found)))


Kept = list[tuple[tuple[int, ...], str]]
"""Shape and dtype of each of a layer's states: of the convolution, then of the recurrence."""


def found_in(layer: LinearAttentionLayer) -> Kept:
    """What a stock model's own layer keeps."""
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in states if t is not None]


def expected_of(parts: Sequence[StatePart]) -> Kept:
    """What one keeps whose state has these parts."""
    convs = [part for part in parts if part.name != RECURRENT]
    matrix = next((part for part in parts if part.name == RECURRENT), None)
    channels, columns = sum(part.num_heads * part.shape[0] for part in convs), convs[0].shape[1] + 1
    expected: Kept = [((channels, columns), str(convs[0].dtype))]
    return expected + ([] if matrix is None else [((matrix.num_heads, *matrix.shape), str(matrix.dtype))])
