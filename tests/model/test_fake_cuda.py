"""The forward pass on a GPU's tensors without numbers: one device, and no read by the host.

Where torch is a CUDA build; it needs no GPU. A backward pass would start a thread of the device.
"""

import pytest
import torch
from torch import nn

from sedd_scale.config import Config
from sedd_scale.model import attention, compiled
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel import score_kernel, vocab
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.parallel.vocab import ScoreTargets
from tests.model.small_network import fake_tensors

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.cond_dim=16"),
    *("model.vocab_size=50", "data.block_length=24", "model.dropout=0.1"),
)
OTHER = (
    *("model.norm=rmsnorm", "model.num_kv_heads=1", "model.qk_norm=true", "model.head_bias=false"),
    *("model.activation=swiglu", "model.mlp_bias=false", "model.parametrisation=mean"),
)
BATCH, LENGTH, ROWS = 3, 24, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "overrides", [(), ("graph.name=uniform",), OTHER], ids=["absorb", "uniform", "another trunk"]
)
@pytest.mark.parametrize("what", ["loss", "sequences", "documents"])
def test_nothing_leaves_the_device(
    what: str, overrides: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "on_gpu", lambda tensor: False)
    for module in (score_kernel, vocab):
        monkeypatch.setattr(module, "has_kernel", lambda table: False)
    monkeypatch.setattr(attention, "_major_capability", lambda device: 9)
    # Summed in float32 by the product, which these tensors cannot be asked for.
    monkeypatch.setattr(vocab, "_add_product", lambda total, left, right, first: None)
    model = ScoreModel(Config().override(*SMALL, *overrides), 50, initialize_layout())
    with fake_tensors(), torch.device("cuda"):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    copy = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
                    copy.__dict__.update(parameter.__dict__)
                    module._parameters[name] = copy
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        keys = torch.zeros(BATCH, 1, dtype=torch.long)
        inputs = (tokens, torch.rand(BATCH), keys)
        rows = [torch.zeros(ROWS, dtype=torch.long) for _ in range(4)]
        noise, weight = (
            torch.rand(BATCH, 3, dtype=torch.float64),
            torch.rand((), dtype=torch.float64),
        )
        targets = ScoreTargets(*rows, noise, weight)
        model.network.train()
        if what == "loss":
            found = model.network(inputs, targets)
        elif what == "sequences":
            found = model.network(inputs, targets, per_sequence=True)
        else:
            ends = torch.zeros(BATCH, 2, dtype=torch.long)
            monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: "sdpa")
            found = model.network.hidden(tokens, inputs[1], ends)
        assert found.device.type == "cuda"
