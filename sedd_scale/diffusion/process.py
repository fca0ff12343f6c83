"""The noise that a model is trained with, and what it learns to do with it: one object for all."""

from dataclasses import dataclass

from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.diffusion.corruption import Draw, NoisyBatch
from sedd_scale.diffusion.graphs import Graph, make_graph
from sedd_scale.diffusion.objectives import Objective, make_objective
from sedd_scale.diffusion.schedules import Schedule, schedule_of


@dataclass(frozen=True)
class Process:
    """What belongs together wherever batches are corrupted.

    Attributes:
        graph: how tokens change.
        schedule: how much, over time.
        objective: what is learned.
        t_min: the smallest time.
    """

    graph: Graph
    schedule: Schedule
    objective: Objective
    t_min: float

    def corrupt(self, clean_BL: Tensor, draw: Draw, *, t_B: Tensor | None = None) -> NoisyBatch:
        """As `Objective.corrupt`."""
        return self.objective.corrupt(
            clean_BL, draw, graph=self.graph, schedule=self.schedule, t_min=self.t_min, t_B=t_B
        )

    def times(self, draw: Draw) -> Tensor:
        """The times [B] that `corrupt` draws."""
        return draw.times(self.objective.first_time(self.t_min))

    def closing(self) -> tuple[float, float]:
        """As `Objective.closing`."""
        return self.objective.closing(self.graph, self.schedule, self.t_min)


def process_of(config: Config, num_tokens: int) -> Process:
    """The process that a configuration names, over `num_tokens` tokens."""
    graph = make_graph(config.graph.name, num_tokens)
    return Process(graph, schedule_of(config), make_objective(config), config.noise.t_min)
