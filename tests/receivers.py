"""What the tests of alerts share: channels that end in this process, a table of TOML, and time that
passes while alerts are sent.

A channel tests://NAME is a plugin of Apprise's own making (apprise.decorators): what Larm sends to
it is taken by the Phone of that name, without a socket.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import apprise
from apprise.decorators import notify
from conftest import House

from larm import SECOND


@dataclass(frozen=True)
class Message:
    title: str
    body: str
    type: str  # of Apprise's: failure, success, warning, info


@dataclass
class Phone:
    """The other end of tests://NAME. `answer`: whether it accepts, or a function that says so; it
    may wait or raise.
    """

    name: str = "phone"
    answer: bool | Callable[[], bool] = True
    messages: list[Message] = field(default_factory=list)  # accepted ones
    tries: int = 0
    hanging: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if (before := PHONES.get(self.name)) is not None:
            before.hanging.set()
        PHONES[self.name] = self

    @property
    def url(self) -> str:
        return f"tests://{self.name}"

    def hang(self) -> bool:
        """An answer that never comes, as far as a test can tell."""
        self.hanging.wait(60)
        return False

    def titles(self) -> list[str]:
        return [message.title for message in self.messages]

    def bodies(self) -> list[str]:
        return [message.body for message in self.messages]

    def take_all(self) -> list[str]:
        """The titles of what came since the last time that somebody asked."""
        titles = self.titles()
        self.messages.clear()
        return titles


PHONES: dict[str, Phone] = {}


@notify(on="tests")
def _take(body: str, title: str, notify_type: str, *_: Any, meta: dict[str, Any],
          **__: Any) -> bool:
    phone = PHONES[meta["host"]]
    phone.tries += 1
    accepted = phone.answer() if callable(phone.answer) else phone.answer
    if accepted:
        phone.messages.append(Message(title, body, notify_type))
    return accepted


def service(url: str) -> type[apprise.NotifyBase]:
    """The class of Apprise's that sends to a URL: its limits are attributes."""
    return type(apprise.Apprise.instantiate(url))


def channels(*phones: Phone, **urls: str | list[str]) -> str:
    named = {phone.name: phone.url for phone in phones} | urls
    return "[channels]\n" + "".join(
        f"{name} = {json.dumps(value)}\n" for name, value in named.items()
    )


def monitor(key: str = "job", interval: str = "1m", grace: str = "10s", **more: object) -> str:
    settings = {"interval": interval, "grace": grace, **more}
    return f"[monitors.{key}]\n" + "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()
    )


def ping_all(house: House, action: str = "") -> None:
    """Every monitor pings, in the same moment, in the file's order."""
    house.tokens |= {one["id"]: one["ping_url"].rpartition("/")[2]
                     for one in house.api("monitors")}
    for key in house.larm.config.monitors:
        house.ping(key, action)


def live(house: House, ms: int = 4 * SECOND, step: int = 5 * SECOND,
         pings: Iterable[str] = ()) -> None:
    """Let time pass and send what is due after each step; these monitors ping before each."""
    end = house.clock.monotonic_ms + ms
    while house.clock.monotonic_ms < end:
        house.clock.advance(min(step, end - house.clock.monotonic_ms))
        for key in pings:
            house.ping(key)
        house.tick()  # which also sees that the last message is through
        house.deliver()


def deliveries(house: House, channel: str = "phone", key: str | None = None
               ) -> list[dict[str, Any]]:
    """The deliveries of all events to a channel, oldest first."""
    return [one for event in house.events(key) for one in event["deliveries"]
            if one["channel"] == channel]


def states(house: House, channel: str = "phone", key: str | None = None) -> list[str]:
    return [one["state"] for one in deliveries(house, channel, key)]
