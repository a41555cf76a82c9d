"""Digests of scenes, for comparing them between processes."""

from __future__ import annotations

import hashlib

import numpy as np

from padseg.train.scenes import scene


def digest(seed: int) -> str:
    made = scene(np.random.default_rng(seed), 70, 90)
    return hashlib.sha256(made.image.tobytes() + made.labels.tobytes() + made.caption.encode()).hexdigest()
