"""The way back of a run whose numbers are no longer finite: to the last good checkpoint, past the data that did it."""

import jax
from ml_collections import ConfigDict

from clip_jax.checkpoint import Checkpoints
from clip_jax.distributed import is_first
from clip_jax.errors import UserError, warn
from clip_jax.state import TrainState
from clip_jax.step import Metrics

NOT_FINITE = "parameters or optimizer are not finite"


class Recovery:
    """Watches the skipped steps of a run.

    It reads the metrics of a step when the next one has started, so that no device waits for it.
    """

    def __init__(self, checkpoints: Checkpoints, abstract_state: TrainState, state: TrainState, config: ConfigDict):
        self.checkpoints, self.abstract_state, self.limits = checkpoints, abstract_state, config.nonfinite
        self.in_a_row = state.mishaps.skipped_in_a_row + 0  # a copy: the state is donated to the next step

    def after(self, state: TrainState, metrics: Metrics) -> TrainState:
        """The state after a step; a rolled-back one if those before it were skipped too often in a row, or one was not finite."""
        if not self.checkpoints.finite():
            return self.roll_back(state, NOT_FINITE)
        in_a_row, self.in_a_row = int(self.in_a_row), metrics["skipped_in_a_row"]
        if in_a_row < self.limits.in_a_row:
            return state
        return self.roll_back(state, f"{in_a_row} steps in a row had a loss or a gradient that is not finite")

    def save(self, state: TrainState, data_position: dict, loss: float, at_once: bool) -> TrainState:
        """Saves a state, as `Checkpoints.save` does; one that is not finite is rolled back: `at_once`, and saved, or after the next step."""
        self.checkpoints.save(state, data_position, loss, at_once)
        if at_once and not self.checkpoints.finite():
            state = self.roll_back(state, NOT_FINITE)
            self.checkpoints.save(state, data_position, loss, at_once)
        return state

    def roll_back(self, state: TrainState, reason: str) -> TrainState:
        """The model and optimizer of the last good checkpoint, instead of those of `state`; steps and samples count on."""
        where, done = f"step {int(state.step)}: {reason}", int(state.mishaps.rollbacks)
        advice = "lower config.optimizer.learning_rate, or look at the data of these steps"
        any_to_go_back_to = self.checkpoints.any()  # which waits for one that is being written
        if done >= self.limits.rollbacks:
            raise UserError(f"{where}, and config.nonfinite.rollbacks {self.limits.rollbacks} are used up; {advice}")
        if not any_to_go_back_to:
            raise UserError(f"{where}, and there is no checkpoint yet to go back to; {advice}")
        # Two states may not fit a device.
        jax.tree.map(lambda x: x.delete(), (state.params, state.batch_stats, state.optimizer))
        good, _ = self.checkpoints.restore(self.abstract_state, good=True)
        if is_first():
            warn(f"{where}; model and optimizer are those of step {int(good.step)} again, and the data goes on")
        mishaps = state.mishaps
        self.in_a_row = mishaps.skipped_in_a_row * 0
        mishaps = mishaps._replace(skipped_in_a_row=mishaps.skipped_in_a_row * 0, rollbacks=mishaps.rollbacks + 1)
        return good._replace(step=state.step, seen=state.seen, mishaps=mishaps)
