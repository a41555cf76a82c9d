"""`padseg doctor`, `padseg models` and completion: real processes, folders as the hub's client keeps them, a hub on this machine."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from safetensors.torch import load_file, save_file
from support.hub import COMMIT, Hub, cached, serve
from support.models import doctor_and_load
from support.processes import start

from padseg.backbones import availability, load
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.commands import doctor, main
from padseg.system import machine as limits
from padseg.system.disk import human

ROOT = pathlib.Path(__file__).parents[2]
TRANSFORMER = 'transformer/diffusion_pytorch_model.safetensors'
VAE = 'vae/diffusion_pytorch_model.safetensors'


@pytest.fixture(autouse=True)
def no_settings_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """None but those that a test gives to its processes."""
    for name in os.environ:
        if name.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_OFFLINE')):
            monkeypatch.delenv(name)


def both(home: pathlib.Path, *models: str, **environment: str) -> list[tuple[int, dict, str]]:
    """Exit code and report of doctor, and the commit or the refusal of `load`, for each model in one process."""
    settings = {'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'PADSEG_CACHE': str(home / 'padseg')}
    ran = start(doctor_and_load, *models, **settings, **environment).wait()
    assert ran.returncode == 0, ran.stderr
    return [tuple(answer) for answer in json.loads(ran.stdout)]


def listed(snapshot: pathlib.Path, *extra: str) -> None:
    """The list of the repository's files, which the client keeps beside the files."""
    trees = snapshot.parent.parent / 'trees'
    trees.mkdir()
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob('*') if path.is_symlink()]
    files = {name: {'size': 1, 'blob_id': 'f' * 40} for name in [*names, *extra]}
    (trees / f'{COMMIT}.json').write_text(json.dumps({'format_version': 1, 'files': files}))


def without(name: str) -> Callable[[pathlib.Path], None]:
    """The file's content is lost, its link is not."""
    return lambda snapshot: (snapshot / name).resolve().unlink()


def cut(snapshot: pathlib.Path) -> None:
    os.truncate((snapshot / TRANSFORMER).resolve(), 1000)


def no_transformer(snapshot: pathlib.Path) -> None:
    shutil.rmtree(snapshot / 'transformer')


def lost_tensor(snapshot: pathlib.Path) -> None:
    path = (snapshot / TRANSFORMER).resolve()
    tensors = load_file(path)
    del tensors['context_embedder.weight']
    save_file(tensors, path, {'format': 'pt'})


def one_shard_less(snapshot: pathlib.Path) -> None:
    path = snapshot / TRANSFORMER
    tensors = load_file(path)
    path.unlink()
    names = {name: f'diffusion_pytorch_model-0000{number % 2 + 1}-of-00002.safetensors' for number, name in enumerate(sorted(tensors))}
    first = min(names.values())
    save_file({name: tensors[name] for name in names if names[name] == first}, path.with_name(first), {'format': 'pt'})
    path.with_name(f'{path.name}.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': names}))


def no_json(snapshot: pathlib.Path) -> None:
    (snapshot / 'vae/config.json').resolve().write_text('{')


def unlisted_files_missing(snapshot: pathlib.Path) -> None:
    listed(snapshot, 'transformer/diffusion_pytorch_model.fp16.safetensors')


def listed_and_without(snapshot: pathlib.Path) -> None:
    listed(snapshot)
    without(VAE)(snapshot)


FAULTS: dict[str, tuple[Callable[[pathlib.Path], None], str, str]] = {
    'vae': (without(VAE), 'incomplete', f'no file named {pathlib.Path(VAE).name} in vae of '),
    'listed': (listed_and_without, 'incomplete', f'no file named {pathlib.Path(VAE).name} in vae of '),
    'text': (without('text_encoder_2/model.safetensors'), 'incomplete', 'no file named model.safetensors in text_encoder_2 of '),
    'words': (without('tokenizer/tokenizer.json'), 'incomplete', 'no file named tokenizer.json in tokenizer of '),
    'shards': (one_shard_less, 'incomplete', 'no file named diffusion_pytorch_model-00002-of-00002.safetensors in transformer of '),
    'config': (no_transformer, 'incomplete', 'no file named config.json in transformer, '),
    'cut': (cut, 'damaged', f'{TRANSFORMER} is damaged ('),
    'tensor': (lost_tensor, 'damaged', 'lack 1 tensors, context_embedder.weight first'),
    'json': (no_json, 'damaged', 'vae/config.json is not valid JSON'),
}


