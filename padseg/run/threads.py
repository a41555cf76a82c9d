"""The number of threads of a run that continues another, where it can change a bit of the results.

torch splits sums by it. Label maps from float32 came out the same with 1 to 4 threads; kept maps differ in their last digits, and label
maps from 16 bits in a few pictures. GPUs do not ask for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from padseg.methods import method_named
from padseg.run.job import Job
from padseg.run.records import Run

FLOAT32 = 'float32'
MOST = 1024  # a larger number is no machine's
log = logging.getLogger(__name__)


def decides(job: Job, device: str, dtype: str | None) -> bool:
    """Whether results depend on the number of threads."""
    return device.startswith('cpu') and (job.save_maps or dtype not in (FLOAT32, None))


def threads_before(job: Job, earlier: Run | None) -> int | None:
    """The number of threads that an earlier run used, if that matters to what is continued."""
    if earlier is None or earlier.model is None or job.maps or not method_named(job.method).FAMILIES:
        return None
    number = earlier.settings.get('threads', earlier.threads if decides(job, earlier.device, earlier.dtype) else None)
    return number if isinstance(number, int) and 1 <= number <= MOST else None


@contextlib.contextmanager
def as_before(job: Job, earlier: Run | None) -> Iterator[None]:
    """Use as many threads as the run that is continued, if they matter, and as many as before afterwards."""
    if job.maps or not method_named(job.method).FAMILIES:
        yield
        return
    import torch

    own = torch.get_num_threads()
    try:
        use(threads_before(job, earlier))
        yield
    finally:
        torch.set_num_threads(own)


def use(number: int | None) -> None:
    import torch

    own = torch.get_num_threads()
    if number and number != own:
        log.warning('using %d threads in place of %d, as the run did that is continued: another number rounds differently', number, own)
        torch.set_num_threads(number)
