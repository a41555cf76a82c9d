"""The bar of a download, which the hub's client draws on a terminal."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm

RECEIVED = 'huggingface_hub.snapshot_download.transfer'  # the hub's names of its bars
WRITTEN = 'huggingface_hub.snapshot_download'


class DownloadBar(tqdm):
    """The hub's bars, of bytes and of files, in plain words and with the time left. They do not stay.

    The bar of bytes received is left out: it shows what the one of bytes written shows.
    """

    def __init__(self, *arguments: Any, name: str | None = None, **options: Any) -> None:
        self.counts_bytes = name in (RECEIVED, WRITTEN)
        if self.counts_bytes:
            options |= {'desc': 'Downloading', 'bar_format': None}
        hidden = name == RECEIVED or options.get('disable')
        super().__init__(*arguments, name=name, **options | {'leave': False, 'disable': hidden or None})  # None: only on a terminal

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """The hub changes the words of its bars of bytes when all is done, and leaves them open."""
        if self.counts_bytes:
            self.close()
        else:
            super().set_description(desc, refresh)
