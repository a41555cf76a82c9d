"""Serve the page: its environment, its files, its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from padseg.demo.downloads import temporary_folder
from padseg.demo.models import offers
from padseg.demo.settings import MEGABYTES, SESSIONS, Settings, warnings_for
from padseg.errors import PadsegError, UsageError
from padseg.system.signals import Stop
from padseg.system.text import warn

SAMPLES = ((38, 256, 384), (41, 256, 384), (45, 300, 300))  # seed, height, width of scenes
POLL = 0.2  # seconds


def serve(settings: Settings, ready: Callable[[str], None] = lambda address: None) -> int | None:
    """Serve the page until a signal, and return the signal's number. ready: called with the address once the page can be opened.

    Sets variables of the environment that keep Gradio and the hub's client from asking other hosts. Raises UsageError for an address that
    others reach if nothing says who may use it, and without Gradio; PadsegError if the port is taken.
    """
    warn(*(f'warning: {line}' for line in warnings_for(settings)))
    with temporary_folder() as folder, Stop() as stop:
        os.environ |= {'HF_HUB_OFFLINE': '1', 'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_TEMP_DIR': str(folder / 'gradio')}
        try:
            from padseg.demo.page import page
        except ModuleNotFoundError as error:
            if error.name != 'gradio':
                raise
            raise UsageError("the demo needs Gradio: pip install 'padseg[demo]'") from error
        blocks = page(settings, offers(settings.models), write_samples(folder), folder)
        try:
            _, address, _ = blocks.launch(
                server_name=settings.host,
                server_port=settings.port,
                auth=settings.auth,
                share=False,
                inbrowser=False,
                max_file_size=f'{MEGABYTES}mb',
                allowed_paths=[],
                footer_links=[],
                show_error=False,
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                state_session_capacity=SESSIONS,
                prevent_thread_lock=True,
                quiet=True,
            )
        except OSError as error:
            raise PadsegError(f'cannot listen at {settings.host}, port {settings.port}: choose another --port') from error
        try:
            ready(address)
            while not stop.asked:
                time.sleep(POLL)
        finally:
            blocks.close(verbose=False)
    return stop.signal


def write_samples(folder: Path) -> list[Path]:
    """Draw the sample pictures."""
    from padseg.train.scenes import scene

    paths = []
    for number, (seed, height, width) in enumerate(SAMPLES, start=1):
        paths.append(folder / f'scene-{number}.png')
        PIL.Image.fromarray(scene(np.random.default_rng(seed), height, width).image).save(paths[-1])
    return paths
