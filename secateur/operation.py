"""An operation on a server: a prune that outlives the call which started it."""

from __future__ import annotations

import datetime
import enum

from pydantic import BaseModel, ConfigDict

from secateur.errors import Cancelled, Refusal, SecateurError, ServerError, raised
from secateur.report import Progress


class State(enum.StrEnum):
    """Where an operation stands."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def done(self) -> bool:
        """Whether it stays so."""
        return self not in (State.QUEUED, State.RUNNING)


class Operation(BaseModel):
    """How an operation stood when the server was asked. All times are UTC.

    Attributes:
        name: what the server calls it: `operations/…`.
        state: where it stands.
        progress: the latest step, while it runs.
        queue_position: how many wait in front of it, while it waits.
        attempts: how often it was given to a worker; 0 when its result was known from before.
        create_time: when it came.
        start_time: when its latest attempt began.
        end_time: when it ended.
        expire_time: when the server forgets it, once it has ended.
        estimated_end_time: when it will end, where the server can tell.
        error: why it failed, for people; empty unless it did.
        refusal: why it failed, where the model or the recipe is the reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: State
    progress: Progress | None = None
    queue_position: int | None = None
    attempts: int = 0
    create_time: datetime.datetime
    start_time: datetime.datetime | None = None
    end_time: datetime.datetime | None = None
    expire_time: datetime.datetime | None = None
    estimated_end_time: datetime.datetime | None = None
    error: str = ""
    refusal: Refusal | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.state.done

    @property
    def failure(self) -> SecateurError | None:
        """What a prune that ended like this raises; None unless it failed or was cancelled."""
        if self.refusal is not None:
            return raised(self.refusal)
        if self.state is State.CANCELLED:
            return Cancelled(f"{self.name} was cancelled")
        return ServerError(f"{self.name}: {self.error}") if self.state is State.FAILED else None
