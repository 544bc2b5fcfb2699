"""When the tokens of a running request are handed out: as soon as nothing they may begin would end the output."""

from __future__ import annotations

from typing import cast

import torch

from serving.batch import Batch, Choice, Seat
from serving.requests import Token
from serving.running import Running
from serving.tickets import Ticket
from tests.serving.engines import ask


class Snapshots:
    """Of a batch what a running request needs: states, and none of the model."""

    def snapshot(self, row: int) -> object:
        return object()


def running(*stop: tuple[int, ...]) -> tuple[Running, Batch]:
    request = ask(max_tokens=50, stop=stop)
    ticket = Ticket(request, seed=0, room=100, wake=lambda: None)
    return Running(ticket, Seat(request, torch.Generator(), 0, 0), 0, None, 0.0), cast(Batch, Snapshots())


def handed_out(request: Running) -> list[int]:
    """Takes the tokens that wait for their reader."""
    events = list(request.ticket._events)
    request.ticket._events.clear()
    assert all(isinstance(event, Token) for event in events)
    return [cast(Token, event).id for event in events]


def draw(request: Running, batch: Batch, token: int) -> list[int]:
    """Draws and reads a token; what was handed out by each of the two."""
    assert request.push(Choice(token, -1.0, 1.0, ()), batch) is None
    drawn = handed_out(request)
    assert request.was_read(None, batch) is None
    return [*drawn, -1, *handed_out(request)]


def test_a_token_that_begins_nothing_goes_out_when_it_was_read() -> None:
    request, batch = running((7, 8))
    assert draw(request, batch, 3) == [-1, 3]
    assert draw(request, batch, 4) == [-1, 4]


def test_a_beginning_is_held_until_it_is_none() -> None:
    request, batch = running((7, 8))
    assert draw(request, batch, 7) == [-1]
    assert draw(request, batch, 3) == [7, -1, 3]


def test_of_a_longer_beginning_only_what_may_still_match_is_held() -> None:
    request, batch = running((7, 7, 8))
    assert draw(request, batch, 7) == [-1]
    assert draw(request, batch, 7) == [-1]
    assert draw(request, batch, 7) == [7, -1]
    assert draw(request, batch, 5) == [7, 7, -1, 5]
