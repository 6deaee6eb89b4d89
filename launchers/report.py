"""Write one HTML page about a run, or several: settings, curves, bounds against sampling steps, events, samples.

    python launchers/report.py runs/text8                          writes runs/text8/report.html
    python launchers/report.py runs/text8 runs/text8_mdm           side by side: the bound beside the MDM baseline
    python launchers/report.py runs/text8 --watch 60               again every minute until the run ends or dies
    python launchers/report.py runs/text8 --output page.html --png pictures

Works while the run is in progress. Final bounds and samples are shown where the run folder holds them:

    python launchers/evaluate.py --checkpoint runs/text8 --steps 1,4,16,inf --json runs/text8/evaluation.json
    python launchers/sample.py --checkpoint runs/text8 --steps 1,4,16 --json runs/text8/samples.json
"""

import argparse
import time
from pathlib import Path

from vmd_scale.commandline import HelpFormatter
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.report import write_report
from vmd_scale.training.status import has_died, read_status


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder: what pretrain.py wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; default: report.html in the first RUN")
    parser.add_argument("--watch", type=int, metavar="SECONDS", help="write it again and again while a run goes on")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write each picture there as well")
    args = parser.parse_args()

    if args.watch is not None and args.watch < 1:
        raise UserError(f"--watch {args.watch}: must be at least 1")
    while args.watch and goes_on(args.runs):
        print(write_report(args.runs, args.output, args.png, refresh=args.watch), flush=True)
        time.sleep(args.watch)
    print(write_report(args.runs, args.output, args.png))


def goes_on(runs: list[Path]) -> bool:
    found = [(run, read_status(run)) for run in runs]
    return any(status and status.state == "running" and not has_died(run, status) for run, status in found)


if __name__ == "__main__":
    main()
