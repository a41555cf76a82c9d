"""What a demo is asked for, and what may be served to whom."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from padseg.errors import UsageError
from padseg.images import Reading

PORT = 7860  # of Gradio, which Hugging Face's Spaces expect
LARGEST = 25_000_000  # pixels of a picture that is accepted
WORKED = 640_000  # pixels of the picture that regions are made for
MEGABYTES = 50  # of an upload
SECONDS = 120.0
DECODING = 10.0  # seconds of processor time
QUEUE = 8  # pictures that may wait
SESSIONS = 32  # pages whose pictures are kept in memory
HOUR = 3600  # seconds after which nothing of a picture is left
WORDS_SHOWN = 'animal, person, tree, water'  # names to begin with
WARNING = 'anybody who reaches this machine at {host} can use the demo'


class Settings(NamedTuple):
    """What a demo is asked for. host, port: where it listens; models: those of the picker, the first of which is chosen.

    device, dtype: as for `padseg.load`. max_pixels, max_seconds: limits of an uploaded picture and of a forward pass; shrink: regions are
    made for a picture of at most this many pixels. auth: a name and a password that the page asks for; public: whether anybody may use a
    page that other machines reach.
    """

    host: str = 'localhost'
    port: int = PORT
    models: tuple[str, ...] = ('tiny',)
    device: str | None = None
    dtype: str | None = None
    max_pixels: int = LARGEST
    shrink: int = WORKED
    max_seconds: float = SECONDS
    auth: tuple[str, str] | None = None
    public: bool = False

    @property
    def reading(self) -> Reading:
        """How an uploaded file is read."""
        return Reading(self.max_pixels, MEGABYTES * 1_000_000, shrink=self.shrink, max_seconds=DECODING)


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def warnings_for(settings: Settings) -> list[str]:
    """What to say about an address that others reach. Raises UsageError if nothing says who may use it."""
    if is_local(settings.host):
        return []
    if not (settings.auth or settings.public):
        raise UsageError(
            f'{WARNING.format(host=settings.host)}: add --auth NAME to ask for a password, or --public if that is what you want'
        )
    if settings.auth:
        return [f'other machines reach this demo at {settings.host}; the password crosses the network unencrypted, unless a proxy adds TLS']
    return [WARNING.format(host=settings.host)]
