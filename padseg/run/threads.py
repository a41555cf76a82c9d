"""Keep the number of threads of an earlier run when it is continued, where another number could change results.

torch splits sums among threads. Label maps from float32 were the same with 1 to 4 threads, but kept token maps differ in their last digits,
and label maps from 16-bit types in a few pictures. On GPUs the number does not matter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from padseg.methods import method_named
from padseg.run.job import Job
from padseg.run.records import Run
from padseg.system.libraries import imported

FLOAT32 = 'float32'
MOST = 1024  # no machine has more
log = logging.getLogger(__name__)


def decides(job: Job, device: str, dtype: str | None) -> bool:
    """Whether results depend on the number of threads."""
    return device.startswith('cpu') and (job.save_maps or dtype not in (FLOAT32, None))


def threads_before(job: Job, earlier: Run | None) -> int | None:
    """The number of threads of an earlier run, if it affects the results that are continued."""
    if earlier is None or earlier.model is None or job.maps or not method_named(job.method).FAMILIES:
        return None
    number = earlier.settings.get('threads', earlier.threads if decides(job, earlier.device, earlier.dtype) else None)
    return number if isinstance(number, int) and 1 <= number <= MOST else None


@contextlib.contextmanager
def as_before(job: Job, earlier: Run | None) -> Iterator[None]:
    """Inside the block, use as many threads as the earlier run, if that affects results; afterwards, restore the number."""
    if job.maps or not method_named(job.method).FAMILIES:
        yield
        return
    torch = imported('torch')
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
        log.warning('using %d threads instead of %d, as the earlier run did: another number rounds differently', number, own)
        torch.set_num_threads(number)