def test_what_is_wrong_with_the_cache_in_the_words_of_a_run(tmp_path, sd3_folder):
    for name, (damage, _, _) in FAULTS.items():
        damage(cached(tmp_path, f'org/{name}', sd3_folder))
    answers = both(tmp_path, *(f'org/{name}' for name in FAULTS), HF_HUB_OFFLINE='1')
    for (name, (_, state, words)), (code, report, loaded) in zip(FAULTS.items(), answers, strict=True):
        found = report['state']
        assert (code, found['state'], found['message']) == (4, state, loaded), name
        assert words in loaded and '\n' not in loaded, name
        assert report['needed'] is None


@pytest.mark.slow
def test_what_is_cached_is_ready_offline(tmp_path, sd3_folder):
    whole = cached(tmp_path, 'org/whole', sd3_folder)
    # the client says that a file is missing; it is none that padseg reads
    unlisted_files_missing(cached(tmp_path, 'org/more', sd3_folder))
    models = ('org/whole', f'org/whole@{COMMIT}', 'org/whole@main', 'org/more')
    answers = both(tmp_path, *models, 'org/whole@v2', 'org/absent', HF_HUB_OFFLINE='1')
    for code, report, loaded in answers[: len(models)]:
        assert (code, report['state']['state'], report['state']['commit'], loaded) == (0, 'ready', COMMIT, COMMIT)
        assert report['offline'] and report['cache'] == str(tmp_path / 'hub')
    assert answers[0][1]['state']['folder'] == str(whole)
    for code, report, loaded in answers[len(models) :]:
        assert (code, report['state']['state'], report['state']['message']) == (4, 'offline and not cached', loaded)
        assert 'HF_HUB_OFFLINE' in loaded


def test_transformers_variable_means_offline_too(tmp_path, sd3_folder):
    cached(tmp_path, 'org/whole', sd3_folder)
    nowhere = {'HF_ENDPOINT': 'http://127.0.0.1:1', 'TRANSFORMERS_OFFLINE': '1'}
    (code, report, loaded), (absent, _, words) = both(tmp_path, 'org/whole', 'org/absent', **nowhere)
    assert (code, report['offline'], loaded) == (0, True, COMMIT)
    assert absent == 4 and 'TRANSFORMERS_OFFLINE is set' in words


@pytest.mark.slow
def test_an_unreachable_hub(tmp_path, sd3_folder):
    without(VAE)(cached(tmp_path, 'org/vae', sd3_folder))
    answers = both(tmp_path, 'org/absent', 'org/vae', HF_ENDPOINT='http://127.0.0.1:1')
    for (code, report, loaded), state in zip(answers, ('offline and not cached', 'incomplete'), strict=True):
        assert (code, report['state']['state'], report['state']['message']) == (4, state, loaded)
        assert not report['offline']


# a hub


@pytest.fixture
def hub(sd3_folder, tmp_path) -> Iterator[Hub]:
    with serve(pathlib.Path(shutil.copytree(sd3_folder, tmp_path / 'published'))) as running:
        yield running


REFUSED = {
    'org/gated': ('no token', 'accept its licence on https://huggingface.co/org/gated, then `hf auth login`'),
    'org/none': ('unknown repository', 'check the name, or `hf auth login`'),
    'org/model@no-such': ('unknown revision', 'has no revision no-such: https://huggingface.co/org/model/tree/main lists'),
}
REFUSED_WITH_TOKEN = {
    'org/gated': ('licence not accepted', 'accept its licence on https://huggingface.co/org/gated with that account'),
    'org/none': ('unknown repository', 'that the account of your token may read it'),
    'org/narrow': ('token refused', 'https://huggingface.co/settings/tokens'),
}


