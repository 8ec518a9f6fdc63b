"""Whether a run's memory stays flat: train.py on tars, a hundredth of whose samples is broken, for half an hour at full speed.

    python benchmarks/soak.py [MINUTES]

Writes benchmarks/results/soak.{md,png}.  Memory is what the run and its workers have for themselves, and their part of what they share
(PSS of /proc/PID/smaps_rollup), every five seconds; the slope is fitted to all but the first five minutes.
"""

import io
import json
import pathlib
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import simplejpeg

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SAMPLES, SHARDS, EVERY = 20_000, 10, 5.0
RUN = ["--config.data.caption=caption", "--config.data.group=", "--config.data.keywords=", "--config.data.cache=False"]
RUN += ["--config.data.workers=1", "--config.data.threads=2", "--config.data.max_bad=0.05"]
RUN += ["--config.batch_size=64", "--config.total_steps=1000000", "--config.checkpoint_every=500"]


def make_tars(folder: pathlib.Path) -> str:
    """JPEGs of smooth noise, one of a hundred cut short."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 32, 24, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    pictures = [simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90) for pixels in coarse]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i in range(shard, SAMPLES, SHARDS):
                picture = pictures[i % len(pictures)][: 500 if i % 100 == 7 else None]
                for ending, data in (("jpg", picture), ("txt", f"picture number {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00..{SHARDS - 1:02}}}.tar"


def memory(parent: int) -> dict[str, float]:
    """MiB of a process, and of those that it began."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pids = [int(pid) for pid, ppid in map(str.split, listed.splitlines()) if int(ppid) == parent]
    found = {"run": 0.0, "workers": 0.0}
    for name, pid in (("run", parent), *(("workers", pid) for pid in pids)):
        try:
            rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            found[name] += int(rollup.partition("\nPss:")[2].split()[0]) / 1024
        except OSError:  # ended
            pass
    return found


def main(minutes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        command = [sys.executable, str(ROOT / "train.py"), f"--workdir={place / 'run'}", f"--config.data.sets={make_tars(place)}", *RUN]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun, rows = time.monotonic(), []
        while time.monotonic() < begun + 60 * minutes:
            time.sleep(EVERY)
            if process.poll() is not None:
                sys.exit(f"the run ended by itself, with status {process.returncode}")
            rows.append({"minutes": (time.monotonic() - begun) / 60} | memory(process.pid))
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        records = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        skipped = len((place / "run" / "skipped.jsonl").read_text().splitlines())
    write(rows, records, skipped, status)


def write(rows: list[dict], records: list[dict], skipped: int, status: int) -> None:
    at, total = np.array([row["minutes"] for row in rows]), np.array([row["run"] + row["workers"] for row in rows])
    late = at > 5
    slope = np.polyfit(at[late], total[late], 1)[0] * 60
    axes = plt.figure(figsize=(8, 3.5), layout="constrained").subplots()
    for name in ("run", "workers"):
        axes.plot(at, [row[name] for row in rows], label=name)
    axes.plot(at, total, label="both", color="black")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None), title="Memory of a run and of its worker")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.2))
    axes.figure.savefig(RESULTS / "soak.png", dpi=100)
    speed = np.median([record["samples_per_second"] for record in records])
    wait = np.median([record["data_wait"] for record in records])
    table = "\n".join(
        f"| {m:.0f} | {total[np.abs(at - m).argmin()]:,.0f} |" for m in (1, 5, 10, 15, 20, 25, 30) if m <= at[-1] + 0.1
    )
    (RESULTS / "soak.md").write_text(
        f"""# Half an hour at full speed

`python benchmarks/soak.py`, {platform.machine()}, two cores, Python {platform.python_version()}, jax {jax.__version__}: {at[-1]:.0f} minutes,
{records[-1]["step"]:,} steps, {records[-1]["samples_seen"]:,} samples ({records[-1]["samples_seen"] / SAMPLES:.1f} passes), {speed:,.0f} samples/s,
data wait {wait:.1%} (medians); {skipped} of {SAMPLES:,} samples broken, each skipped in every pass and written down once; ended by SIGTERM
with status {status}.

![memory](soak.png)

From the fifth minute on memory grows by {slope:+.0f} MiB an hour (fitted), and stays between {total[late].min():,.0f} and {total[late].max():,.0f} MiB.

| minute | MiB |
|---|---|
{table}
"""
    )


if __name__ == "__main__":
    if len(sys.argv) > 1 and float(sys.argv[1]) < 6:
        sys.exit("expected at least 6 minutes, of which the first five are not fitted")
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0)
