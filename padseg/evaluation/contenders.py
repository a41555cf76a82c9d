"""One contender of a comparison: its evaluation, if wanted in a process of its own, and the time and memory that its pictures take."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

from pydantic import BaseModel, Field

from padseg.errors import NoImages, OutputConflict, PadsegError, ResourceExhausted
from padseg.evaluation.engine import run_evaluation, settings
from padseg.evaluation.job import Asked, Contender, Evaluation, Ground, ground_of, of_method, seen_as
from padseg.evaluation.scores import Count, ScoresRecord
from padseg.methods import method_named
from padseg.system.files import inside
from padseg.system.ledger import Name, continued, flattened, line, read_lines
from padseg.system.machine import peak_memory, restart_peak
from padseg.system.progress import Progress, shown

if TYPE_CHECKING:
    from types import ModuleType

    from padseg.evaluation.protocols import View
    from padseg.types import Array, Image

COSTS = 'costs.jsonl'
MARK = 12  # hexadecimal digits
PLACES = ('root', 'predictions.folder')  # settings that say where something is
STOPPING: tuple[type[PadsegError], ...] = (OutputConflict, ResourceExhausted, NoImages)  # which end the whole comparison
START = 'import sys; sys.path[:] = sys.argv[2:]; from padseg.evaluation.contenders import serve; serve(int(sys.argv[1]))'
KILLED = 'its process was killed, most likely because memory ran out'


class Turn(NamedTuple):
    """What a contender does: what `padseg eval` would do with these options. asked.out: the folder of its evaluation.

    stated: names of the method's options that were given; sample: number of pictures, spread evenly; None takes all.
    """

    asked: Asked
    contender: Contender
    stated: tuple[str, ...] = ()
    sample: int | None = None


class Ended(NamedTuple):
    """How a turn ended. report: as in scores.json, or None with the reason; unusual: options that differ from the method's defaults."""

    report: ScoresRecord | None
    unusual: Mapping[str, Any] = {}
    reason: str = ''


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Cost(BaseModel):
    """What a prediction took. settings: mark of the settings it was made with; processor: seconds of processor time.

    memory, gpu: peak in bytes while it was made, if measured.
    """

    name: Name
    settings: Name
    seconds: Seconds
    processor: Seconds
    memory: Count | None = None
    gpu: Count | None = None


class Costs(NamedTuple):
    """What a picture takes. seconds, processor: medians; memory, gpu: the most, in bytes. None where nothing was measured."""

    seconds: float | None
    processor: float | None
    memory: int | None
    gpu: int | None


def evaluated(turn: Turn, progress: Progress, alone: bool) -> Ended:
    """Evaluate a contender, or continue its evaluation. Raises STOPPING errors; any other PadsegError is the reason why it has no scores.

    alone: whether this process does nothing else, so that its memory can be measured.
    """
    try:
        ground = sampled(ground_of(turn.asked), turn.sample)
        contender = turn.contender
        if 'geometry' not in turn.stated:
            contender = contender._replace(options=seen_as(contender.options, ground.rules))
        job = of_method(turn.asked, ground, contender)
        with timed(job, alone) as watched:
            report = run_evaluation(watched, progress).report
        return Ended(report, unusual(job.source, turn, ground))
    except STOPPING:
        raise
    except PadsegError as error:
        return Ended(None, reason=str(error))


def sampled(ground: Ground, number: int | None) -> Ground:
    """Ground truth of so many pictures, spread evenly over the split, which says so."""
    dataset = ground.dataset
    if number is None or number >= len(dataset.samples):
        return ground
    chosen = tuple(dataset.samples[place] for place in evenly(len(dataset.samples), number))
    words = f'{dataset.split}, {number} of {len(dataset.samples)} pictures'
    return ground._replace(dataset=dataset._replace(samples=chosen, split=words))


