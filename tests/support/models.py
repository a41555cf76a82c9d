"""What tests of models run in processes of their own, with other caches, hubs and limits than the tests' own process; each prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from padseg.commands import main
from padseg.errors import PadsegError


def doctor_and_load(*models: str) -> None:
    """For each model the exit code and the report of doctor, and the commit or the refusal of `load`."""
    from padseg.backbones import load

    answers = []
    for name in models:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(['doctor', '--model', name, '--device', 'cpu', '--json'])
        report = json.loads(printed.getvalue())
        report['downloaded'] = len(list(Path(os.environ['HF_HOME']).rglob('*.safetensors')))
        try:
            loaded = load(name, device='cpu').identity.revision
        except PadsegError as error:
            loaded = str(error)
        answers.append([code, report, loaded])
    print(json.dumps(answers))


def load_each(*models: str) -> None:
    """For each model its identity and the sum of its null prompt, or the exit code and the words of the refusal."""
    from padseg.backbones import load

    answers: list[list[object]] = []
    for name in models:
        try:
            backbone = load(name, device='cpu')
            answers.append([*backbone.identity, float(backbone.null_prompt.embeds.double().sum())])
        except PadsegError as error:
            answers.append([error.exit_code, str(error)])
    print(json.dumps(answers))


def load_on_a_full_disk(model: str) -> None:
    """The length of the null prompt, loaded where no file can hold it."""
    import resource

    from padseg.backbones import load

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    print(load(model, device='cpu').null_prompt.embeds.shape[1])


def load_and_empty_the_cache(model: str, cache: str) -> None:
    """Whether the code of text encoders is imported after loading a model, and after loading it with another cache."""
    from padseg.backbones import load

    for folder in (os.environ['PADSEG_CACHE'], cache):
        os.environ['PADSEG_CACHE'] = folder
        load(model, device='cpu')
        print('transformers.models.clip.modeling_clip' in sys.modules)


def load_to_the_second_block(model: str, whole: bool) -> None:
    """The peak memory in MiB of loading a model, whole or up to its second block."""
    from padseg.backbones import load
    from padseg.bench.measure import peak

    load(model, device='cpu', layer=1, whole=whole)
    print(peak())
