"""Folders of results from strangers: whatever their records say, a command ends with one line, and touches nothing outside."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from support.runs import HAND_MADE, put_run

from padseg.commands import main
from padseg.exports import CONVERTERS
from padseg.methods.options import plain_settings
from padseg.methods.seg4diff import Options

Change = Callable[[dict[str, Any]], object]

COMMANDS = {
    'run': ('run', '--dir', 'in', '--out', 'out', '-q'),
    'label': ('label', '--dir', 'in', '--out', 'out', '--classes', 'a,b', '-q'),
    'dry run': ('run', '--dir', 'in', '--out', 'out', '--dry-run'),
    'shard': ('run', '--dir', 'in', '--out', 'out', '--shard', '1/2', '-q'),
    'merge': ('merge', 'out', '--out', 'merged', '-q'),
    'export': ('export', 'out', '--format', 'coco', '-q'),
    'export labelme': ('export', 'out', '--format', 'labelme', '--out', 'elsewhere', '-q'),
    'export panoptic': ('export', 'out', '--format', 'coco-panoptic', '-q'),
    'collect': ('run', '--collect', 'out', '-q'),
    'collect elsewhere': ('run', '--collect', 'out', '--out', 'all', '-q'),
}
SOME = ('merge', 'export labelme', 'collect elsewhere')  # which read records in the three ways that there are
HUGE = 10**4000
DEEP = '[' * 100_000


def put(**values: Any) -> Change:
    return lambda record: record.update(values)


def drop(name: str) -> Change:
    return lambda record: record.pop(name)


def named(name: str) -> Change:
    """Another input, with results as they would be called for it."""
    return put(input=name, outputs={'labels': f'labels/{name}.png', 'masks': f'masks/{name}'})


# Lines of the manifest that no run writes, by what is wrong.
LINES: dict[str, Change | str] = {
    'input up': named('../victim.png'),
    'input far up': named('../' * 30 + 'etc/passwd'),
    'input up in the middle': named('sub/../../victim.png'),
    'input absolute': named('/etc/hostname'),
    'input two slashes': named('a//b.png'),
    'input dot': named('./a.png'),
    'input is a dot': named('.'),
    'input is dots': named('..'),
    'input empty': named(''),
    'input a folder': named('sub/'),
    'input NUL': named('a\0.png'),
    'input surrogate': named('\ud800.png'),
    'input spelled in surrogates': named('\udcc3\udca9.png'),
    'input too long': named('a/' * 5000 + 'a.png'),
    'input number': put(input=5),
    'input list': put(input=['a.png']),
    'input null': put(input=None),
    'input missing': drop('input'),
    'labels of another': put(outputs={'labels': 'labels/b.png.png'}),
    'labels outside': put(outputs={'labels': '../victim.png'}),
    'labels absolute': put(outputs={'labels': '/etc/hostname'}),
    'masks outside': put(outputs={'labels': 'labels/a.png.png', 'masks': '../.ssh'}),
    'masks everything': put(outputs={'labels': 'labels/a.png.png', 'masks': '.'}),
    'overlay is the lock': put(outputs={'labels': 'labels/a.png.png', 'overlays': '.lock'}),
    'maps are the header': put(outputs={'labels': 'labels/a.png.png', 'maps': 'run.json'}),
    'a kind that is none': put(outputs={'labels': 'labels/a.png.png', '..': '../a.png'}),
    'labels number': put(outputs={'labels': 5}),
    'no label map': put(outputs={}),
    'outputs list': put(outputs=[['labels', 'labels/a.png.png']]),
    'outputs null': put(outputs=None),
    'outputs missing': drop('outputs'),
    'status unknown': put(status='perfect'),
    'status missing': drop('status'),
    'size missing': drop('size'),
    'size negative': put(size=[-2, 4]),
    'size zero': put(size=[0, 0]),
    'size huge': put(size=[HUGE, 4]),
    'size of three': put(size=[2, 4, 3]),
    'size fraction': put(size=[2.5, 4]),
    'size text': put(size='24'),
    'size infinite': put(size=[float('inf'), 4]),
    'reduced from nothing': put(reduced_from=[0, 4]),
    'regions negative': put(regions=-1),
    'regions huge': put(regions=HUGE),
    'regions 1e300': put(regions=1e300),
    'regions text': put(regions='many'),
    'bytes negative': put(bytes=-1),
    'modified huge': put(modified=HUGE),
    'sha256 short': put(sha256='abc'),
    'sha256 a path': put(sha256='../' * 22),
    'sha256 object': put(sha256={}),
    'seconds NaN': put(seconds=float('nan')),
    'seconds 1e300': put(seconds=1e300),
    'seconds negative': put(seconds=-1),
    'stage infinite': put(stages={'decode': float('inf')}),
    'stages list': put(stages=[1, 2]),
    'notes text': put(notes='turned'),
    'notes of numbers': put(notes=[5]),
    'reason number': put(reason=5),
    'error object': put(error={}),
    'a key twice': '{"input": "a.png", "input": "../a.png", "status": "failed"}',
    'deep': DEEP,
    'deep inside': '{"input": "a.png", "status": "failed", "notes": ' + DEEP,
    'a huge number': '{"input": "a.png", "status": "failed", "bytes": ' + '9' * 5000 + '}',
    'not an object': '"a.png"',
    'null': 'null',
    'no JSON': "{'input': 'a.png'}",
    'UTF-16': 'ÿþ{',
    'a long line': '{"input": "a.png", "status": "failed", "reason": "' + 'x' * 2**24 + '"}',
}

# Fields of run.json that no run writes. All commands read them.
HEADERS: dict[str, Change | str] = {
    'source NUL': put(source='/in\0'),
    'source too long': put(source='/' + 'x' * 300),
    'source far too long': put(source='/x' * 5000),
    'source surrogate': put(source='/\ud800'),
    'source number': put(source=5),
    'source missing': drop('source'),
    'settings list': put(settings=[]),
    'settings missing': drop('settings'),
    'setting object': put(settings={'side': {}}),
    'setting list': put(settings={'side': [1]}),
    'setting huge': put(settings={'side': HUGE}),
    'setting NaN': put(settings={'threshold': float('nan')}),
    'setting infinite': put(settings={'threshold': float('inf')}),
    'requested object': put(requested={'side': {}}),
    'model text': put(model='tiny'),
    'model number': put(model={'model': 5, 'folder': '', 'revision': None, 'weights': ''}),
    'model empty': put(model={}),
    'threads negative': put(threads=-1),
    'batch text': put(batch='two'),
    'seconds NaN': put(seconds=float('nan')),
    'seconds 1e300': put(seconds=1e300),
    'counts negative': put(counts={'images': -1}),
    'counts 1e300': put(counts={'regions': 1e300}),
    'counts list': put(counts=[]),
    'status unknown': put(status='perfect'),
    'versions list': put(versions=['torch']),
    'padseg number': put(padseg=1),
    'a key twice': '{"source": "in", "source": "/etc"}',
    'deep': DEEP,
    'not an object': '[]',
    'empty': '',
}

# Settings in run.json that no run records. They are read where results are used.
SETTINGS: dict[str, dict[str, Any]] = {
    'exif': {'exif': 'sometimes'},
    'frames': {'frames': 5},
    'void': {'void': 'perhaps'},
    'shrink zero': {'shrink': 0},
    'shrink negative': {'shrink': -5},
    'shrink text': {'shrink': 'a little'},
    'range of one': {'value_range': '0'},
    'range empty': {'value_range': '1 1'},
    'range NaN': {'value_range': 'nan nan'},
    'range infinite': {'value_range': '0 1e999'},
    'range number': {'value_range': 5},
    'background': {'background': 'rainbow'},
    'background number': {'background': 5},
    'background long': {'background': 'x' * 1000},
    'classes text': {'classes': 'star'},
    'classes number': {'classes': 5},
    'classes a word': {'classes': '"star"'},
    'classes of numbers': {'classes': '[1, 2]'},
    'classes deep': {'classes': DEEP},
    'classes surrogate': {'classes': '["\ud800"]'},
    'classes empty': {'classes': '[""]'},
    'classes twice': {'classes': '["cat", "cat"]'},
    'classes of a method for regions': {'classes': '["cat"]', 'method': 'grid'},
    'method number': {'method': 5},
    'method unknown': {'method': 'magic'},
    'method without its classes': {'method': 'open-vocabulary'},
    'void number': {'void': 1},
    'shrink true': {'shrink': True},
}
OF_MAPS: dict[str, dict[str, Any]] = {  # settings of a run that kept token maps, which merging them needs
    'side true': {'side': True},
    'side text': {'side': '256'},
    'threshold text': {'threshold': '0.1'},
    'threshold NaN': {'threshold': 'nan'},
    'layer infinite': {'layer': 'inf'},
    'components number': {'components': 1},
    'refine unknown': {'refine': 'x' * 5000},
    'step nothing': {'step': None},
    'geometry true': {'geometry': True},
    'classes of another method': {'classes': '["cat"]'},
    'a method without maps': {'method': 'grid'},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two pictures and their results, with something beside them that is not to be touched."""
    put_run(tmp_path, {'a.png': HAND_MADE, 'b.png': HAND_MADE})
    (tmp_path / 'out/maps').mkdir()
    (tmp_path / '.ssh').mkdir()
    (tmp_path / '.ssh/id').write_text('my key')
    PIL.Image.new('L', (4, 2)).save(tmp_path / 'victim.png')
    (tmp_path / 'victim.json').write_text('{"mine": 1}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, object]:
    """What is in a folder: bytes of files, targets of links; but for locks and the folders that hold nothing else."""
    found: dict[str, object] = {}
    for path in folder.rglob('*'):
        if path.is_symlink():
            found[str(path)] = path.readlink()
        elif path.is_file() and path.name != '.lock':
            found[str(path)] = path.read_bytes()
    return found


def craft_line(change: Change | str) -> None:
    path = Path('out/manifest.jsonl')
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    if not isinstance(change, str):
        change(record)
    lines[0] = change if isinstance(change, str) else json.dumps(record)
    path.write_text('\n'.join(lines) + '\n', encoding='latin-1')


def craft_header(change: Change | str) -> None:
    path = Path('out/run.json')
    record = json.loads(path.read_text())
    if not isinstance(change, str):
        change(record)
    path.write_text(change if isinstance(change, str) else json.dumps(record))


def refused(commands: Iterable[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command ends with exit code 6 and one line, and all files are as they were."""
    before = tree(Path.cwd())
    for command in commands:
        assert main(list(COMMANDS[command])) == 6, command
        printed, said = capsys.readouterr()
        assert printed == '' and len(said.splitlines()) == 1 and said.startswith('padseg: ') and words in said, (command, said)
        assert said.isascii()
        assert tree(Path.cwd()) == before, command


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('change', LINES.values(), ids=LINES)
def test_a_line_that_no_run_writes_is_refused(change, capsys):
    craft_line(change)
    refused(SOME, 'out/manifest.jsonl, line 1 is not a record of a picture', capsys)


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('change', HEADERS.values(), ids=HEADERS)
def test_a_header_that_no_run_writes_is_refused(change, capsys):
    craft_header(change)
    refused(SOME, 'out/run.json is not a record of a padseg run', capsys)


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('change', SETTINGS.values(), ids=SETTINGS)
def test_settings_that_no_run_records_are_refused(change, capsys):
    craft_header(put(settings=change))
    refused(('merge', 'export'), 'the recorded settings are not those of a run', capsys)


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('change', OF_MAPS.values(), ids=OF_MAPS)
def test_settings_of_maps_that_no_run_records_are_refused(change, capsys):
    resolved = Options(layer=4, step=1, normalisation='share', threshold=float('inf'), side=256, refine='none', superpixels=0.0, join=0.0)
    settings = plain_settings(dataclasses.replace(resolved, tokens='all', components=True, min_area=0.0, regroup=0.0, levels=()))
    craft_header(put(settings=settings))
    assert main(['merge', 'out', '--out', 'merged', '-q']) == 3  # there are no maps of these pictures
    shutil.rmtree('merged')
    capsys.readouterr()
    craft_header(put(settings={**settings, **change}))
    refused(('merge',), 'the recorded settings', capsys)


@pytest.mark.usefixtures('place')
def test_every_command_reads_them_so(capsys):
    craft_line(named('../victim.png'))
    refused(COMMANDS, 'is not a record of a picture', capsys)


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('name', ['run.json', 'manifest.jsonl'])
def test_records_that_are_no_files_are_refused_at_once(name, capsys):
    path = Path('out') / name
    text = path.read_bytes()
    for kind in ('folder', 'pipe', 'link'):
        path.unlink()
        if kind == 'folder':
            path.mkdir()
        elif kind == 'pipe':
            os.mkfifo(path)
        else:
            Path('records').write_bytes(text)
            path.symlink_to('../records')
        words = 'a link, which is not followed' if kind == 'link' else 'not a regular file'
        refused(COMMANDS, words, capsys)
        path.rmdir() if kind == 'folder' else path.unlink()
        path.write_bytes(text)


def link_label_map() -> None:
    Path('out/labels/a.png.png').unlink()
    Path('out/labels/a.png.png').symlink_to('../../victim.png')


def link_label_maps() -> None:
    Path('out/labels').rename('labels')
    Path('out/labels').symlink_to('../labels')


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('act', [link_label_map, link_label_maps])
def test_label_maps_behind_links_are_not_read(act, capsys):
    act()
    refused(('export', 'export labelme', 'export panoptic'), 'is a link, which is not followed', capsys)


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('format', CONVERTERS)
def test_exports_do_not_leave_the_folder_through_links(format, capsys):
    """The format's own folder, or one inside it, leads elsewhere."""
    os.mkdir('victim')
    places = [CONVERTERS[format].FOLDER, *(f'{CONVERTERS[format].FOLDER}/{part}' for part in CONVERTERS[format].PARTS if part)]
    for place in places:
        Path('out', place).parent.mkdir(exist_ok=True)
        Path('out', place).symlink_to(Path('victim').resolve())
        before = tree(Path.cwd())
        assert main(['export', 'out', '--format', format, '-q']) == 6
        assert 'is a link, which is not followed' in capsys.readouterr().err
        assert tree(Path.cwd()) == before
        Path('out', place).unlink()


def test_a_link_at_the_name_that_an_export_makes_of_another(tmp_path, capsys):
    out = put_run(tmp_path, {'.hidden/a.png': HAND_MADE})
    (out / 'hf-imagefolder/labels').mkdir(parents=True)
    (tmp_path / 'victim').mkdir()
    (out / 'hf-imagefolder/labels/%2Ehidden').symlink_to(tmp_path / 'victim')
    assert main(['export', str(out), '--format', 'hf-imagefolder', '-q']) == 6
    assert 'is a link, which is not followed' in capsys.readouterr().err and not list((tmp_path / 'victim').iterdir())


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('format', CONVERTERS)
def test_a_link_where_a_file_goes_is_replaced(format):
    """What it points to stays as it is."""
    assert main(['export', 'out', '--format', format, '--out', 'whole', '-q']) == 0
    expected = {path.relative_to('whole'): path.read_bytes() for path in Path('whole').rglob('*') if path.is_file()}
    for path in expected:
        Path('again', path).parent.mkdir(parents=True, exist_ok=True)
        if path.name != 'README.md':
            Path('again', path).symlink_to(Path('victim.json').resolve())
    code = main(['export', 'out', '--format', format, '--out', 'again', '-q'])
    assert Path('victim.json').read_text() == '{"mine": 1}'
    if format == 'labelme':  # whose files may be a person's
        assert code == 3 and all(Path('again', path).is_symlink() for path in expected)
    else:
        assert code == 0
        assert all(Path('again', path).read_bytes() == data and not Path('again', path).is_symlink() for path, data in expected.items())


@pytest.mark.usefixtures('place')
def test_a_folder_where_the_one_file_goes(capsys):
    Path('out/coco/instances.json').mkdir(parents=True)
    assert main(['export', 'out', '--format', 'coco', '-q']) == 6
    assert capsys.readouterr().err == 'padseg: cannot write to out/coco/instances.json: Is a directory\n'
    assert not list(Path('out').rglob('.padseg-*'))


@pytest.mark.usefixtures('place')
@pytest.mark.parametrize('format', CONVERTERS)
def test_a_label_map_with_more_numbers_than_there_are_classes_fails_alone(format, capsys):
    craft_header(put(settings={'classes': '["cat", "dog"]'}))
    PIL.Image.fromarray(np.clip(HAND_MADE, 0, 2).astype(np.uint8)).save('out/labels/b.png.png')
    assert main(['export', 'out', '--format', format, '--json']) == 3
    assert json.loads(capsys.readouterr().out)['failed'] == {'a.png': 'out/labels/a.png.png: has the number 3, but there are 2 classes'}


@pytest.mark.usefixtures('place')
def test_a_label_map_of_another_size_is_not_decoded(capsys):
    """Decoding this one would find that most of it is missing."""
    PIL.Image.effect_noise((100, 100), 50).save('out/labels/a.png.png')
    os.truncate('out/labels/a.png.png', 200)
    assert main(['export', 'out', '--format', 'coco', '--json']) == 3
    assert json.loads(capsys.readouterr().out)['failed'] == {'a.png': 'out/labels/a.png.png: differs in size from its picture'}


def test_there_are_many_of_them():
    assert len(LINES) + len(HEADERS) + len(SETTINGS) >= 100


@pytest.mark.usefixtures('place')
def test_a_record_without_the_model_that_it_must_have(capsys):
    command = ['run', '--dir', 'in', '--out', 'new', '-q']
    assert main(command) == 0
    record = json.loads(Path('new/run.json').read_text())
    Path('new/run.json').write_text(json.dumps({**record, 'model': None}))
    assert main(command) == 0 and capsys.readouterr().err == ''
    assert json.loads(Path('new/run.json').read_text())['model'] == record['model']
