"""Break a run at random, again and again: it must end as one that nobody disturbed.

    python benchmarks/chaos.py --events 30 --sizes 2      the world size stays: equal bit for bit
    python benchmarks/chaos.py --events 30 --sizes 1,2    it changes from start to start: equal to rounding, which is
                                                          to say as near to the undisturbed runs as these, made by one
                                                          and by two ranks, are to each other (times three)

An event is a kill -9 of all ranks or of one, a SIGTERM, a SIGUSR1, a STOP file, or a kill followed by damage to the
newest checkpoint: a flipped bit, a lost end, a missing file. They fall anywhere: at start-up, in a step, in a save.
"""

import argparse
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmd_scale.checkpoints import find_checkpoint, load_weights, step_of, whole_checkpoints
from vmd_scale.provenance import provenance
from vmd_scale.training.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "data.row_length=32",
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "latent.width=8",
    "training.global_batch=8",
    "training.micro_batch=4",
    "training.checkpoint_every=10",
    "training.precision=fp32",
    "evaluation.every=null",
    "telemetry.log_every=1",
)
STOPS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "STOP file": None}
KILLS = ("kill -9 of all", "kill -9 of one")
DAMAGES = ("flipped bit", "lost end", "missing file")


@dataclass
class Tally:
    events: dict[str, int] = field(default_factory=dict)
    steps_lost: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--sizes", default="1,2", help="numbers of ranks, one of which is taken at each start")
    parser.add_argument("--steps", type=int, default=1500, help="of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--json", type=Path, help="write the result")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    choice = random.Random(args.seed)
    tally = Tally()
    quiet = [args.folder / f"undisturbed-{size}" for size in sizes]
    broken = args.folder / f"disturbed-{args.sizes}"
    for folder, size in zip(quiet, sizes, strict=True):
        run_to_end(folder, args.steps, size)
    while sum(tally.events.values()) < args.events:
        if not disturb(broken, args.steps, choice, choice.choice(sizes), tally):
            raise SystemExit(f"the run came to its end after {sum(tally.events.values())} events; take more --steps")
        print(f"{sum(tally.events.values())}/{args.events}: {tally.steps_lost[-1]} steps lost", file=sys.stderr)
    run_to_end(broken, args.steps, max(sizes))
    report = compare(quiet, broken) | {
        "events": tally.events,
        "steps_lost": sum(tally.steps_lost),
        "most_steps_lost_by_one": max(tally.steps_lost),
        "steps": args.steps,
        "sizes": sizes,
        **provenance(),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(not report["same"])


class Ranks:
    """The ranks of a pretrain.py, started without a launcher, so that nothing stands between them and a signal."""

    def __init__(self, folder: Path, steps: int, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = [*SETTINGS, f"training.steps={steps}", f"data.shards={json.dumps(str(folder.parent / 'shards'))}"]
        command = [sys.executable, __file__, "--rank", "--config", str(ROOT / "configs" / "quickstart.json")]
        command += ["--output", str(folder), *(part for setting in settings for part in ("--set", setting))]
        names = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(os.cpu_count()), "MASTER_ADDR": "127.0.0.1"}
        names |= {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self.processes = []
        with open(folder / "output.txt", "ab") as output:
            for rank in range(size):
                environment = {**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment["CHAOS_ROWS"] = str(folder / "rows.jsonl")
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )

    def wait(self, timeout: float) -> list[int]:
        """Exit codes. A rank that has lost its peers may wait for them: after the timeout it is killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in self.processes]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)


def as_rank() -> None:
    """pretrain.py, with a record of the rows that every step was made of."""
    from vmd_scale.training.loop import Trainer

    prepare, make_step = Trainer._prepare, Trainer._step
    read: dict[int, list] = {}  # by the loader, ahead of the steps

    def prepare_and_remember(self, step, batch):
        read.setdefault(step, []).append([step, batch.positions.tolist(), batch.rows.tolist()])
        return prepare(self, step, batch)

    def step_and_record(self, step, *arguments):
        result = make_step(self, step, *arguments)
        with open(os.environ["CHAOS_ROWS"], "a") as file:
            file.writelines(json.dumps(batch) + "\n" for batch in read.pop(step))
        return result

    Trainer._prepare, Trainer._step = prepare_and_remember, step_and_record
    sys.argv = [str(ROOT / "launchers" / "pretrain.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_to_end(folder: Path, steps: int, size: int) -> None:
    codes = Ranks(folder, steps, size).wait(timeout=3600)
    if any(codes):
        raise SystemExit(f"{folder} ended with exit codes {codes}; see {folder / 'output.txt'}")


def disturb(folder: Path, steps: int, choice: random.Random, size: int, tally: Tally) -> bool:
    """Start the run, break it at a random moment. Returns false if it came to its end before."""
    began = last_step(folder)
    ranks = Ranks(folder, steps, size)
    if choice.random() < 0.15:  # at start-up
        time.sleep(choice.uniform(0.5, 8))
    else:
        wanted = steps_in(folder) + choice.randint(1, 40)
        while ranks.alive and steps_in(folder) < wanted:
            time.sleep(0.01)
    if not ranks.alive and not any(process.poll() for process in ranks.processes):
        return False
    event = choice.choice([*STOPS, *KILLS, *DAMAGES])
    if event in STOPS:
        stop(ranks, folder, STOPS[event], choice)
    else:
        victims = [choice.choice(ranks.processes)] if event == "kill -9 of one" else ranks.processes
        for process in victims:
            process.kill()
        ranks.wait(timeout=30)
    reached = max(began, last_step(folder))
    if event in DAMAGES and whole_checkpoints(folder / "checkpoints")[1:]:  # never the only one
        damage(find_checkpoint(folder), event, choice)
    kept = whole_checkpoints(folder / "checkpoints")
    from_step = step_of(kept[-1]) if kept else 0
    tally.events[event] = tally.events.get(event, 0) + 1
    tally.steps_lost.append(max(0, reached - from_step))
    return True


def stop(ranks: Ranks, folder: Path, number: signal.Signals | None, choice: random.Random) -> None:
    if number is None:
        (folder / "STOP").touch()
    else:
        choice.choice(ranks.processes).send_signal(number)
    ranks.wait(timeout=60)


def damage(checkpoint: Path, how: str, choice: random.Random) -> None:
    path = choice.choice(sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json"))
    if how == "missing file":
        path.unlink()
    elif how == "lost end":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        path.write_bytes(content)


def records(folder: Path) -> Iterator[dict]:
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # torn by a kill
            continue


def steps_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_step(folder: Path) -> int:
    return max((record["step"] for record in records(folder)), default=0)


def compare(quiet: list[Path], broken: Path) -> dict[str, object]:
    """Final weights, losses of all steps, and the rows of all steps."""
    drift = [difference(quiet[0], other) for other in quiet[1:]]
    weights, losses = difference(quiet[0], broken)
    of_weights, of_losses = (max((d[n] for d in drift), default=0.0) for n in (0, 1))
    rows_equal = rows_of(broken) == rows_of(quiet[0])
    return {
        "same": rows_equal and weights <= 3 * of_weights and losses <= 3 * of_losses,
        "largest_difference_of_weights": weights,
        "largest_difference_of_losses": losses,
        "the_same_between_undisturbed_runs": [of_weights, of_losses],
        "rows_equal": rows_equal,
    }


def difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest of any weight, and of any step's loss; infinite if a step is missing."""
    ours, theirs = (load_weights(find_checkpoint(folder), "ema") for folder in (one, other))
    losses = [[record["loss"] for record in records(folder)] for folder in (one, other)]
    weights = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    if len(losses[0]) != len(losses[1]):
        return weights, float("inf")
    return weights, max(abs(a - b) for a, b in zip(*losses, strict=True))


def rows_of(folder: Path) -> dict[int, dict[int, int]]:
    """For every step, position in the global batch -> row, as read by whichever ranks made it."""
    steps: dict[int, dict[int, int]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        try:
            step, positions, rows = json.loads(line)
        except ValueError:
            continue
        steps.setdefault(step, {}).update(zip(positions, rows, strict=True))
    return steps


if __name__ == "__main__":
    as_rank() if sys.argv[1:2] == ["--rank"] else main()
