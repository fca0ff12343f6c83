"""Two processes make what one makes: the same samples, and the same bound to the last digit."""

import json
from typing import Any

import pytest

from tests.distributed.runs import launch
from tests.generation import work_worker
from tests.tolerance import NETWORK


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker printed on two processes, by tensor-parallel size."""
    output = launch(2, [work_worker.__file__, str(tmp_path_factory.mktemp("two"))])
    made: dict[str, Any] = json.loads(output.splitlines()[-1])
    return made


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work_worker.make(1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_data_parallel(graph: str, of_one: dict[str, Any], of_two: dict[str, Any]) -> None:
    one, two = dict(of_one[graph]), of_two["1"][graph]
    assert (one.pop("data_parallel"), two.pop("data_parallel")) == (1, 2)
    assert one == two


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_tensor_parallel(graph: str, of_one: dict[str, Any], of_two: dict[str, Any]) -> None:
    one, two = of_one[graph], of_two["2"][graph]
    assert one["tokens"] == two["tokens"] == two["resumed"]
    assert two["blocks"] == pytest.approx(one["blocks"], rel=NETWORK)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_another_number_of_processes_goes_on(
    graph: str, of_one: dict[str, Any], of_two: dict[str, Any]
) -> None:
    for made in (of_one[graph], of_two["1"][graph], of_two["2"][graph]):
        assert made["resumed"] == of_one[graph]["tokens"]
        # Two whole batches of the killed run stand; its torn third one is drawn again.
        assert made["before"] == [0, 4]
