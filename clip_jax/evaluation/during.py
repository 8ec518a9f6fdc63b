"""Evaluation in the middle of a run: every so many minutes, on all devices."""

import time
from typing import Any

from ml_collections import ConfigDict

from clip_jax.distributed import first_says, on_every_host
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.results import BESIDE
from clip_jax.evaluation.sets import check_here
from clip_jax.evaluation.tasks import Measurement
from clip_jax.step import model_of


class Evaluations:
    """Measures a run's model on `config.evaluate.tasks`, whenever `config.evaluate.minutes` have gone by."""

    def __init__(self, config: ConfigDict):
        self.config, self.begun, self.encoder = config, time.monotonic(), None
        for task in config.evaluate.tasks if config.evaluate.minutes else ():
            if task != "emoji":
                check_here(task, config.evaluate.data_dir or None)  # before the run and not in its middle

    def due(self, step: int) -> bool:
        """Whether to measure after this step, by the clock of the first process, which is asked where steps are logged."""
        minutes = self.config.evaluate.minutes
        return bool(minutes) and step % self.config.log_every == 0 and first_says(time.monotonic() - self.begun >= 60 * minutes)

    def measure(self, params: Any, batch_stats: Any) -> dict[str, float]:
        """Metrics by `SET/NAME`, of a state's parameters and statistics, wherever they lie; all processes have to ask."""
        model = model_of(on_every_host((params, batch_stats)), self.config)
        if self.encoder is None:
            self.encoder = Encoder(model)
        else:
            self.encoder.take(model)  # what is compiled stays
        measurement, found = Measurement(self.encoder, model.config.name, "", self.config.evaluate.data_dir or None), {}
        for task in self.config.evaluate.tasks:
            for record, _ in measurement.of(task):
                shares = {name: value for name, value in record["metrics"].items() if not name.endswith(BESIDE)}
                found |= {f"{record['dataset']}/{name}": value for name, value in shares.items()}
        self.begun = time.monotonic()
        return found
