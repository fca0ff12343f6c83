"""Which errors mean that a process is gone, by what torch 2.13, gloo and NCCL say."""

import pytest
import torch
from torch import distributed as dist

from sedd_scale.errors import LostRankError
from sedd_scale.training.lost_ranks import broken_connection, lost_ranks_in_one_line

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{GLOO}Read error [127.0.0.1]:62140: Connection reset by peer. This"),
         "Connection reset by peer"),
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:1"),
         "Connection closed by peer"),
        (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}timed out connecting: SO_ERROR"),
         "timed out connecting"),
        (RuntimeError(f"{GLOO}Timed out waiting 1800000ms for recv"), "Timed out waiting"),
        (dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
         "Connection was likely closed"),
        (dist.DistBackendError("ncclRemoteError: remote process exited or there was a network"),
         "remote process exited"),
        (dist.DistBackendError("NCCL communicator was aborted on rank 3."),
         "communicator was aborted"),
        (RuntimeError(f"{GLOO}op.preamble.length <= op.nbytes. 4 vs 2"), None),
        (dist.DistBackendError("NCCL error: unhandled cuda error, out of memory"), None),
        (RuntimeError("Timed out waiting for the data loader"), None),
    ],
)  # fmt: skip
def test_only_a_broken_connection_is_a_lost_rank(error: RuntimeError, reason: str | None) -> None:
    assert broken_connection(error) == reason


def test_the_line_says_where_and_other_errors_pass() -> None:
    where = lost_ranks_in_one_line(lambda: "in the step after step 7")
    with pytest.raises(LostRankError) as caught, where:
        raise RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:1")
    line = str(caught.value)
    assert line.startswith("a rank was lost in the step after step 7 (Connection closed by peer)")
    assert "\n" not in line and caught.value.exit_code == 76
    with pytest.raises(RuntimeError, match="shape"), lost_ranks_in_one_line(lambda: ""):
        torch.zeros(2).view(3)
