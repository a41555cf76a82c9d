"""The page, laid out with Gradio. What happens on it are functions of the modules beside this one."""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gradio as gr

from padseg.demo.downloads import OURS, write_files, write_region
from padseg.demo.drawing import grid_of_maps, legend, numbers_for_page, preview, preview_size
from padseg.demo.models import Offer, methods_for
from padseg.demo.picture import Held, Picture, hold, named, read_picture
from padseg.demo.regions import (
    OCTAVES,
    Found,
    agreement,
    command,
    count_in_words,
    in_words,
    knob,
    proposals_shown,
    region_at,
    regions_of,
    shares,
    turned,
)
from padseg.demo.settings import HOUR, QUEUE, WORDS_SHOWN, Settings
from padseg.errors import PadsegError
from padseg.methods import DEFAULTS
from padseg.system.text import printable

Function = TypeVar('Function', bound=Callable[..., Any])
HOVER = Path(__file__).with_name('hover.js')
FORWARD = 'forward'  # events with this id wait for one another
LATER = 'later'
GONE = 'the picture is no longer in memory (the demo was started again, or an hour has passed): press "Find regions"'
NOTHING_LIT = 'Click a region, or choose it by its number.'
HEAD = """# padseg
Divide a picture into regions, without labels or clicks. Choose a picture: its regions appear within seconds.
Pictures stay on the machine that runs this page, for an hour at most."""


class Chosen(NamedTuple):
    """The components that say what to do with which picture."""

    picture: gr.Image
    model: gr.Dropdown
    method: gr.Dropdown
    button: gr.Button


class Shown(NamedTuple):
    """The components of the regions' tab."""

    result: gr.Image
    under_cursor: gr.HTML
    count: gr.Markdown
    coarser: gr.Slider
    smallest: gr.Slider
    opacity: gr.Slider
    number: gr.Dropdown
    about: gr.Markdown
    mask: gr.DownloadButton
    files: list[gr.DownloadButton]
    command: gr.Textbox
    note: gr.Markdown


