"""bin/: the environment is made once, whole or not at all, and the programs run in it from anywhere.

Python, pip and the package index are the outside world here: a stand-in called `python3` makes hollow environments and notes
what pip is asked for, so that no test downloads anything. It hands all other code to the real interpreter.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ('bash', 'env', 'readlink', 'rm')  # all that bin/ may need besides Python

# $WORLD/log: what was asked of which module or checking program; $WORLD/fail: the one that ends with 1
# $WORLD/hold: pip says so in $WORLD/started, then waits for $WORLD/go
STAND_IN = """\
#!/bin/bash
arguments=("$@")
while [[ ${1:-} == -[IS] ]]; do shift; done
if [[ ${0##*/} != python* ]]; then
    set -- -m "${0##*/}" "$@"
fi
if [[ ${1:-} == -c && ${2:-} == 'import cv2' ]]; then
    [[ ! -e $WORLD/no_display || -e $WORLD/headless ]]
    exit
elif [[ ${1:-} != -m ]]; then
    exec "$REAL_PYTHON" "${arguments[@]}"
fi
module=$2
shift 2
printf '%s|' "$module" "$@" >>"$WORLD/log"
printf '\\n' >>"$WORLD/log"
case $module in
venv)
    mkdir -p "$1/bin"
    for name in python ruff lint-imports mypy pytest; do
        cp "$0" "$1/bin/$name"
    done
    ;;
pip)
    echo 'Collecting torch'
    if [[ -e $WORLD/hold ]]; then
        exec "$REAL_PYTHON" -c "$HELD" "$WORLD"
    fi
    [[ "$*" != *opencv-python-headless* ]] || : >"$WORLD/headless"
    ;;
padseg)
    printf '%s|' "$PWD" "$@"
    ;;
esac
if [[ -e $WORLD/fail && $(<"$WORLD/fail") == "$module" ]]; then
    echo 'ERROR: no space left on this device' >&2
    exit 1
