"""One cluster of four nodes for all tests of this folder."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, NoCluster, Settings
from tests.slurm.jobs import Desk


@pytest.fixture(scope="session")
def desk(pytestconfig: pytest.Config) -> Iterator[Desk]:
    """Where jobs are submitted; skips the tests without --full or where no cluster comes up."""
    if not pytestconfig.getoption("--full"):
        warnings.warn(pytest.PytestWarning("tests/slurm left out: give --full"), stacklevel=1)
        pytest.skip("jobs on a Slurm cluster take minutes: give --full")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder / "cluster", Settings(nodes=4))
    try:
        cluster.up()
    except NoCluster as reason:
        cluster.down()
        shutil.rmtree(folder)
        # Shown at the end of any run of pytest, which a skip's reason is not.
        warnings.warn(pytest.PytestWarning(f"tests/slurm left out: {reason}"), stacklevel=1)
        pytest.skip(f"no Slurm cluster: {reason}")
    (folder / "jobs").mkdir()
    try:
        yield Desk(cluster, folder / "jobs")
    finally:
        cluster.down()
        shutil.rmtree(folder)
