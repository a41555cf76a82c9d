"""Python's users see no advice of other libraries either, at the first use of a model with an empty cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_first_use_in_python_says_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith('_VERBOSITY')}
    ran = subprocess.run(
        [sys.executable, '-c', "import padseg; print(padseg.segment('data/images/coffee.jpg').labels.shape)"],
        cwd=ROOT,
        env={**environment, 'PADSEG_CACHE': str(tmp_path), 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, '(400, 600)\n', '')
    assert list((tmp_path / 'prompts').iterdir())  # the text encoders did run
