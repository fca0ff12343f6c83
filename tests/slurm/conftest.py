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
def desk() -> Iterator[Desk]:
    """Where jobs are submitted; skips the tests where no cluster comes up."""
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
