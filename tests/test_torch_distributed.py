"""DistributedDataParallel, fully_shard (FSDP2) and samplers over two processes on gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loopback interface is called lo on Linux")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Ragged batches, and a rank without a label that counts: no hang, a zero that is connected to the graph."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.torch_distributed_worker", str(rank), str(tmp_path / "store")],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (output, errors) in zip(workers, results, strict=True):
        assert worker.returncode == 0, errors
        assert output.splitlines() == [
            "samplers same",
            "ddp plain same",
            "ddp ignored same",
            "fsdp plain same",
            "fsdp ignored same",
        ]
