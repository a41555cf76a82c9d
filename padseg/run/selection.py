"""Select the pictures that a run processes: name patterns, shards, a limit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol, TypeVar

from padseg.errors import UsageError


class Named(Protocol):
    """What has a name in an output folder, such as a picture."""

    @property
    def name(self) -> str: ...


T = TypeVar('T', bound=Named)


class Selection(NamedTuple):
    """Which pictures to process. include, exclude: name patterns such as `*.jpg` or `cats/*`, where * also matches slashes.

    shard: (i, N), i from 1; limit: keep only the first `limit` of the remaining pictures, or None.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    limit: int | None = None


def select(pictures: Sequence[T], selection: Selection) -> list[T]:
    """Return the pictures that are included, not excluded, in the shard and within the limit, in their order."""
    chosen = [picture for picture in pictures if wanted(picture.name, selection) and in_shard(picture.name, selection.shard)]
    return chosen if selection.limit is None else chosen[: selection.limit]


def wanted(name: str, selection: Selection) -> bool:
    included = not selection.include or any(fnmatchcase(name, pattern) for pattern in selection.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in selection.exclude)


def in_shard(name: str, shard: tuple[int, int] | None) -> bool:
    """Return whether a picture is in shard i of N. Only its name counts, so that shards need not know of each other or of new pictures."""
    if shard is None:
        return True
    digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
    return int.from_bytes(digest[:8], 'big') % shard[1] == shard[0] - 1


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse `2/4` to (2, 4). UsageError unless 1 <= i <= N."""
    if text is None:
        return None
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f'a shard is i/N with 1 <= i <= N, such as 2/4; got {text}')
    return int(match[1]), int(match[2])
