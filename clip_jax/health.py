"""How well the data is: what was skipped and why, whether that is too much, and what a run waits for."""

import collections
import dataclasses
import json
import pathlib

import jax

from clip_jax.errors import UserError, warn
from clip_jax.records import Place

ENOUGH = 1_000  # samples, before a share of bad ones is judged

Bad = tuple[Place, str, str]  # place, reason, message


@dataclasses.dataclass
class Report:
    """How a batch came about."""

    seen: int  # samples wanted
    bad: list[Bad] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"read": 0.0, "decode": 0.0})

    def nothing_good(self) -> str:
        """What is said where no good sample can be found."""
        reasons = collections.Counter(reason for _, reason, _ in self.bad)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"no good sample in {len(self.bad)} that were tried ({counts}); the first: {self.bad[0][2]}"


class Health:
    """Counts bad samples, writes each once into a ledger, and stops a run that has too many."""

    def __init__(self, ledger: pathlib.Path | None, max_bad: float):
        """Without a ledger they are counted alone.  `max_bad` is a share of the samples seen."""
        self.ledger, self.max_bad = ledger, max_bad
        self.seen, self.reasons = 0, collections.Counter()
        self.seconds = collections.Counter()
        rows = read_ledger(ledger) if ledger else []
        self.written = {(row["shard"], row["key"], row["reason"]) for row in rows}
        if rows:  # without a line that a kill left half-written
            beside = ledger.with_suffix(".new")
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            beside.replace(ledger)

    def broken(self, found: list[Bad]) -> None:
        """Takes note of what was broken before anything was read, and says so."""
        if found:
            reasons = collections.Counter(reason for _, reason, _ in found)
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            warn(f"{len(found)} samples or shards are damaged ({counts}) and left out; the first: {found[0][2]}")
        self._write(found)

    def record(self, report: Report) -> None:
        """Takes note of a batch.

        Raises:
          UserError: more than a share `max_bad` of all samples was bad.
        """
        self.seen += report.seen
        self.reasons.update(reason for _, reason, _ in report.bad)
        self.seconds.update(report.seconds)
        self._write(report.bad)
        if self.seen >= ENOUGH and sum(self.reasons.values()) > self.max_bad * self.seen:
            last = f"; the last: {report.bad[-1][2]}" if report.bad else ""
            raise UserError(
                f"{self.summary()}: more than the share {self.max_bad} of config.data.max_bad; mend them, or raise it{last}"
            )

    def summary(self) -> str:
        """A line on what was skipped, empty if nothing was."""
        bad = sum(self.reasons.values())
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        where = f"; {self.ledger} names them" if self.ledger else ""
        return f"skipped {bad} samples of {self.seen:,} ({counts}){where}" if bad else ""

    def _write(self, found: list[Bad]) -> None:
        new = {(*place, reason): message for place, reason, message in found if (*place, reason) not in self.written}
        if not new or self.ledger is None:
            return
        lines = [
            json.dumps({"shard": shard, "key": key, "reason": reason, "message": message}) + "\n"
            for (shard, key, reason), message in new.items()
        ]
        try:
            self.ledger.parent.mkdir(parents=True, exist_ok=True)
            with self.ledger.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{self.ledger}: cannot be written, {error.strerror}; make room, and the same command goes on") from error
        self.written |= set(new)


def ledger_of(workdir: pathlib.Path) -> pathlib.Path:
    """The file that names the samples that this process skipped."""
    return workdir / ("skipped.jsonl" if jax.process_count() == 1 else f"skipped-{jax.process_index()}.jsonl")


def read_ledger(file: pathlib.Path) -> list[dict]:
    """The rows of a ledger, none if there is no such file; a half-written last line is left out."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