@pytest.mark.parametrize(
    ('token', 'expected'),
    [
        ({}, REFUSED),
        ({'HF_TOKEN': 'hf_good'}, REFUSED_WITH_TOKEN),
        ({'HF_TOKEN': 'hf_expired'}, {'org/model': ('token refused', '`hf auth login` again')}),
    ],
    ids=['without a token', 'with a token', 'with an expired token'],
)
def test_what_the_hub_refuses_in_the_words_of_a_run(hub, tmp_path, token, expected):
    answers = both(tmp_path / 'home', *expected, HF_ENDPOINT=hub.url, **token)
    for (model, (state, words)), (code, report, loaded) in zip(expected.items(), answers, strict=True):
        assert (code, report['state']['state'], report['state']['message']) == (4, state, loaded), model
        assert words in loaded and '\n' not in loaded
        assert report['token'] == bool(token)
        assert 'hf_' not in json.dumps(report)


def test_what_the_hub_grants_is_not_downloaded(hub, tmp_path):
    home = tmp_path / 'home'
    for name in (TRANSFORMER, VAE):
        (hub.folder / name).with_suffix('.txt').write_text('not read, but downloaded')
    (code, report, loaded), other = both(home, 'org/model', 'org/other', HF_ENDPOINT=hub.url)
    files = [path for path in hub.folder.rglob('*') if path.is_file() and path.parent.name != 'text_encoder_3']
    total = sum(path.stat().st_size for path in files)
    assert (code, report['state']['state'], report['state']['commit'], report['state']['download']) == (0, 'not downloaded', COMMIT, total)
    assert f'the first run downloads {len(files)} files, {human(total)}' in report['state']['message']
    assert (report['downloaded'], loaded) == (0, COMMIT)
    assert len([path for path in home.rglob('*') if path.is_symlink()]) == len(files)
    assert (other[0], other[1]['state']['state'], other[1]['state']['message']) == (4, 'incomplete', other[2])
    assert other[2] == 'org/other is not a model in diffusers layout: transformer/config.json or unet/config.json is missing'


def test_the_remedy_for_a_damaged_file_mends_it(hub, tmp_path):
    home = tmp_path / 'home'
    snapshot = cached(home, 'org/model', hub.folder)
    whole = (snapshot / TRANSFORMER).stat().st_size
    cut(snapshot)
    ((code, report, loaded),) = both(home, 'org/model', HF_ENDPOINT=hub.url)
    assert (code, report['state']['message']) == (4, loaded)
    remedy = re.findall('`([^`]+)`', loaded)[0]
    assert remedy.startswith('rm ')
    subprocess.run(shlex.split(remedy), check=True)
    again, then = both(home, 'org/model', 'org/model', HF_ENDPOINT=hub.url)
    assert (again[0], again[1]['state']['state'], again[1]['state']['download'], again[2]) == (0, 'not downloaded', whole, COMMIT)
    assert (then[0], then[1]['state']['state'], then[2]) == (0, 'ready', COMMIT)


# this machine


