"""The shape of the trunk's blocks, said once for the network, the plan and benchmarks."""

from dataclasses import dataclass, fields
from typing import Any

from sedd_scale.config.sections import NETWORK, ModelConfig

# What every network of the published trunk says of itself.
_PUBLISHED = (
    *("hidden_size", "num_layers", "num_heads", "cond_dim", "mlp_ratio", "rotary_base"),
    *("scale_by_sigma", "parametrisation", "time_conditioning"),
)
GATED = ("swiglu", "geglu")
"""Activations with a second product as their factor."""
GATE_PARTS = ("gate", "up")
"""What the two are called, in the order in which they lie."""


def beyond_published(model: ModelConfig) -> dict[str, Any]:
    """Keys by which a network has another trunk than published SEDD, with their values."""
    return {
        key.name: value
        for key in fields(model)
        if key.metadata["shared"] == NETWORK and key.name not in _PUBLISHED
        if (value := getattr(model, key.name)) != key.default
    }


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block.

    Attributes:
        name: within the block, without ".weight".
        part: what it belongs to in a table for people.
        rows, columns: of the whole matrix.
        split_dim: the axis that tensor parallelism splits.
        has_bias: whether a bias of `rows` numbers goes with it.
    """

    name: str
    part: str
    rows: int
    columns: int
    split_dim: int
    has_bias: bool

    @property
    def module(self) -> str:
        """The module whose parameter it is, or is a part of."""
        return ".".join(self.name.split(".")[:2])


@dataclass(frozen=True)
class TrunkShape:
    """Numbers of one block.

    Attributes:
        width: of the residual stream.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: of one head.
        inner: of the MLP between its two matrices.
        gated: whether the MLP's activation has a second product as its factor.
        qk_norm, norm_bias: whether there are norms of queries and keys; whether norms have a bias.
        qkv_bias, out_bias, mlp_bias: which matrices have one.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool = False
    qk_norm: bool = False
    norm_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = True

    @classmethod
    def of(cls, model: ModelConfig) -> "TrunkShape":
        """What a configuration says."""
        return cls(
            width=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads or model.num_heads,
            head_dim=model.head_dim or model.hidden_size // model.num_heads,
            inner=model.ffn_hidden_size or model.mlp_ratio * model.hidden_size,
            gated=model.activation in GATED,
            qk_norm=model.qk_norm,
            norm_bias=model.norm_bias,
            qkv_bias=model.qkv_bias,
            out_bias=model.attention_out_bias,
            mlp_bias=model.mlp_bias,
        )

    @property
    def query_rows(self) -> int:
        """Of all queries of a position, and of attention's output."""
        return self.heads * self.head_dim

    @property
    def turned_rows(self) -> int:
        """Of queries and keys, which know positions."""
        return self.query_rows + self.kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Of queries, keys and values."""
        return self.turned_rows + self.kv_heads * self.head_dim

    @property
    def inner_rows(self) -> int:
        """Of what the MLP's first matrix makes of a position."""
        return (1 + self.gated) * self.inner

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """In the order in which the block registers them.

        The two of a gated MLP lie in one parameter, one under the other on every tensor rank.
        """
        parts = [f".{part}" for part in GATE_PARTS] if self.gated else [""]
        first = (
            Matrix(f"mlp.linear_fc1{part}", "mlp", self.inner, self.width, 0, self.mlp_bias)
            for part in parts
        )
        return (
            Matrix(
                "attention.linear_proj",
                "attention",
                self.width,
                self.query_rows,
                1,
                self.out_bias,
            ),
            Matrix(
                "attention.linear_qkv", "attention", self.qkv_rows, self.width, 0, self.qkv_bias
            ),
            *first,
            Matrix("mlp.linear_fc2", "mlp", self.width, self.inner, 1, self.mlp_bias),
        )

    @property
    def products(self) -> int:
        """Multiplications of a position with all matrices."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)
