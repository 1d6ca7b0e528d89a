"""What the children of test_disks.py run."""

import resource

from memfit.training import worker


def train(payload, emit):
    """Train a stage with files that the kernel ends at `file_bytes`: what is written beyond is refused."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (payload["file_bytes"], payload["file_bytes"]))
    return worker.run(payload["job"], emit)
