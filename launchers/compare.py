"""Put the results of several evaluations into one table, where they may stand together.

    python launchers/compare.py runs/a/evaluation.json runs/b/evaluation.json
    python launchers/compare.py packed.json unpacked.json --note "two orders of LM1B, to show that they disagree"

The files are what evaluate.py --json writes. Results of different protocols, data, splits or intervals, or with
different caveats, are refused unless a note says why they stand together; it is printed below them.
"""

import argparse
from pathlib import Path

from vmd_scale.commandline import HelpFormatter
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.evaluation.perplexity import read_results
from vmd_scale.evaluation.tables import beside_published, table


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by evaluate.py --json")
    parser.add_argument("--note", metavar="TEXT", help="why results that cannot be compared stand in one table")
    args = parser.parse_args()

    by_file = {path: read_results(path) for path in args.files}
    results = [result for found in by_file.values() for result in found]
    if not results:
        raise UserError(f"{', '.join(map(str, args.files))}: no results")
    text = table(results, args.note)
    for path, found in by_file.items():
        print(f"{path}: {len(found)} result(s)")
    print(text)
    if len({result.protocol for result in results}) == 1 and (published := beside_published(results)):
        print(published)


if __name__ == "__main__":
    main()
