"""Log messages that clients could bring about by the thousand."""

import logging
import time

QUIET_SECONDS = 60.0


class Sparing:
    """Warns once, and then again only after a minute, saying how often it kept quiet."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._quiet_until = 0.0
        self._num_held = 0

    def warning(self, message: str) -> None:
        """Logs the message, or counts it."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._num_held += 1
            return
        again = f" ({self._num_held:,} times more in the last minutes)" if self._num_held else ""
        self._logger.warning("%s%s", message, again)
        self._quiet_until, self._num_held = now + QUIET_SECONDS, 0
