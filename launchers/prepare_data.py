"""Turn a corpus into shards: token files that training and evaluation read.

    python launchers/prepare_data.py --config configs/quickstart.json      prepare what its data section says
    python launchers/prepare_data.py --config C --set data.workers=16      with 16 processes; the output is the same
    python launchers/prepare_data.py inspect DIR                           statistics, lengths, a decoded row
    python launchers/prepare_data.py inspect DIR --plot lengths.png        and a picture of the lengths
    python launchers/prepare_data.py verify DIR                            compare every file with its checksum

Run again after a kill, the same command continues after the last finished shard. Shards that are there and fit are left
alone; shards that were made with other settings are an error, unless --force.
"""

import argparse
import logging
from pathlib import Path

from vmd_scale.commandline import HelpFormatter, refuse_unused
from vmd_scale.config_file import load_config
from vmd_scale.data.inspection import describe, inspect, plot_lengths
from vmd_scale.data.manifest import read_manifest
from vmd_scale.data.prepare import prepare_all
from vmd_scale.data.shards import verify_folder
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import check_writable, write_json

OF_ACTION = {"prepare": ("config", "set", "splits", "force", "json"), "inspect": ("plot",), "verify": ()}


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "action", nargs="?", choices=["prepare", "inspect", "verify"], default="prepare", help="what to do"
    )
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of shards, for inspect and verify")
    parser.add_argument("--config", metavar="FILE", help="the run's configuration; its data section is used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="train, validation, test; default: all there are")
    parser.add_argument("--force", action="store_true", help="throw away what data.shards holds and start again")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the manifest there; of a mixture {folder: manifest}"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with inspect: draw the lengths of the documents")
    args = parser.parse_args()
    unused = {name for names in OF_ACTION.values() for name in names} - {*OF_ACTION[args.action], "config"}
    refuse_unused(args, parser, sorted(unused), args.action)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_writable(args.json, "--json")
    check_writable(args.plot, "--plot")

    if args.action == "prepare":
        if args.folder or not args.config:
            raise UserError("expected --config FILE, or: inspect DIR, verify DIR; see --help")
        manifests = prepare_all(load_config(args.config, args.set).data, splits=args.splits, force=args.force)
        print("\n\n".join(describe(manifest) for manifest in manifests.values()))
        if args.json:
            written = {folder: manifest.model_dump(mode="json") for folder, manifest in manifests.items()}
            write_json(args.json, written if len(written) > 1 else next(iter(written.values())))
        return
    if not args.folder or args.config:
        raise UserError(f"expected: {args.action} DIR; see --help")
    if args.action == "inspect":
        print(inspect(args.folder))
        if args.plot:
            plot_lengths(read_manifest(args.folder), args.plot)
    else:
        manifest = verify_folder(args.folder)
        print(f"{args.folder}: every file of {', '.join(manifest.splits)} is as it was written")


if __name__ == "__main__":
    main()
