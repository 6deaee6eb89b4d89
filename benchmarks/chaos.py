"""Fault injection: kill, stop and damage a run at random; it must end as one that nobody disturbed.

    python benchmarks/chaos.py --events 30 --sizes 2      the world size stays: equal bit for bit
    python benchmarks/chaos.py --events 30 --sizes 1,2    it changes from start to start: equal to rounding, which is
                                                          to say as near to the undisturbed runs as these, made by one
                                                          and by two ranks, are to each other (times three)

An event is a kill -9 of all ranks or of one, a SIGTERM, a SIGUSR1, a STOP file, or a kill followed by damage to the
newest checkpoint: a flipped bit, a lost end, a missing file, and each of these to its manifest. They fall anywhere: at
start-up, in a step, in a save. Kinds are drawn without replacement, so that all occur.

A rank that ends by itself, or that is asked to stop while it trains and does not exit with code 75, ends the test.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from comparing import Report, table

from vmd_scale import checkpoints
from vmd_scale.checkpoints import MANIFEST, find_checkpoint, load_weights, whole_checkpoints
from vmd_scale.training.launch import free_port
from vmd_scale.training.preemption import STOPPED_EXIT_CODE

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
ONE = "kill -9 of one"
KILLS = ("kill -9 of all", ONE)
DAMAGES = ("flipped bit", "lost end", "missing file")
MANIFESTS = {f"{damage} (manifest)": damage for damage in DAMAGES}
KINDS = (*STOPS, *KILLS, *DAMAGES, *MANIFESTS)


@dataclass
class Tally:
    """What has happened to the run.

    Attributes:
        events: number of each kind.
        at_start_up: events that came before the first step of their start.
        steps_lost: made again, at each start that made steps.
        reached: the furthest step that was made since the last of them.
    """

    events: dict[str, int] = field(default_factory=dict)
    at_start_up: int = 0
    steps_lost: list[int] = field(default_factory=list)
    reached: int = 0

    def started_from(self, step: int) -> None:
        self.steps_lost.append(max(0, self.reached - step))
        self.reached = step


class Deck:
    """Kinds of events: each once in random order, and again."""

    def __init__(self, kinds: list[str], choice: random.Random) -> None:
        self._kinds, self._choice, self._left = kinds, choice, list[str]()

    def deal(self, possible: Callable[[str], bool]) -> str:
        """The next that is possible; those passed over come later."""
        if not any(possible(kind) for kind in self._left):
            self._left += self._choice.sample(self._kinds, len(self._kinds))
        kind = next(kind for kind in self._left if possible(kind))
        self._left.remove(kind)
        return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--sizes", default="1,2", help="numbers of ranks, one of which is taken at each start")
    parser.add_argument("--steps", type=int, default=1500, help="of the run")
    parser.add_argument("--kinds", help="of events, by commas; default: all")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.json", help="of the tiny run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--json", type=Path, help="write the result")
    args = parser.parse_args()
    page = Report(__doc__, args.json)
    sizes = [int(size) for size in args.sizes.split(",")]
    kinds = args.kinds.split(",") if args.kinds else [kind for kind in KINDS if kind != ONE or max(sizes) > 1]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(unknown)}; allowed: {', '.join(KINDS)}")
    choice = random.Random(args.seed)
    tally, deck = Tally(), Deck(kinds, choice)
    quiet = [args.folder / f"undisturbed-{size}" for size in sizes]
    broken = args.folder / f"disturbed-{args.sizes}"
    for folder, size in zip(quiet, sizes, strict=True):
        run_to_end(Start(folder, args.config, args.steps, size))
    for number in range(args.events):
        can_damage = len(sound(broken)) > 1  # never the only one
        event = deck.deal(lambda kind, can=can_damage: can or kind not in (*DAMAGES, *MANIFESTS))
        size = choice.choice([size for size in sizes if event != ONE or size > 1])
        if not disturb(Start(broken, args.config, args.steps, size), event, choice, tally):
            raise SystemExit(f"the run came to its end after {number} events; take more --steps")
        print(f"{number + 1}/{args.events}: {event}; step {tally.reached}", file=sys.stderr)
    run_to_end(Start(broken, args.config, args.steps, max(sizes)), tally)
    report = compare(quiet, broken) | {
        "events": tally.events,
        "at_start_up": tally.at_start_up,
        "steps_lost": sum(tally.steps_lost),
        "most_steps_lost_at_once": max(tally.steps_lost),
        "steps": args.steps,
        "sizes": sizes,
    }
    page.add("chaos", report, as_table(report))
    sys.exit(not report["same"])


def as_table(report: dict[str, object]) -> str:
    """The kinds of events in lines of their own."""
    events = report["events"]
    assert isinstance(events, dict)
    plain = [(key.replace("_", " "), json.dumps(value)) for key, value in report.items() if key != "events"]
    return table(("", ""), [*events.items(), ("events", sum(events.values())), *plain])


@dataclass(frozen=True)
class Start:
    """Which run, to which step, on how many ranks."""

    folder: Path
    config: Path
    steps: int
    size: int


class Ranks:
    """The ranks of a pretrain.py, started without a launcher, so that nothing stands between them and a signal."""

    def __init__(self, start: Start) -> None:
        folder, size, shards = start.folder, start.size, start.folder.parent / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._starts_before = folder, len(starts(folder))
        settings = [*SETTINGS, f"training.steps={start.steps}", f"data.shards={json.dumps(str(shards))}"]
        command = [sys.executable, __file__, "--rank", "--config", str(start.config)]
        command += ["--output", str(folder), *(part for setting in settings for part in ("--set", setting))]
        names = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(os.cpu_count()), "MASTER_ADDR": "127.0.0.1"}
        names |= {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self.processes = []
        with open(folder / "output.txt", "ab") as output:
            for rank in range(size):
                environment = {**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment["CHAOS_FOLDER"] = str(folder)
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

    @property
    def first_step(self) -> int | None:
        """The number of completed steps that they started from; None as long as they have not begun to train."""
        return next(iter(starts(self.folder)[self._starts_before :]), None)


def as_rank() -> None:
    """pretrain.py, with a record of where it starts and of the rows that every step was made of."""
    from vmd_scale.training.loop import Trainer

    folder = Path(os.environ["CHAOS_FOLDER"])
    prepare, make_step, record = Trainer._prepare, Trainer._step, Trainer.record
    read: dict[int, list] = {}  # by the loader, ahead of the steps

    def prepare_and_remember(self, step, batch):
        read.setdefault(step, []).append([step, batch.positions.tolist(), batch.rows.tolist()])
        return prepare(self, step, batch)

    def step_and_record(self, step, *arguments):
        result = make_step(self, step, *arguments)
        with open(folder / "rows.jsonl", "a") as file:
            file.writelines(json.dumps(batch) + "\n" for batch in read.pop(step))
        return result

    def record_and_tell(self, state, step, *reason):
        record(self, state, step, *reason)
        if state == "running" and self.world.is_main:
            with open(folder / "starts.txt", "a") as file:
                file.write(f"{step}\n")

    Trainer._prepare, Trainer._step, Trainer.record = prepare_and_remember, step_and_record, record_and_tell
    sys.argv = [str(ROOT / "launchers" / "pretrain.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_to_end(start: Start, tally: Tally | None = None) -> None:
    ranks = Ranks(start)
    check_codes(ranks.wait(timeout=3600), {0}, "undisturbed", start.folder)
    if tally is not None and ranks.first_step is not None:
        tally.started_from(ranks.first_step)


def disturb(start: Start, event: str, choice: random.Random, tally: Tally) -> bool:
    """Start the run, break it at a random moment. Returns false if it came to its end before."""
    ranks, folder = Ranks(start), start.folder
    if choice.random() < 0.15:  # at start-up
        time.sleep(choice.uniform(0.5, 8))
    else:
        to_make = choice.randint(1, 40)
        while ranks.alive and (ranks.first_step is None or last_step(folder) < ranks.first_step + to_make):
            time.sleep(0.01)
    if not ranks.alive:
        check_codes(ranks.wait(timeout=60), {0}, f"before the {event}", folder)
        return False
    started = ranks.first_step is not None
    if event in STOPS:
        codes = stop(ranks, folder, STOPS[event], choice)
        if set(codes) == {0}:  # it was making its last step
            return False
        if started or event == "STOP file":  # else the signal found nobody who listens
            check_codes(codes, {STOPPED_EXIT_CODE}, f"after the {event}", folder)
    else:
        for process in [choice.choice(ranks.processes)] if event == ONE else ranks.processes:
            process.kill()
        ranks.wait(timeout=30)
    if ranks.first_step is not None:
        tally.started_from(ranks.first_step)
        tally.reached = max(tally.reached, last_step(folder))
    if event in DAMAGES:
        damage(sound(folder)[-1], event, choice)
    elif event in MANIFESTS:
        damage(sound(folder)[-1], MANIFESTS[event], choice, of_manifest=True)
    tally.events[event] = tally.events.get(event, 0) + 1
    tally.at_start_up += not started
    return True


def check_codes(codes: list[int], wanted: set[int], when: str, folder: Path) -> None:
    if set(codes) != wanted:
        raise SystemExit(f"{when}, ranks ended with exit codes {codes}; see {folder / 'output.txt'}")


def stop(ranks: Ranks, folder: Path, number: signal.Signals | None, choice: random.Random) -> list[int]:
    """Exit codes."""
    if number is None:
        (folder / "STOP").touch()
    else:
        choice.choice(ranks.processes).send_signal(number)
    return ranks.wait(timeout=60)


def sound(folder: Path) -> list[Path]:
    """Checkpoints whose files are what their manifests say, oldest first."""
    return [checkpoint for checkpoint in whole_checkpoints(folder / "checkpoints") if is_sound(checkpoint)]


def is_sound(checkpoint: Path) -> bool:
    try:
        wanted = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return not any(checkpoints.damage(checkpoint / name, wanted[name]) for name in wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damage(checkpoint: Path, how: str, choice: random.Random, of_manifest: bool = False) -> None:
    files = [path for path in sorted(checkpoint.iterdir()) if (path.name == MANIFEST) == of_manifest]
    path = choice.choice(files)
    while is_sound(checkpoint):  # a bit of a manifest may mean nothing
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


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def starts(folder: Path) -> list[int]:
    """The number of completed steps that each start of the run went on from."""
    path = folder / "starts.txt"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


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
