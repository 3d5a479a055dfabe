"""The function that a started rank runs. Each rank sets up its own device; it does not get one from the process that starts it."""

from collections.abc import Callable
from typing import Any, TypeVar

from swift_mega.device import device as devices

Result = TypeVar("Result")


def on_device(body: Callable[..., Result], first: Any, *rest: Any) -> Result:
    """Returns `body(first, device, *rest)`, with the device of the calling rank."""
    return body(first, devices.setup(), *rest)