def evenly(length: int, number: int) -> list[int]:
    """Places of so many things out of a row, spread evenly."""
    return [(2 * place + 1) * length // (2 * number) for place in range(min(number, length))]


def unusual(source: Mapping[str, Any], turn: Turn, ground: Ground) -> dict[str, Any]:
    """The options in a record that differ from the method's defaults for the model, in this protocol."""
    from padseg.backbones.source import locate

    method = method_named(turn.contender.method)
    spec = locate(turn.contender.model).spec if method.FAMILIES else None
    usual = method.recorded(seen_as(method.Options(), ground.rules), spec)
    return {name: source[name] for name in dict.fromkeys([*usual, *turn.stated]) if name in source and source[name] != usual.get(name)}


# time and memory


def mark_of(recorded: Mapping[str, Any]) -> str:
    """A short hash of all settings of an evaluation, but for where the data set and the model are."""
    settled = {name: value for name, value in flattened(recorded).items() if name not in PLACES}
    text = json.dumps(settled, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:MARK]


@contextlib.contextmanager
def timed(job: Evaluation, alone: bool) -> Iterator[Evaluation]:
    """Yield the job with a predictor that also writes a `Cost` for each picture into the evaluation's folder."""
    assert job.out is not None and job.predictor is not None
    out, predictor = job.out, job.predictor
    mark = mark_of(settings(job))
    gpu = cuda() if str(job.source.get('device', '')).startswith('cuda') else None
    adding: list[Any] = []
    with contextlib.ExitStack() as stack:

        def predict(name: str, image: Image, where: View, present: Sequence[int]) -> list[Array]:
            if not adding:  # the folder is locked only from here on
                path = inside(out, COSTS)
                earlier = [] if job.overwrite else [cost for cost in read_lines(path, Cost) if cost.settings == mark]
                adding.append(stack.enter_context(continued(map(line, earlier), path)))
            if alone:
                restart_peak()
            if gpu:
                gpu.reset_peak_memory_stats(job.source['device'])
            start, used = time.perf_counter(), time.process_time()
            found = predictor(name, image, where, present)
            seconds, processor = time.perf_counter() - start, time.process_time() - used
            memory = peak_memory() if alone else None
            on_gpu = gpu.max_memory_allocated(job.source['device']) if gpu else None
            adding[0](line(Cost(name=name, settings=mark, seconds=seconds, processor=processor, memory=memory, gpu=on_gpu)))
            return found

        yield job._replace(predictor=predict)


def cuda() -> ModuleType:
    import torch

    return torch.cuda


def costs_of(out: Path, mark: str, names: Collection[str]) -> Costs:
    """What the pictures of an evaluation took, as far as they were predicted with these settings by a comparison."""
    kept = {cost.name: cost for cost in read_lines(inside(out, COSTS), Cost) if cost.settings == mark and cost.name in names}
    return Costs(
        statistics.median(cost.seconds for cost in kept.values()) if kept else None,
        statistics.median(cost.processor for cost in kept.values()) if kept else None,
        max((cost.memory for cost in kept.values() if cost.memory is not None), default=None),
        max((cost.gpu for cost in kept.values() if cost.gpu is not None), default=None),
    )


# a process of its own


def evaluated_apart(turn: Turn, quiet: bool) -> Ended:
    """As `evaluated`, in a new process, which ends with this one. If it crashes, its end is the reason why there are no scores."""
    answers, answering = os.pipe()
    with os.fdopen(answers, 'rb') as reader:
        try:
            command = (sys.executable, '-c', START, str(answering), *sys.path)
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(answering,))
        except OSError as error:
            raise PadsegError(f'cannot start a process, {sys.executable}: {error.strerror}') from error
        finally:
            os.close(answering)
        try:
            with contextlib.suppress(BrokenPipeError):
                pickle.dump((turn, quiet), cast(Any, child.stdin))
                cast(Any, child.stdin).flush()  # and left open: its end tells the other process that this one is gone
            text = reader.read()
        finally:
            if sys.exc_info()[0]:
                child.kill()
            code = child.wait()
            with contextlib.suppress(BrokenPipeError):
                cast(Any, child.stdin).close()
    if not text:
        return Ended(None, reason=KILLED if code == -9 else f'its process ended with code {code}')
    answer = json.loads(text)
    if answer['stopped']:
        raise next(kind for kind in STOPPING if kind.__name__ == answer['stopped'])(answer['reason'])
    report = ScoresRecord.model_validate(answer['report']) if answer['report'] else None
    return Ended(report, answer['unusual'], answer['reason'])


def serve(answering: int) -> None:
    """Do the turn on stdin, and write how it ended to the descriptor, as JSON."""
    from padseg.system import libraries
    from padseg.system.text import log_printable

    os.set_inheritable(answering, False)
    turn, quiet = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_parent, daemon=True).start()
    libraries.quiet()
    log_printable()
    try:
        ended, stopped = evaluated(turn, shown(quiet), alone=True), ''
    except STOPPING as error:
        ended = Ended(None, reason=str(error))
        stopped = next(kind.__name__ for kind in STOPPING if isinstance(error, kind))
    report = ended.report.model_dump() if ended.report else None
    with os.fdopen(answering, 'w', encoding='ascii') as answer:
        json.dump({'report': report, 'unusual': dict(ended.unusual), 'reason': ended.reason, 'stopped': stopped}, answer)


def end_with_parent() -> None:
    """End this process at once when the one that started it has ended. What it has written stays, as after a kill."""
    os.read(0, 1)  # past Python's buffer, whose lock would be in the way at the end
    os._exit(1)
