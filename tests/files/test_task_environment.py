"""Where a task of a Slurm step stands, told by what srun sets (as seen with Slurm 22.05)."""

import pytest

from sedd_scale.errors import ConfigError
from sedd_scale.files.task_environment import adopt_slurm_task, expand_counts, first_host

# The last of 2 nodes x 2 tasks.
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_gets_the_launchers_variables() -> None:
    environment = dict(STEP)
    assert adopt_slurm_task(environment)
    assert {key: environment[key] for key in environment.keys() - STEP.keys()} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": str(15000 + 12 * 16 + 3),
    }
    assert not adopt_slurm_task(environment)


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun within the step
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_another_launcher_and_a_single_task_are_left_alone(changes: dict[str, str]) -> None:
    environment = {**STEP, **changes}
    assert not adopt_slurm_task(environment)
    assert environment == {**STEP, **changes}


def test_a_batch_shell_is_no_task() -> None:
    shell = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert not adopt_slurm_task(dict(shell))


def test_a_rendezvous_that_is_given_stays() -> None:
    environment = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"}
    adopt_slurm_task(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "4711")


@pytest.mark.parametrize(("visible", "expected"), [("1", "0"), ("0,1", "1"), ("", "1")])
def test_a_gpu_bound_to_its_task_is_number_0(visible: str, expected: str) -> None:
    environment = {**STEP, "CUDA_VISIBLE_DEVICES": visible}
    adopt_slurm_task(environment)
    assert environment["LOCAL_RANK"] == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[0-1]", "node0"),
        ("gpu[003-010,12],big1", "gpu003"),
        ("big1,gpu[1-2]", "big1"),
        ("rack[1-2]n[04,07]", "rack1n04"),
        ("c-1-2", "c-1-2"),
        ("gpu[7,9]-ib", "gpu7-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_counts_of_uneven_nodes() -> None:
    assert expand_counts("4(x2),1") == [4, 4, 1]


@pytest.mark.parametrize("name", ["SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"])
def test_what_is_missing_or_wrong_is_named(name: str) -> None:
    for value in (None, "", ",x"):
        environment = {key: text for key, text in STEP.items() if key != name}
        if value is not None:
            environment[name] = value
        with pytest.raises(ConfigError, match=name):
            adopt_slurm_task(environment)
