"""The shape of the trunk's blocks, said once for the network, the plan and benchmarks."""

from dataclasses import dataclass

from sedd_scale.config.sections import ModelConfig


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


@dataclass(frozen=True)
class TrunkShape:
    """Numbers of one block.

    Attributes:
        width: of the residual stream.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: of one head.
        inner: of the MLP between its two matrices.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @classmethod
    def of(cls, model: ModelConfig) -> "TrunkShape":
        """What a configuration says."""
        return cls(
            width=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_heads,
            head_dim=model.hidden_size // model.num_heads,
            inner=model.mlp_ratio * model.hidden_size,
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
    def matrices(self) -> tuple[Matrix, ...]:
        """In the order in which the block registers them."""
        return (
            Matrix("attention.linear_proj", "attention", self.width, self.query_rows, 1, False),
            Matrix("attention.linear_qkv", "attention", self.qkv_rows, self.width, 0, False),
            Matrix("mlp.linear_fc1", "mlp", self.inner, self.width, 0, True),
            Matrix("mlp.linear_fc2", "mlp", self.width, self.inner, 1, True),
        )

    @property
    def products(self) -> int:
        """Multiplications of a position with all matrices."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)
