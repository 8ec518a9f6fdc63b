"""Batches made ahead of time, by a thread or by processes, in the same order either way."""

import multiprocessing
import os
import signal
import threading
from typing import Any

import grain
from absl import flags


def made_ahead(source: Any, batches: int, workers: int) -> grain.DatasetIterator:
    """The batches of a source with random access.

    Args:
      source: picklable if there are workers, each of which makes every so-manieth batch of it.
      batches: how many are made ahead, by each worker if there are any; 0: each when it is needed.
      workers: processes; 0: a thread of this one.
    """
    dataset = grain.MapDataset.source(source)
    if not workers:
        options = grain.ReadOptions(num_threads=1 if batches else 0, prefetch_buffer_size=max(1, batches))
        return iter(dataset.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # Grain looks at flags of its own, which no command line of ours has
        flags.FLAGS.mark_as_parsed()
    by_itself = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, batches))
    return iter(dataset.to_iter_dataset(by_itself).mp_prefetch(processes, worker_init_fn=_begin))


def _begin(index: int, count: int) -> None:
    """Signals are for the run, which stops its workers when it has saved; if it is killed, they go with it."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
