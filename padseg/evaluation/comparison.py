"""Compare methods and models on a data set: an evaluation for each, in a folder of its own, and one table of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from padseg.backbones.spec import BACKBONES
from padseg.errors import ModelUnavailable, UsageError
from padseg.evaluation.comparison_reports import FILES, write_comparison
from padseg.evaluation.comparison_rows import Row, Shown, State, measured_row, missing_row, published_row
from padseg.evaluation.contenders import Turn, evaluated, evaluated_apart, mark_of, sampled
from padseg.evaluation.job import PRESENT, Asked, Contender, Ground, ground_of
from padseg.evaluation.papers import published
from padseg.evaluation.protocols import DEFAULT, PROTOCOLS
from padseg.methods import METHODS, method_named
from padseg.methods.options import KINDS, MethodOptions, kind_of, refuse_family
from padseg.system.files import inside
from padseg.system.ledger import owned, refuse_strange
from padseg.system.progress import shown
from padseg.system.text import warn

ALL = 'all'
CLASSICAL = tuple(name for name, method in METHODS.items() if not method.FAMILIES)
USUAL = {'regions': DEFAULT, 'classes': 'seg4diff-ovss'}  # protocols, by what a method gives
BOOLEANS = {'true': True, 'false': False}
SHEETS = ('even', 'worst')
SHORT = 32  # letters of a model in the name of a folder


class Entry(NamedTuple):
    """A method to compare, with the options that were given. everywhere: whether it is asked for wherever it can be, not by its name."""

    method: str
    stated: Mapping[str, Any]
    everywhere: bool = False


class Pair(NamedTuple):
    """A method with a model in a protocol. model: None for a method without one; reason: why it cannot be evaluated, if that is known."""

    ground: Ground
    entry: Entry
    model: str | None
    state: State = 'measured'
    reason: str = ''


Families = Mapping[str, str | ModelUnavailable]  # of models by name, or why their files cannot be read


def compare(
    dataset: str,
    root: str | Path,
    out: str | Path,
    methods: Sequence[str] = (ALL,),
    models: Sequence[str] = ('tiny',),
    protocols: Sequence[str] = (),
    *,
    split: str | None = None,
    classical: bool = True,
    papers: bool = False,
    names: str | None = None,
    sample: int | None = None,
    sheet: str = 'even',
    num_classes: int | None = None,
    ignore: int = 255,
    background: int | None = None,
    regions: bool = False,
    allow_missing: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    vae: str | None = None,
    overwrite: bool = False,
    apart: bool = True,
    quiet: bool = True,
) -> list[Row]:
    """Evaluate methods with models, as far as that is not done in `out`, and write a table, a chart and a sheet of pictures there.

    methods: names, perhaps with options such as 'diffcut:tau=0.3'; 'all' takes all that the models, the data set and the protocols permit.
    protocols: by default those of `padseg eval`. sample: only so many pictures, spread evenly over the split. apart: run every method in a
    process of its own, whose memory is measured. The other arguments are the options of `padseg compare`. Returns the rows of the table.
    Raises UsageError for what cannot be compared, OutputConflict if `out` has evaluations with other settings.
    """
    if sheet not in SHEETS:
        raise UsageError(f'sheet is one of {", ".join(SHEETS)}; got {sheet}')
    if names not in (None, PRESENT, ALL):
        raise UsageError(f'names is one of {PRESENT}, {ALL}; got {names}')
    if sample is not None and sample < 1:
        raise UsageError(f'sample is a number of pictures >= 1; got {sample}')
    if papers and sample is not None:
        raise UsageError('published figures are for all pictures of a split: give either --papers or --sample')
    asked = Asked(
        dataset=dataset,
        root=Path(root),
        split=split,
        pred=None,
        labels=None,
        num_classes=num_classes,
        ignore=ignore,
        background=background,
        regions=regions,
        protocol=None,
        compare=None,
        raw_ids=False,
        resize=False,
        allow_missing=allow_missing,
        sweep=None,
        tau_sweep=False,
        workers=1,
        out=None,
        overwrite=overwrite,
    )
    for name, value in {'methods': methods, 'models': models, 'protocols': protocols}.items():
        if isinstance(value, str):
            raise UsageError(f'{name} is a list of names; got {value!r}')
    entries = parsed_methods(methods, classical)
    pairs = planned(grounds_of(asked, entries, protocols, sample), entries, tuple(dict.fromkeys(models)))
    if names and all(method_named(pair.entry.method).TASK == 'regions' for pair in pairs):
        raise UsageError('--names is for methods that take class names, and none is compared here')

    def turn_of(pair: Pair) -> Turn:
        options = METHODS[pair.entry.method].Options(**pair.entry.stated)
        given = names if METHODS[pair.entry.method].TASK == 'classes' else None
        model = pair.model or 'tiny'  # which a method without a model does not load
        protocol = pair.ground.protocol if pair.ground.protocol in PROTOCOLS else None
        return Turn(
            asked._replace(protocol=protocol, out=inside(Path(out), folder_name(pair))),
            Contender(pair.entry.method, options, model, None, device, dtype, vae, False, given),
            tuple(pair.entry.stated),
            sample,
        )

    with owned(Path(out), 'run.json', 'scores.json'):
        refuse_strange(Path(out), FILES)
        rows = measured(pairs, turn_of, apart, quiet)
        if papers:
            rows += [published_row(figure, pair.ground) for pair, figure in figures_for(pairs, names)]
        write_comparison(Path(out), rows, [pair.ground for pair in first_pairs(pairs)], sheet)
    return rows


def measured(pairs: Sequence[Pair], turn_of: Callable[[Pair], Turn], apart: bool, quiet: bool) -> list[Row]:
    """Evaluate one pair after the other. A pair that fails has its reason in its row."""
    rows: list[Row] = []
    for number, pair in enumerate(pairs, start=1):
        method, stated = pair.entry.method, dict(pair.entry.stated)
        named = Shown(pair.ground.protocol, method, pair.model or '', stated, method in CLASSICAL)
        if pair.reason:
            rows.append(missing_row(named, pair.state, pair.reason))
        else:
            if not quiet:
                warn(f'padseg: {number} of {len(pairs)}: {" with ".join(filter(None, (pair.entry.method, pair.model)))}, {named.protocol}')
            turn = turn_of(pair)
            ended = evaluated_apart(turn, quiet) if apart else evaluated(turn, shown(quiet), alone=False)
            rows.append(
                measured_row(named, ended.report, ended.unusual, turn.asked.out, [sample.name for sample in pair.ground.dataset.samples])
                if ended.report and turn.asked.out
                else missing_row(named, 'failed', ended.reason)
            )
        if rows[-1].reason and not quiet:
            warn(f'padseg: {pair.entry.method} {rows[-1].state}: {rows[-1].reason}')
    return rows


# what is asked for


def parsed_methods(texts: Iterable[str], classical: bool) -> list[Entry]:
    """The methods that texts name, without repetition, then the classical ones that none of them names."""
    entries: list[Entry] = []
    for text in texts:
        new = [Entry(name, {}, True) for name in METHODS if name not in CLASSICAL] if text == ALL else [parsed_method(text)]
        known = [(entry.method, dict(entry.stated)) for entry in entries]
        entries += [entry for entry in new if (entry.method, dict(entry.stated)) not in known]
    if not entries:
        raise UsageError('there is no method to compare: name some with --methods')
    named = {entry.method for entry in entries}
    return entries + [Entry(name, {}, True) for name in CLASSICAL if classical and name not in named]


def parsed_method(text: str) -> Entry:
    """A method with options: `diffcut:tau=0.3:alpha=5`; several values of one option are joined by +. UsageError for anything else."""
    name, *settings = text.split(':')
    method = method_named(name)
    stated: dict[str, Any] = {}
    for setting in settings:
        key, equal, value = setting.partition('=')
        field = key.strip().replace('-', '_')
        if not equal or field not in method.Options.__dataclass_fields__:
            known = ', '.join(method.Options.__dataclass_fields__)
            raise UsageError(f'{name} takes options as {name}:OPTION=VALUE, of {known}; got {setting}')
        if field in stated:
            raise UsageError(f'{text} gives {field} twice')
        stated[field] = parsed_value(method.Options, field, value.strip())
    method.Options(**stated)  # which refuses values out of range
    return Entry(name, stated)


def parsed_value(options: type[MethodOptions], field: str, text: str) -> Any:
    kind, several = kind_of(options, field)
    try:
        if several:
            return tuple(kind(part.strip()) for part in text.split('+'))
        return BOOLEANS[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f'{field} is {KINDS[kind]}{", several of them joined by +" if several else ""}; got {text}') from error


def grounds_of(asked: Asked, entries: Sequence[Entry], protocols: Sequence[str], sample: int | None) -> list[Ground]:
    """The ground truth by each protocol. UsageError for protocols that do not go with the data set."""
    first = ground_of(asked)
    if not first.dataset.classes:
        if protocols:
            raise UsageError(f'{asked.dataset} has regions without classes, which are compared in one way only: leave out --protocols')
        grounds = [first]
    else:
        tasks = {METHODS[entry.method].TASK for entry in entries}
        wanted = list(dict.fromkeys(protocols)) or [protocol for task, protocol in USUAL.items() if task in tasks]
        grounds = [ground_of(asked._replace(protocol=protocol)) for protocol in wanted]
    for ground in grounds:
        if ground.warning:
            warn(f'padseg: {ground.protocol}: {ground.warning}')
    return [sampled(ground, sample) for ground in grounds]


def scores_names(ground: Ground) -> bool:
    """Whether predictions are compared by their classes."""
    return bool(ground.dataset.classes) and ground.rules.matching == 'none'


def fits(entry: Entry, ground: Ground) -> bool:
    return (METHODS[entry.method].TASK == 'classes') == scores_names(ground)


def planned(grounds: Sequence[Ground], entries: Sequence[Entry], models: Sequence[str]) -> list[Pair]:
    """All pairs, by protocol. UsageError for a method that no protocol can score, and for a protocol that no method fits."""
    for entry in entries:
        if not entry.everywhere and not any(fits(entry, ground) for ground in grounds):
            raise UsageError(misfit(entry, grounds[0]))
    families = {model: family_of(model) for model in models if any(entry.method not in CLASSICAL for entry in entries)}
    pairs: list[Pair] = []
    for ground in grounds:
        of_protocol = [pair for entry in entries if fits(entry, ground) for pair in pairs_of(ground, entry, families)]
        if not of_protocol:
            kind = 'names classes' if scores_names(ground) else 'gives regions'
            raise UsageError(f'{ground.protocol} has nothing to score: no method that is asked for {kind} with these models')
        pairs += of_protocol
    return pairs


def misfit(entry: Entry, ground: Ground) -> str:
    classes = METHODS[entry.method].TASK == 'classes'
    if classes and not ground.dataset.classes:
        return f'{entry.method} names classes, and {ground.dataset.name} has regions without classes: leave it out'
    fitting = [name for name, rules in PROTOCOLS.items() if (rules.matching == 'none') == classes]
    gives = 'names classes' if classes else 'gives regions without names'
    return f'{entry.method} {gives}, which no protocol of --protocols scores: add one of {", ".join(fitting)}'


def pairs_of(ground: Ground, entry: Entry, families: Families) -> list[Pair]:
    if entry.method in CLASSICAL:
        return [Pair(ground, entry, None)]
    pairs = []
    for model, family in families.items():
        try:
            if isinstance(family, ModelUnavailable):
                raise family
            refuse_family(entry.method, METHODS[entry.method].FAMILIES, model, family)
            pairs.append(Pair(ground, entry, model))
        except ModelUnavailable as error:
            pairs.append(Pair(ground, entry, model, 'failed', str(error)))
        except UsageError as error:
            pairs += [] if entry.everywhere else [Pair(ground, entry, model, 'not possible', str(error))]
    return pairs


def family_of(model: str) -> str | ModelUnavailable:
    """A model's family, or why its files cannot be read. UsageError for an unknown name."""
    from padseg.backbones.source import family_named

    try:
        return family_named(model)
    except ModelUnavailable as error:
        return error


def folder_name(pair: Pair) -> str:
    """A short name for the folder of a pair's evaluation, which other options and other models do not share."""
    model = pair.model or ''
    plain = model in BACKBONES or not model
    slug = re.sub('[^a-z0-9.]+', '-', Path(model).name.lower()).strip('-.')[:SHORT]
    name = '-'.join(filter(None, (pair.ground.protocol, pair.entry.method, slug)))
    if plain and not pair.entry.stated:
        return name
    whole = str(Path(model).resolve()) if Path(model).is_dir() and not plain else model
    mark = mark_of({'model': whole, **{field: str(value) for field, value in pair.entry.stated.items()}})
    return f'{name}-{mark}'


def first_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """One pair of each protocol."""
    return list({pair.ground.protocol: pair for pair in reversed(list(pairs))}.values())[::-1]


def figures_for(pairs: Sequence[Pair], names: str | None) -> list[Any]:
    """Published figures for the protocols, each with a pair of its protocol."""
    found = []
    for pair in first_pairs(pairs):
        given = (names or PRESENT) if scores_names(pair.ground) else None
        dataset = pair.ground.dataset
        found += [(pair, figure) for figure in published(dataset.name, dataset.split, pair.ground.protocol, given)]
    return found