def test_the_report_for_people(tmp_path):
    ran = start(main, ['doctor', '--device', 'cpu', '--out', str(tmp_path / 'not' / 'yet')], HF_HOME=str(tmp_path)).wait()
    assert (ran.returncode, ran.stderr) == (0, '')
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [
        *('versions', 'platform', 'CPUs', 'GPUs', 'device', 'memory', 'weights', 'a', 'disk', 'hub', 'model')
    ]
    assert 'torch 2.' in lines[0] and lines[4].endswith('cpu (float32)') and 'estimated' in lines[6]
    assert lines[7].startswith('a picture ') and 'bfloat16' in lines[7] and 'fits a GPU with 8 GiB' in lines[7]
    assert f'free at {tmp_path}/not/yet' in lines[8] and 'no token, online' in lines[9]
    assert lines[10].endswith('tiny: ready') and 'without a network' in lines[11]
    assert not (tmp_path / 'not').exists()


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = main(['doctor', '--device', 'cpu', '--json', *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(('dtype', 'size'), [(None, 4), ('float32', 4), ('bfloat16', 2), ('float16', 2)])
def test_the_reckoning_counts_every_parameter(sd3_folder, capsys, monkeypatch, tmp_path, dtype, size):
    backbone = load(str(sd3_folder), device='cpu')
    count = sum(parameter.numel() for module in (backbone.transformer, backbone.vae) for parameter in module.state_dict().values())
    arguments = ('--model', str(sd3_folder), *(('--dtype', dtype) if dtype else ()))
    code, report = report_of(capsys, *arguments)
    assert (code, report['dtype'], report['needed']) == (0, dtype or 'float32', {'device': size * count, 'host': size * count})
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    _, report = report_of(capsys, *arguments)
    text = sum(
        tensor.numel() for number in ('', '_2') for tensor in load_file(sd3_folder / f'text_encoder{number}' / 'model.safetensors').values()
    )
    assert report['needed'] == {'device': size * count, 'host': size * count + 4 * text}
    assert not list(tmp_path.iterdir())


def test_a_folder_is_judged_like_the_cache(sd3_folder, tmp_path, capsys):
    folder = tmp_path / 'model'
    shutil.copytree(sd3_folder, folder)
    (folder / VAE).unlink()
    code, report = report_of(capsys, '--model', str(folder))
    assert (code, report['state']['state']) == (4, 'incomplete')
    assert f'no file named {pathlib.Path(VAE).name} in vae of {folder}; copy or download' in report['state']['message']
    (tmp_path / 'empty').mkdir()
    code, report = report_of(capsys, '--model', str(tmp_path / 'empty'))
    assert (code, report['state']['state']) == (4, 'incomplete')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--model', 'sd99'], 'unknown model sd99: use tiny, sd3, sd3.5'),
        (['--revision', 'main'], 'is a folder, which has no revisions'),
        (['--dtype', 'float8'], 'dtype is one of float32, bfloat16, float16; got float8'),
        (['--device', 'nonsense'], 'device nonsense is not available here'),
        (['surplus'], 'unexpected extra argument'),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    assert main(['doctor', *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and words in captured.err


def test_shortages_are_named_with_a_remedy(tmp_path):
    report = doctor.examine('tiny', None, 'cpu', None, tmp_path)
    assert report.warnings == [] and report.needed is not None
    size = report.needed.host
    assert doctor.shortages(report._replace(memory_free=size)) == []
    assert len(doctor.shortages(report._replace(memory=size - 1))) == 1
    (line,) = doctor.shortages(report._replace(memory_free=size - 1))
    assert '`--dtype bfloat16`' in line and human(size) in line
    assert doctor.shortages(report._replace(memory_free=None, memory=size)) == []
    assert len(doctor.shortages(report._replace(memory_free=None, memory=size - 1))) == 1
    assert doctor.shortages(report._replace(device='cuda:0', device_memory=report.needed.device)) == []
    (line,) = doctor.shortages(report._replace(device='cuda:0', device_memory=report.needed.device - 1))
    assert line.startswith('cuda:0 has ')
    waiting = report.state._replace(download=report.cache_free)
    assert doctor.shortages(report._replace(state=waiting)) == []
    (line,) = doctor.shortages(report._replace(state=waiting, cache_free=report.cache_free - 1))
    assert 'HF_HOME' in line


def test_memory_of_the_machine_and_of_a_container(tmp_path, monkeypatch):
    for name in ('MEMINFO', 'CONTAINER'):
        monkeypatch.setattr(limits, name, tmp_path / name)
    machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    assert (limits.memory_in_all(), limits.memory_available()) == (machine, None)
    (tmp_path / 'MEMINFO').write_text('MemTotal:       900 kB\nMemFree:          1 kB\nMemAvailable:   300 kB\n')
    assert limits.memory_available() == 300 * 1024
    for text, expected in (('max\n', machine), ('4096\n', 4096), (f'{2 * machine}\n', machine)):
        (tmp_path / 'CONTAINER').write_text(text)
        assert limits.memory_in_all() == expected


@pytest.mark.parametrize(
    ('size', 'text'),
    [(0, '0 B'), (999, '999 B'), (1000, '1.0 kB'), (4_200_000, '4.2 MB'), (8_100_000_000, '8.1 GB'), (10**16, '10000.0 TB')],
)
def test_sizes_for_people(size, text):
    assert human(size) == text


# the list of models


GATED = ('sd3.5-large', 'sd3.5-large-turbo', 'flux', 'flux-schnell')  # beside those of the test
OPEN = tuple(name for name in BACKBONES if name not in ('tiny', 'sd3', 'sd3.5', *GATED))  # that anybody may download


def test_models_say_what_is_cached(tmp_path, sd3_folder):
    assert list(CARDS) == list(BACKBONES)
    home = tmp_path / 'home'
    snapshot = cached(home, BACKBONES['sd3'].repo, sd3_folder)
    without(VAE)(cached(home, BACKBONES['sd3.5'].repo, sd3_folder))
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    environment = {'HF_HOME': str(home), 'PYTHONPATH': str(tmp_path), 'HF_ENDPOINT': 'http://127.0.0.1:1'}
    ran = start(main, ['models', '--json'], **environment).wait()
    assert (ran.returncode, ran.stderr) == (0, '')
    rows = json.loads(ran.stdout)
    assert {name: (row['state'], row['local'], row['gated']) for name, row in rows.items()} == {
        'tiny': ('here', True, False),
        'sd3': ('here', True, True),
        'sd3.5': ('incomplete', False, True),
        **dict.fromkeys(OPEN, ('not here', False, False)),
        **dict.fromkeys(GATED, ('not here', False, True)),
    }
    assert rows['sd3']['folder'] == str(snapshot)
    assert rows['sd3']['bytes'] == sum(path.stat().st_size for path in sd3_folder.rglob('*') if path.is_file())
    assert rows['sd3']['settings']['layers'] == 4 and rows['sd3.5']['settings']['layers'] == 24
    assert f'license: {rows["tiny"]["licence"].lower()}' in (ROOT / 'padseg/models/tiny/README.md').read_text(encoding='utf-8')
    ran = start(main, ['models'], **environment).wait()
    heads, *lines = ran.stdout.splitlines()
    starts = [heads.index(head) for head in ('name', 'here?', 'size', 'licence', 'gated', 'repo')]
    table = [[line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    states = {'tiny': 'here', 'sd3': 'here', 'sd3.5': 'incomplete'}
    assert [(name, state, gated, repo) for name, state, _, _, gated, repo in table] == [
        (name, states.get(name, 'not here'), 'yes' if CARDS[name].gated else 'no', spec.repo) for name, spec in BACKBONES.items()
    ]
    assert table[1][2:4] == [human(rows['sd3']['bytes']), rows['sd3']['licence']]
    verbose = start(main, ['models', '--verbose'], **environment).wait().stdout.splitlines()
    assert [verbose[0], *verbose[1::2]] == [heads, *lines] and 'layers 4, layer 2' in verbose[4]


def test_readme_names_every_state():
    text = (ROOT / 'docs/models.md').read_text(encoding='utf-8')
    table = text[text.index('| state | meaning |') :].split('\n\n')[0]
    states = {state for _, state, _ in FAULTS.values()} | {
        state for expected in (REFUSED, REFUSED_WITH_TOKEN) for state, _ in expected.values()
    }
    assert set(re.findall(r'`([^`]+)`', table)) == states | {availability.READY, availability.DOWNLOADABLE, *availability.ABSENT}


# completion


@pytest.fixture
def shell(tmp_path) -> dict[str, str]:
    """An environment where padseg is a command and torch cannot be imported."""
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    (tmp_path / 'padseg').write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m padseg "$@"\n')
    (tmp_path / 'padseg').chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    return {**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}', 'PATH': path}


LINES = re.findall(r'_PADSEG_COMPLETE=(\w+) padseg', (ROOT / 'docs/getting-started.md').read_text(encoding='utf-8'))


@pytest.mark.parametrize(
    ('instruction', 'hook'),
    [
        ('bash_source', '-F _padseg_completion padseg'),
        ('zsh_source', 'compdef _padseg_completion padseg'),
        ('fish_source', 'complete --no-files --command padseg'),
    ],
)
def test_the_scripts_of_readme(shell, instruction, hook):
    assert instruction in LINES and len(LINES) == 3
    ran = subprocess.run(['padseg'], env={**shell, '_PADSEG_COMPLETE': instruction}, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, '')
    assert hook in ran.stdout


COMPLETE = """
source <(_PADSEG_COMPLETE=bash_source padseg)
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_padseg_completion padseg
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['padseg', 'ru'], ['run']),
        (['padseg', 'doc'], ['doctor']),
        (['padseg', 'doctor', '--js'], ['--json']),
        (['padseg', 'run', '--geometry', 'seg4diff-p'], ['seg4diff-paper']),
    ],
)
def test_bash_completes(shell, words, expected):
    ran = subprocess.run(['bash', '-c', COMPLETE, 'bash', *words], env=shell, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, expected, '')
