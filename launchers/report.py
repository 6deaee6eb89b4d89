"""Write one HTML page about a run: settings, training curves, bounds against sampling steps, samples.

    python launchers/report.py runs/text8                          writes runs/text8/report.html
    python launchers/report.py runs/text8 --output page.html --png pictures

Works while the run goes on. Final bounds and samples are shown where the run folder holds them:

    python launchers/evaluate.py --checkpoint runs/text8 --steps 1,4,16,inf --json runs/text8/evaluation.json
    python launchers/sample.py --checkpoint runs/text8 --steps 1,4,16 --json runs/text8/samples.json
"""

import argparse
from pathlib import Path

from vmd_scale.errors import reports_user_errors
from vmd_scale.report import write_report


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder: what pretrain.py wrote with --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; default: RUN/report.html")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write each picture there as well")
    args = parser.parse_args()

    print(write_report(args.run, args.output, args.png))


if __name__ == "__main__":
    main()