fi
"""


# In a session of its own, so that killing the group of the script leaves pip alive.
HELD = """
import os, pathlib, sys
os.setsid()
world = pathlib.Path(sys.argv[1])
(world / 'started').write_text(str(os.getpid()))
(world / 'go').read_text()
"""


class World(NamedTuple):
    """A checkout with hollow files, and the folder through which the stand-in is steered."""

    checkout: Path
    steering: Path
    path: Path  # the only folder on PATH

    def environment(self) -> Mapping[str, str]:
        return {
            'PATH': str(self.path),
            'WORLD': str(self.steering),
            'REAL_PYTHON': sys.executable,
            'HELD': HELD,
            'HOME': '/nonexistent',
            'CDPATH': '/:/usr',
        }

    def start(self, program: Path, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (program, *arguments),
            cwd=cwd or self.steering,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, program: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(program or self.checkout / 'bin' / 'padseg', *arguments, cwd=cwd)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def asked(self, module: str) -> list[list[str]]:
        """Arguments of every call of `python -m module` so far."""
        log = self.steering / 'log'
        calls = [line.split('|')[:-1] for line in log.read_text().splitlines()] if log.exists() else []
        return [call[1:] for call in calls if call[0] == module]

    def install_log(self) -> Path:
        return self.checkout / '.venv' / 'install.log'

    def hold_pip(self) -> None:
        (self.steering / 'hold').touch()
        for name in ('started', 'go'):
            os.mkfifo(self.steering / name)

    def pip_started(self) -> int:
        """Process id of the held pip; returns once it runs."""
        return int((self.steering / 'started').read_text())


def make_world(folder: Path, name: str) -> World:
    checkout, steering, path = folder / name, folder / 'world', folder / 'path'
    for made in (checkout, steering, path):
        made.mkdir()
    shutil.copytree(ROOT / 'bin', checkout / 'bin')
    shutil.copytree(ROOT / '.ci', checkout / '.ci')
    for file in ('setup.cfg', 'pyproject.toml', 'constraints.txt'):
        (checkout / file).write_text(f'{file} as it was\n')
    for tool in (*TOOLS, 'cp', 'mkdir'):
        (path / tool).symlink_to(str(shutil.which(tool)))
    stand_in(path / 'python3', STAND_IN)
    return World(checkout, steering, path)


def stand_in(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, 'a checkout')


def test_the_first_start_installs_and_runs(world: World, tmp_path: Path) -> None:
    ran = world.run('run', '--dir', 'my pictures', '', cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f'{tmp_path}|run|--dir|my pictures||')
    assert ran.stderr == (
        f'padseg: creating {world.checkout}/.venv\n'
        'padseg: installing torch, diffusers and about 60 more packages (once; takes a few minutes)\n'
        'padseg: ready\n'
    )
    assert world.install_log().read_text() == 'Collecting torch\n'
    assert len(world.asked('venv')) == 1
    (call,) = world.asked('pip')
    assert call[0] == 'install'
    assert call[-4:] == ['-c', 'constraints.txt', '-e', '.']


def test_a_second_start_installs_nothing_and_is_silent(world: World) -> None:
    world.run()
    ran = world.run('--help')
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f'{world.steering}|--help|', '')
    assert len(world.asked('pip')) == 1


def test_a_link_to_the_program_works(world: World, tmp_path: Path) -> None:
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links' / 'second').symlink_to(world.checkout / 'bin' / 'padseg')
    (tmp_path / 'links' / 'padseg').symlink_to('second')
    assert world.run('models', program=tmp_path / 'links' / 'padseg').stdout == f'{world.steering}|models|'
    assert world.asked('venv') == [[str(world.checkout / '.venv')]]


def test_the_exit_code_of_the_program_is_passed_on(world: World) -> None:
    (world.steering / 'fail').write_text('padseg')
    assert world.run().returncode == 1
    assert len(world.asked('padseg')) == 1


@pytest.mark.parametrize('name', ['setup.cfg', 'pyproject.toml', 'constraints.txt'])
def test_a_changed_file_installs_again_into_the_same_environment(world: World, name: str) -> None:
    world.run()
    (world.checkout / name).write_text('changed\n')
    world.run()
    world.run()
    assert len(world.asked('pip')) == 2
    assert len(world.asked('venv')) == 1


def test_a_moved_checkout_makes_its_environment_anew(world: World) -> None:
    world.run()
    moved = world._replace(checkout=world.checkout.rename(world.checkout.with_name('moved')))
    assert moved.run().returncode == 0
    assert len(world.asked('venv')) == 2
    assert len(world.asked('pip')) == 2


def test_a_broken_python_makes_the_environment_anew(world: World) -> None:
    world.run()
    stand_in(world.checkout / '.venv' / 'bin' / 'python', '#!/nonexistent/python\n')
    assert world.run().returncode == 0
    assert len(world.asked('venv')) == 2


def test_an_environment_made_by_hand_is_used(world: World) -> None:
    python = world.checkout / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    shutil.copy(world.path / 'python3', python)
    assert world.run().returncode == 0
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (0, 1)


def test_each_extra_is_installed_once_and_holds_the_plain_installation(world: World) -> None:
    for _ in range(2):
        world.run('tests/a_test.py', program=world.checkout / 'bin' / 'test')
        world.run('train', program=world.checkout / 'bin' / 'environment')
        world.run()
    assert [call[-1] for call in world.asked('pip')] == ['.[test]', '.[train]']
    assert len(world.asked('venv')) == 1


def test_two_starts_at_once_install_once(world: World) -> None:
    world.hold_pip()
    first = world.start(world.checkout / 'bin' / 'padseg', 'first')
    world.pip_started()
    second = world.start(world.checkout / 'bin' / 'padseg', 'second')
    assert second.stderr is not None
    assert 'waiting' in second.stderr.readline()
    assert first.poll() is None
    (world.steering / 'go').write_text('\n')
    assert first.communicate(timeout=60)[0] == f'{world.steering}|first|'
    assert second.communicate(timeout=60)[0] == f'{world.steering}|second|'
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (1, 1)


def kill_all(process: subprocess.Popen[str], pip: int) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(pip, signal.SIGKILL)
    process.communicate(timeout=60)


def test_after_a_kill_the_next_start_begins_afresh(world: World) -> None:
    world.hold_pip()
    killed = world.start(world.checkout / 'bin' / 'padseg')
    kill_all(killed, world.pip_started())
    (world.steering / 'hold').unlink()
    assert world.run('again').stdout == f'{world.steering}|again|'
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (2, 2)
    assert world.run().returncode == 0
    assert len(world.asked('pip')) == 2


def test_where_pip_outlives_a_kill_the_next_start_waits_for_its_end(world: World) -> None:
    world.hold_pip()
    killed = world.start(world.checkout / 'bin' / 'padseg')
    world.pip_started()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(timeout=60)
    (world.steering / 'hold').unlink()
    second = world.start(world.checkout / 'bin' / 'padseg', 'second')
    assert second.stderr is not None
    assert 'waiting' in second.stderr.readline()
    assert len(world.asked('venv')) == 1
    (world.steering / 'go').write_text('\n')
    assert second.communicate(timeout=60)[0] == f'{world.steering}|second|'
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (2, 2)
    killed.communicate(timeout=60)


def test_a_kill_in_the_middle_of_an_extra_is_noticed_by_the_plain_start(world: World) -> None:
    world.run()
    world.hold_pip()
    killed = world.start(world.checkout / 'bin' / 'test', '--version')
    kill_all(killed, world.pip_started())
    (world.steering / 'hold').unlink()
    assert world.run().returncode == 0
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (2, 3)


def test_a_terminal_sees_what_pip_is_at(world: World) -> None:
    """Lines of the log in one that is written over, gone at the end."""
    world.hold_pip()
    ours, theirs = pty.openpty()
    (world.path / 'sleep').symlink_to(str(shutil.which('sleep')))
    process = subprocess.Popen(
        (world.checkout / 'bin' / 'padseg',), env=world.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    world.pip_started()
    shown = b''
    while b'Collecting torch' not in shown:
        shown += os.read(ours, 1000)
    (world.steering / 'go').write_text('\n')
    process.communicate(timeout=60)
    while not shown.endswith(b'ready\r\n'):
        shown += os.read(ours, 1000)
    os.close(ours)
    assert process.returncode == 0
    assert shown.endswith(b'\r\x1b[Kpadseg: ready\r\n')


@pytest.mark.parametrize('module', ['venv', 'pip'])
def test_a_failed_installation_says_so_and_the_next_try_works(world: World, module: str) -> None:
    (world.steering / 'fail').write_text(module)
    ran = world.run('run')
    assert (ran.returncode, ran.stdout) == (1, '')
    assert 'ERROR: no space left on this device\n' in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith('padseg: ') and ran.stderr.count('Collecting torch') == (module == 'pip')
    assert (str(world.install_log()) in ran.stderr) == (module == 'pip')
    assert not world.asked('padseg')
    (world.steering / 'fail').unlink()
    assert world.run('run').returncode == 0


def test_a_failed_extra_leaves_the_plain_installation_working(world: World) -> None:
    world.run()
    (world.steering / 'fail').write_text('pip')
    assert world.run(program=world.checkout / 'bin' / 'test').returncode == 1
    assert world.run().returncode == 0
    assert (len(world.asked('venv')), len(world.asked('pip'))) == (1, 2)


def test_a_server_without_a_display_takes_the_opencv_without_windows(world: World) -> None:
    (world.steering / 'no_display').touch()
    assert world.run().returncode == 0
    assert [call[-1] for call in world.asked('pip')] == ['.', 'opencv-python-headless']
    assert world.install_log().read_text() == 2 * 'Collecting torch\n'


def test_settings_that_send_pip_elsewhere_are_left_out(world: World) -> None:
    stand_in(world.path / 'python3', STAND_IN.replace("echo 'Collecting torch'", 'echo "user=$PIP_USER target=${PIP_TARGET-}"'))
    environment = {**world.environment(), 'PIP_USER': '1', 'PIP_TARGET': '/nonexistent'}
    ran = subprocess.run((world.checkout / 'bin' / 'padseg',), env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert world.install_log().read_text() == 'user=0 target=\n'


def test_without_a_suitable_python_the_message_names_the_version(world: World) -> None:
    stand_in(world.path / 'python3', '#!/bin/bash\necho "pyenv: python3: command not found" >&2\nexit 127\n')
    ran = world.run()
    assert (ran.returncode, ran.stdout) == (1, '')
    assert ran.stderr.startswith('padseg: no Python 3.10 or newer found')


def test_a_python_that_does_not_run_is_passed_over(world: World) -> None:
    (world.path / 'python3').rename(world.path / 'python3.12')
    stand_in(world.path / 'python3', '#!/bin/bash\necho "pyenv: python3: command not found" >&2\nexit 127\n')
    ran = world.run('models')
    assert (ran.returncode, ran.stdout) == (0, f'{world.steering}|models|')
    assert 'pyenv' not in ran.stderr


def test_a_python_without_venv_is_named(world: World) -> None:
    stand_in(world.path / 'python3', '#!/bin/bash\n[[ $* != *ensurepip* ]]\n')
    ran = world.run()
    assert ran.returncode == 1
    assert ran.stderr.startswith(f'padseg: {world.path}/python3 cannot create virtual environments')


@pytest.mark.parametrize('program', ['bin/test', '.ci/run'])
def test_all_checks_run_in_order_and_types_are_checked_beside_the_tests(world: World, program: str) -> None:
    ran = world.run(program=world.checkout / program)
    assert ran.returncode == 0
    log = [line.split('|')[0] for line in (world.steering / 'log').read_text().splitlines()]
    assert log[:-2] == ['venv', 'pip', 'ruff', 'ruff', 'lint-imports']
    assert sorted(log[-2:]) == ['mypy', 'pytest']


@pytest.mark.parametrize('module', ['lint-imports', 'mypy', 'pytest'])
def test_one_failing_check_fails_the_whole_and_the_others_still_run(world: World, module: str) -> None:
    (world.steering / 'fail').write_text(module)
    ran = world.run(program=world.checkout / '.ci' / 'run')
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f'failed: {module}'
    assert len(world.asked('pytest')) == 1


def test_arguments_go_to_pytest_alone(world: World) -> None:
    world.run('tests/a_test.py', '-k', 'a or b', program=world.checkout / 'bin' / 'test')
    assert world.asked('pytest') == [['tests/a_test.py', '-k', 'a or b']]
    assert not world.asked('ruff')
