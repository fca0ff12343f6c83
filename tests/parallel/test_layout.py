"""Coordinates of a process, and groups that Megatron-core and DeepSpeed see alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state

from sedd_scale.errors import ConfigError
from sedd_scale.files import compiler
from sedd_scale.parallel import layout as layout_module
from sedd_scale.parallel.layout import (
    Layout,
    ModelParallelUnit,
    initialize_layout,
    launched_world_size,
    leave_layout,
    local_device,
)
from tests.parallel.vocab_worker import SIMULATED_LAYOUTS, two_processes


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return two_processes()


def test_one_process_needs_no_launcher(layout: Layout) -> None:
    assert (layout.tensor, layout.pipeline, layout.data, layout.world_size) == (1, 1, 1, 1)
    assert layout.is_first_stage and layout.is_last_stage and not layout.sequence_parallel
    assert layout.tensor_group.size() == layout.data_group.size() == dist.get_world_size() == 1
    assert layout.device == local_device()
    assert initialize_layout() == layout


def test_a_layout_can_be_left_for_another(layout: Layout) -> None:
    leave_layout()
    assert not parallel_state.is_initialized()
    assert initialize_layout() == layout


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_too_few_processes_are_refused(tensor: int, pipeline: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"1 processes cannot be shared by parallel\.tensor={tensor}"
    ):
        initialize_layout(tensor=tensor, pipeline=pipeline)


def test_the_launcher_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launched_world_size() == 6


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own"):
        local_device()


def test_deepspeed_asks_megatron_under_the_older_names(layout: Layout) -> None:
    unit = ModelParallelUnit()
    assert unit.get_model_parallel_world_size() == layout.tensor
    assert unit.get_model_parallel_rank() == layout.tensor_rank
    assert unit.get_model_parallel_group() is layout.tensor_group
    assert unit.get_data_parallel_group() is layout.data_group
    with pytest.raises(AttributeError):
        unit.get_no_such_thing()


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_two_processes_stand_where_deepspeed_would_put_them(
    tensor: int, pipeline: int, data: int, ranks: list[dict[str, Any]]
) -> None:
    places = [rank["layouts"][tensor, pipeline] for rank in ranks]
    assert_as_deepspeed(places, tensor, pipeline, data)


@pytest.mark.parametrize(("tensor", "pipeline", "data"), SIMULATED_LAYOUTS)
def test_eight_processes_stand_where_deepspeed_would_put_them(
    tensor: int, pipeline: int, data: int, ranks: list[dict[str, Any]]
) -> None:
    assert_as_deepspeed(ranks[0]["simulated"][tensor, pipeline, data], tensor, pipeline, data)


def assert_as_deepspeed(
    places: list[dict[str, Any]], tensor: int, pipeline: int, data: int
) -> None:
    """Each rank's coordinates and groups are those of DeepSpeed's own topology."""
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    assert len(places) == topology.world_size()
    for rank, place in enumerate(places):
        assert place["rank"] == rank
        assert (place["tensor"], place["pipeline"], place["data"]) == (tensor, pipeline, data)
        at = topology.get_coord(rank)
        assert (place["tensor_rank"], place["pipeline_rank"], place["data_rank"]) == (
            at.model,
            at.pipe,
            at.data,
        )
        assert place["first"] == (at.pipe == 0)
        assert place["last"] == (at.pipe == pipeline - 1)
        assert place["tensor_ranks"] == topology.filter_match(pipe=at.pipe, data=at.data)
        assert place["data_ranks"] == topology.filter_match(pipe=at.pipe, model=at.model)


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    compiler.compiles_kernels.cache_clear()


@pytest.mark.usefixtures("with_a_gpu")
def test_a_node_without_a_compiler_is_refused_unless_it_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no C compiler .*install gcc.*SEDD_COMPILE=0"):
        local_device()
    monkeypatch.setenv("SEDD_COMPILE", "0")
    compiler.compiles_kernels.cache_clear()
    assert local_device() == torch.device("cuda", 0)
    compiler.compiles_kernels.cache_clear()


def test_missing_headers_of_python_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gcc", "cc"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    fault = compiler.compiler_fault()
    assert fault is not None and "Python.h" in fault and "python3-dev" in fault
    (tmp_path / "Python.h").touch()
    assert compiler.compiler_fault() is None
    monkeypatch.setenv("CC", "icc")
    assert "icc" in (compiler.compiler_fault() or "")


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word a run would train on the CPU."""

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(layout_module, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_device() == torch.device("cpu")
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ConfigError, match=r"cannot use: The NVIDIA driver .* is too old"):
        local_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_device() == torch.device("cpu")
