"""What a wheel holds: the package with its data, and neither its benchmarks nor tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_the_package_and_its_data(tmp_path: Path) -> None:
    ours = shutil.ignore_patterns('__pycache__')
    for name in ('padseg', 'tests'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ours)
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    build = 'import setuptools.build_meta as backend; backend.build_wheel("dist")'  # as pip does it, without an environment of its own
    subprocess.run((sys.executable, '-c', build), cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / 'dist').iterdir()
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if '.dist-info/' not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'padseg').rglob('*') if path.is_file()}
    expected = {name for name in package if '/__pycache__/' not in name and not name.startswith('padseg/bench/')}
    assert packed == expected
