"""A model in memory as a source of conversions."""

from pathlib import Path

from torch import Tensor

from sedd_scale.interop.checkpoint_source import CheckpointSource, Description
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel


class ModelSource(CheckpointSource):
    """The weights of a model of one process."""

    format = "model"

    def __init__(self, model: ScoreModel, tokenizer_directory: Path | None = None) -> None:
        assert model.layout.tensor == 1
        self.path = Path()
        self.holds = frozenset({"ema"})
        config = model.config.override(f"model.vocab_size={model.graph.num_tokens}")
        if model.block_length is not None:
            config = config.override(f"data.block_length={model.block_length}")
        self.described = Description(
            config=config, block_length=model.block_length, tokenizer_directory=tokenizer_directory
        )
        self._parameters = {p.name: p for p in logical_parameters(model.network, model.layout)}
        assert {name: p.shape for name, p in self._parameters.items()} == self.shapes

    def _read(self, name: str, key: str) -> Tensor:
        shard = self._parameters[name].shard
        assert shard is not None
        return shard.cpu()
