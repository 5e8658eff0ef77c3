"""A machine's life: its states, what moves it, and what may follow what."""

from __future__ import annotations

import enum

__all__ = ["LIFE", "LifeEvent", "LifeState"]


class LifeState(enum.Enum):
    """Where a machine is in its life."""

    NEW = "new"
    LOADED = "loaded"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"
    CLOSED = "closed"


class LifeEvent(enum.Enum):
    """What moves it."""

    LOAD = "load"
    RUN = "run"
    PAUSE = "pause"
    RESUME = "resume"
    END = "end"
    CLOSE = "close"


LIFE: dict[LifeState, dict[LifeEvent, LifeState]] = {
    LifeState.NEW: {LifeEvent.LOAD: LifeState.LOADED, LifeEvent.CLOSE: LifeState.CLOSED},
    LifeState.LOADED: {LifeEvent.RUN: LifeState.RUNNING, LifeEvent.CLOSE: LifeState.CLOSED},
    LifeState.RUNNING: {LifeEvent.PAUSE: LifeState.PAUSED, LifeEvent.END: LifeState.ENDED},
    LifeState.PAUSED: {LifeEvent.RESUME: LifeState.RUNNING, LifeEvent.END: LifeState.ENDED},
    LifeState.ENDED: {LifeEvent.CLOSE: LifeState.CLOSED},
    LifeState.CLOSED: {LifeEvent.CLOSE: LifeState.CLOSED},
}
