"""Says which shards a run waits for when no batch comes."""

import sys
import threading
import time
import weakref
from collections.abc import Callable

import jax


class Watchdog:
    """`with watchdog:` around what may stall.  One thread looks, for as long as there is somebody who may wait."""

    def __init__(self, reading: Callable[[], list[str]], seconds: float):
        """Says, whenever `seconds` have gone by inside, what `reading`, a method that is not kept alive, then gives."""
        self.reading, self.seconds = weakref.WeakMethod(reading), seconds
        self.since: float | None = None
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.since = time.monotonic()

    def __exit__(self, *_) -> None:
        self.since = None

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        said_for, times = None, 0
        while not self.closed.wait(min(1.0, self.seconds / 4)):
            since, reading = self.since, self.reading()
            if reading is None:
                return
            if since != said_for:
                said_for, times = since, 0
            if since is not None and time.monotonic() - since >= (times + 1) * self.seconds:
                times += 1
                shards = ", ".join(reading()[:5]) or "no shard: decoding, or other threads, take the time"
                waited = f"host {jax.process_index()}: no batch for {times * self.seconds:.3g} s"
                print(f"{waited}; it reads {shards}", file=sys.stderr, flush=True)