def explained(function: Function) -> Function:
    """Show errors that users can fix in the words of padseg."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (PadsegError, OSError) as error:
            raise gr.Error(html.escape(printable(str(error))), print_exception=False) from error

    return inner  # type: ignore[return-value]


def page(settings: Settings, models: Sequence[Offer], samples: Sequence[Path], folder: Path) -> gr.Blocks:
    """Lay out the page. models: of the picker; samples: files of pictures; folder: for files that are written."""
    with gr.Blocks(title='padseg', analytics_enabled=False, delete_cache=(60, HOUR - 120)) as blocks:
        held, found = (gr.State(None, time_to_live=HOUR) for _ in range(2))
        gr.Markdown(HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                chosen = choosing(models, samples)
            with gr.Column(scale=5, min_width=320):
                with gr.Tab('Regions'):
                    shown = showing()
                with gr.Tab('Maps'):
                    grid = gr.Image(label='Token maps', show_label=False, interactive=False, format='png', buttons=['fullscreen'])
                    about_grid = gr.Markdown('The maps appear here once a picture has been divided.')
                with gr.Tab('Names'):
                    naming(chosen, settings)
                with gr.Tab('Compare'):
                    comparing(chosen, settings, models)
        regions_events(chosen, shown, grid, about_grid, held, found, settings, folder / OURS)
    return blocks.queue(max_size=QUEUE)


def uploaded(payload: Any) -> str | None:
    """The path of an upload, which Gradio has checked to be one."""
    return payload.path if payload else None


def choosing(models: Sequence[Offer], samples: Sequence[Path]) -> Chosen:
    picture = gr.Image(
        type='filepath', image_mode=None, sources=['upload', 'clipboard'], label='Picture', height=260, elem_id='picture', buttons=[]
    )
    # Gradio's own step would open the file with Pillow, before padseg's reader sees it
    picture.preprocess = uploaded
    gr.Examples([[str(path)] for path in samples], [picture], label='Samples, drawn by padseg', preload=False, api_visibility='private')
    with gr.Accordion('Model and method', open=False, elem_id='choices'):
        model = picker(models)
        method = gr.Dropdown(methods_for('regions'), value=DEFAULTS['regions'], label='Method', elem_id='method')
    button = gr.Button('Find regions', variant='primary', elem_id='segment')
    return Chosen(picture, model, method, button)


def picker(models: Sequence[Offer], label: str = 'Model', place: str = 'model') -> gr.Dropdown:
    """A choice of models. What the doctor says of the chosen one is shown below."""
    messages = {offer.model: offer.message for offer in models}
    model = gr.Dropdown([(offer.label, offer.model) for offer in models], value=models[0].model, label=label, elem_id=place)
    said = gr.Markdown(html.escape(models[0].message), elem_id=f'{place}-state')
    model.change(lambda name: html.escape(messages[name]), model, said, api_visibility='private', queue=False)
    return model


def showing() -> Shown:
    with gr.Row():
        count = gr.Markdown('No picture yet.', elem_id='count')
    result = gr.Image(
        label='Regions', show_label=False, interactive=False, format='jpeg', type='numpy', elem_id='result', buttons=['fullscreen']
    )
    under_cursor = gr.HTML('', html_template='', js_on_load=HOVER.read_text(), visible='hidden', elem_id='numbers')
    about = gr.Markdown(NOTHING_LIT, elem_id='about')
    with gr.Row():
        number = gr.Dropdown([('none', 0)], value=0, label='Region', min_width=120, elem_id='number')
        mask = gr.DownloadButton('Mask of this region', interactive=False, min_width=120, elem_id='mask')
    with gr.Row():
        coarser = gr.Slider(
            -OCTAVES, OCTAVES, 0, step=0.25, label='Finer – coarser', info="0 is the model's own setting", elem_id='coarser'
        )
        smallest = gr.Slider(0, 5, 0, step=0.1, label='Smallest region, %', info='of the picture', elem_id='smallest')
        opacity = gr.Slider(0, 1, 0.5, step=0.05, label='Opacity', info='of the colours', elem_id='opacity')
    with gr.Row():
        names = ('labels', 'Label map (PNG)'), ('masks', 'Masks (zip)'), ('coco', 'COCO (JSON)')
        files = [gr.DownloadButton(text, interactive=False, min_width=120, elem_id=name) for name, text in names]
    line = gr.Textbox(label='The same on the command line', interactive=False, buttons=['copy'], elem_id='command')
    note = gr.Markdown('', elem_id='note')
    return Shown(result, under_cursor, count, coarser, smallest, opacity, number, about, mask, files, line, note)


def regions_events(
    chosen: Chosen, shown: Shown, grid: gr.Image, about_grid: gr.Markdown, held: gr.State, found: gr.State, settings: Settings, folder: Path
) -> None:
    """What happens on the regions' tab."""
    drawn = [found, shown.result, shown.under_cursor, shown.count, shown.number, shown.about, shown.mask, shown.command, *shown.files]

    def draw(own: Held, options: Any, opacity: float) -> list[Any]:
        """Values of `drawn`; downloads wait until their files are written."""
        began = time.monotonic()
        made = regions_of(own, options)
        picture = preview(own.picture.image, made.labels.labels, opacity)
        seconds = time.monotonic() - began
        numbers = [('none', 0)] + [(f'{number} – {share:.1%}', number) for number, share in shares(made.labels).items()]
        waiting = [gr.update(interactive=False)] * len(shown.files)
        return [
            *(made, picture, numbers_for_page(made.labels.labels), f'### {count_in_words(made.labels, seconds)}'),
            *(gr.update(choices=numbers, value=0), NOTHING_LIT, gr.update(interactive=False), command(own, options, settings), *waiting),
        ]

    @explained
    def segment(path: str | None, model: str, method: str, opacity: float) -> list[Any]:
        picture = read_picture(path, settings)
        own = hold(picture, method, model, settings)
        maps = proposals_shown(own)
        tiles = None if maps is None else grid_of_maps(maps[0])
        words = 'This method has no maps.' if maps is None else f'{len(maps[0])} maps of {maps[0].shape[2]} × {maps[0].shape[1]} tokens'
        smallest = getattr(own.options, 'min_area', None)
        return [
            *draw(own, turned(own), opacity),
            own,
            gr.update(value=0, interactive=knob(own) is not None),
            gr.update(value=round(100 * (smallest or 0), 1), interactive=smallest is not None),
            tiles,
            words,
            about_picture(picture, own.seconds),
        ]

    @explained
    def again(own: Held | None, coarser: float, smallest: float, opacity: float) -> list[Any]:
        share = round(smallest / 100, 6)
        kept = present(own)
        return draw(kept, turned(kept, coarser, share), opacity)

    @explained
    def light(own: Held | None, now: Found | None, opacity: float, number: int | None) -> list[Any]:
        kept, made = present(own), present(now)._replace(lit=number or 0)
        picture = preview(kept.picture.image, made.labels.labels, opacity, made.lit)
        if not made.lit:
            return [made, picture, NOTHING_LIT, gr.update(interactive=False)]
        return [made, picture, in_words(made.labels, made.lit), gr.update(value=write_region(made, folder), interactive=True)]

    @explained
    def click(own: Held | None, now: Found | None, event: gr.SelectData) -> int:
        labels = present(now).labels.labels
        return region_at(labels, tuple(event.index), preview_size(present(own).picture.image.shape))

    @explained
    def files(own: Held | None, now: Found | None) -> list[Any]:
        if own is None or now is None:
            return [gr.update(interactive=False)] * len(shown.files)
        return [gr.update(value=path, interactive=True) for path in write_files(own.picture, now, folder)]

    quick: dict[str, Any] = {'api_visibility': 'private', 'concurrency_id': LATER, 'concurrency_limit': 2}
    slow: dict[str, Any] = {'api_visibility': 'private', 'concurrency_id': FORWARD, 'concurrency_limit': 1}
    light_in, light_out = [held, found, shown.opacity, shown.number], [found, shown.result, shown.about, shown.mask]
    everything = [*drawn, held, shown.coarser, shown.smallest, grid, about_grid, shown.note]
    inputs = [chosen.picture, chosen.model, chosen.method, shown.opacity]

    begun = [
        chosen.button.click(segment, inputs, everything, **slow),
        chosen.picture.upload(segment, inputs, everything, **slow),
    ]
    slid = [
        slider.release(again, [held, shown.coarser, shown.smallest, shown.opacity], drawn, trigger_mode='always_last', **quick)
        for slider in (shown.coarser, shown.smallest)
    ]
    for event in (*begun, *slid):
        event.success(files, [held, found], shown.files, show_progress='hidden', **quick)
    shown.opacity.release(light, light_in, light_out, trigger_mode='always_last', show_progress='hidden', **quick)
    shown.result.select(click, [held, found], shown.number, show_progress='hidden', **quick)
    shown.number.change(light, light_in, light_out, show_progress='hidden', **quick)


