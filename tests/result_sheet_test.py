"""bin/result-sheet: the picture at the top of the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent


def result_sheet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / 'bin/result-sheet', *arguments], capture_output=True, text=True)


def test_result_sheet_shows_pictures_and_overlays(tmp_path):
    for path in (ROOT / 'data/images').rglob('*.*'):
        red = np.zeros_like(cv2.imread(str(path)))
        red[..., 2] = 255
        target = tmp_path / 'out/overlays' / f'{path.relative_to(ROOT / "data/images")}.jpg'
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), red)
    ran = result_sheet(tmp_path / 'out', tmp_path / 'sheet.jpg')
    assert ran.returncode == 0, ran.stderr
    sheet = cv2.imread(str(tmp_path / 'sheet.jpg')).astype(int)
    assert sheet.shape[1] == 1000
    red_share = (np.abs(sheet - (0, 0, 255)).max(2) < 30).mean()
    assert 0.45 < red_share < 0.5
    chosen = [f'scene-{number}.png' for number in (22, 38, 41)]
    ran = result_sheet(tmp_path / 'out', tmp_path / 'one.jpg', ROOT / 'data/images', *chosen)
    assert ran.returncode == 0, ran.stderr
    one = cv2.imread(str(tmp_path / 'one.jpg')).astype(int)
    assert one.shape[1] == 1000 and one.shape[0] < sheet.shape[0]
    assert 0.45 < (np.abs(one - (0, 0, 255)).max(2) < 30).mean() < 0.5


def test_result_sheet_says_what_is_missing(tmp_path):
    ran = result_sheet(tmp_path, tmp_path / 'sheet.jpg')
    assert ran.returncode == 1
    assert ran.stderr == f'cannot read the picture {tmp_path}/overlays/coffee.jpg.jpg\n'
    assert result_sheet().returncode == 1


def test_result_picture_is_small():
    assert (ROOT / 'data/result.jpg').stat().st_size <= 300_000
