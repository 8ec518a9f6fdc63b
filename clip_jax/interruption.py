"""Ctrl-C, and the SIGTERM of a scheduler or of a machine that goes away, put off until a step is over."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Inside, a signal only asks to stop; a second Ctrl-C ends the process at once.

    Of several processes one that is asked is enough: JAX tells the others, and chooses the step after which all stop.
    """

    def __enter__(self) -> "Interruption":
        self.asked = False
        self.several = jax.distributed.is_initialized()
        # JAX listens to SIGTERM itself where it connects processes.
        handlers = {signal.SIGINT: self._interrupt} | ({} if self.several else {signal.SIGTERM: self._terminate})
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; alike on all processes, each of which has to ask after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.several else self.asked

    def _interrupt(self, *_) -> None:
        # The kernel's own: Python's would wait for a compilation, and then for a checkpoint.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; Ctrl-C once more ends at once\n")
        if self.several:
            signal.raise_signal(signal.SIGTERM)
        self.asked = True

    def _terminate(self, *_) -> None:
        self.asked = True