def present(value: Any) -> Any:
    if value is None:
        raise PadsegError(GONE)
    return value


def about_picture(picture: Picture, seconds: float) -> str:
    """Size and conversions of a picture, and the time of its forward pass, in words."""
    height, width = picture.size
    smaller = '' if picture.image.shape[:2] == picture.size else f', shrunk to {picture.image.shape[1]} × {picture.image.shape[0]}'
    notes = ''.join(f'; {html.escape(printable(note))}' for note in picture.notes)
    return f'{width} × {height} pixels{smaller}{notes}. The forward pass took {seconds:.1f} s.'


def naming(chosen: Chosen, settings: Settings) -> None:
    """The tab of names: class words to a legend."""
    words = gr.Textbox(WORDS_SHOWN, label='Names, separated by commas', elem_id='words')
    with gr.Row():
        method = gr.Dropdown(methods_for('classes'), value=DEFAULTS['classes'], label='Method', min_width=140)
        button = gr.Button('Find names', variant='primary', min_width=140, elem_id='find-names')
    result = gr.Image(label='Classes', show_label=False, interactive=False, format='jpeg', elem_id='named', buttons=['fullscreen'])
    listed = gr.HTML(elem_id='legend')

    @explained
    def find(path: str | None, model: str, how: str, text: str) -> list[Any]:
        picture = read_picture(path, settings)
        labels = named(picture, how, model, text, settings)
        return [preview(picture.image, labels.labels), legend(labels, shares(labels))]

    inputs = [chosen.picture, chosen.model, method, words]
    gr.on(
        [button.click, words.submit],
        find,
        inputs,
        [result, listed],
        api_visibility='private',
        concurrency_id=FORWARD,
        concurrency_limit=1,
    )


def comparing(chosen: Chosen, settings: Settings, models: Sequence[Offer]) -> None:
    """The tab that compares two methods or models on the same picture."""
    sides = []
    with gr.Row():
        for number, usual in enumerate(('seg4diff', 'felzenszwalb'), start=1):
            with gr.Column(min_width=280):
                model = picker(models, f'Model {number}', f'model-{number}')
                method = gr.Dropdown(methods_for('regions'), value=usual, label=f'Method {number}')
                image = gr.Image(
                    label=f'Regions {number}', interactive=False, format='jpeg', elem_id=f'side-{number}', buttons=['fullscreen']
                )
                sides.append((model, method, image, gr.Markdown('')))
    button = gr.Button('Compare', variant='primary', elem_id='compare')
    verdict = gr.Markdown('', elem_id='verdict')

    @explained
    def compare(path: str | None, *choices: str) -> list[Any]:
        picture = read_picture(path, settings)
        results: list[Any] = []
        labels = []
        for model, method in (choices[:2], choices[2:]):
            own = hold(picture, method, model, settings)
            made = regions_of(own, turned(own)).labels
            labels.append(made)
            results += [preview(picture.image, made.labels), f'{count_in_words(made)}; forward pass {own.seconds:.1f} s']
        return [*results, agreement(*labels)]

    inputs = [chosen.picture, *(part for model, method, _, _ in sides for part in (model, method))]
    outputs = [*(part for _, _, image, text in sides for part in (image, text)), verdict]
    button.click(compare, inputs, outputs, api_visibility='private', concurrency_id=FORWARD, concurrency_limit=1)
