"""Reproduce a reference task: train every method and seed, measure, and print the table beside the published figures.

    python launchers/reproduce.py four_tokens_d1 --seeds 3
    python launchers/reproduce.py sudoku --fast --json sudoku.json          scaled down to two CPU cores
    python launchers/reproduce.py text8 --fast --set data.source=enwiki.txt

Writes TASK.md, TASK.json and, where the task has a picture, TASK.png into docs/results, also with --fast, over what is
there. Models stay in runs/reproduce/TASK; run again, it does not train what is there. Without a GPU, one model is
trained on each CPU core; with GPUs, each on as many as its micro-batches divide into.
"""

import argparse
from pathlib import Path

from vmd_scale.commandline import HelpFormatter
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import check_writable
from vmd_scale.reproduction.page import markdown_table, rows_of, write_page
from vmd_scale.reproduction.runs import jobs_of, run_jobs
from vmd_scale.reproduction.tasks import TASKS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="models of each method")
    parser.add_argument("--fast", action="store_true", help="scaled down: smaller models, fewer steps and samples")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every model's config"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON there as well")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR", help="where the page goes")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="where the models go")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be at least 1")

    task = TASKS[args.task]
    jobs = jobs_of(task, args.seeds, args.fast, args.set, CONFIGS, args.runs)
    check_writable(args.output / f"{task.name}.json", "--output")
    check_writable(args.json, "--json")
    results = run_jobs(jobs)
    rows = rows_of(task, jobs, results)
    page = write_page(task, jobs, results, rows, args.output, args.json)
    print(markdown_table(rows))
    print(f"\nwritten to {page}")


if __name__ == "__main__":
    main()
