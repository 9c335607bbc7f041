"""Tokens on their way from the threads that draw them to the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rlhf.inference.service import Drawn
from rlhf.serving.app import Mail


def test_a_token_that_comes_while_the_server_ends_breaks_no_model() -> None:
    class Ending:
        """Open when it is asked, closed when it is called."""

        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, _: Any) -> None:
            raise RuntimeError("Event loop is closed")

    async def boxed() -> Callable[[Drawn], None]:
        return mail.box(asyncio.Queue())

    mail = Mail()
    drop = asyncio.run(boxed())
    mail.loop = Ending()  # type: ignore[assignment]
    drop(Drawn(5, -1.0, None))
    assert not mail.on_its_way, "a server that begins anew hears of the next"
