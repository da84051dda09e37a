"""A backend of vLLM's weight transfer (`--weight-transfer-config`) where there is no GPU: its trainer leaves files.

Transport alone is its own. How an update begins and ends, and how the weights get into the model, is vLLM's, as in its
`nccl` backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Nothing(WeightTransferInitInfo):
    pass


@dataclass
class Folder(WeightTransferUpdateInfo):
    folder: str


class FromFiles(WeightTransferEngine[Nothing, Folder]):
    init_info_cls = Nothing
    update_info_cls = Folder

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Folder) -> None:
        for file in sorted(Path(update_info.folder).glob("*.safetensors")):
            self.model.load_weights(load_file(file).items())

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(*_: object) -> None:
        """vLLM 0.26 wants the trainer's side in the same class."""


WeightTransferEngineFactory.register_engine("files", FromFiles)
