"""Looking at processes while something runs."""

from __future__ import annotations

import threading
import time

_adding = threading.Lock()


class Watch:
    """Looks, by `look`, when the block begins, every so many seconds within it, and when it ends."""

    every_s = 0.2
    spent_s = 0.0  # processor seconds of all looking, of which no program is to be charged

    def __enter__(self) -> Watch:
        self.look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        raise NotImplementedError

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            started = time.thread_time()
            self.look()
            with _adding:
                Watch.spent_s += time.thread_time() - started
