"""What is known of a graph by its name, for those who plan or check without computing.

`diffusion.graphs` computes; a test holds the two together.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GraphFacts:
    """Facts of one graph.

    Attributes:
        has_mask: a state beside the N tokens, of which a position's loss depends: tokens that are
            left alone have none.
        scales_by_sigma: whether there are scores up to the known shift of sigma, and they are the
            default.
        row_statistics: numbers of a row that cross tensor ranks.
    """

    has_mask: bool
    scales_by_sigma: bool
    row_statistics: int


GRAPHS = {
    "absorb": GraphFacts(has_mask=True, scales_by_sigma=True, row_statistics=3),
    "uniform": GraphFacts(has_mask=False, scales_by_sigma=False, row_statistics=4),
}
