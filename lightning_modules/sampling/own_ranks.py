"""Hides the ranks of a training job from the engines that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_RANKS = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
}
_LAUNCHER = ("TORCHELASTIC_", "PET_")


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what torchrun and Lightning say of a process's rank.

    An engine makes process groups of its own. With TORCHELASTIC_USE_AGENT_STORE, say, each of its processes would be a
    client of a store that nobody serves, and wait for ever.

    Args:
        environment: Of the training process.

    >>> without_ranks({"HOME": "/root", "RANK": "3", "TORCHELASTIC_RUN_ID": "a"})
    {'HOME': '/root'}
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in _RANKS and not name.startswith(_LAUNCHER)
    }


@contextmanager
def ranks_hidden() -> Iterator[None]:
    """Take these variables out of this process's environment, for an engine that is started from it."""
    before = dict(os.environ)
    hidden = {name: before[name] for name in before.keys() - without_ranks(before).keys()}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
