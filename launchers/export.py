"""Export a checkpoint to a Hugging Face folder that loads without this project.

    python launchers/export.py --checkpoint runs/text8 --output exported/text8
    python launchers/export.py --checkpoint runs/text8 --output exported/text8 --encoder --dtype bf16
    python launchers/export.py --checkpoint runs/text8 --output exported/text8 --push USER/MODEL

The folder holds config.json, safetensors, the tokenizer, a model card with what was measured of these weights (in the
run folder, or in the file of --evaluation) and two files of code: transformers_vmd.py for
AutoModel.from_pretrained(DIR, trust_remote_code=True), and modeling_vmd.py, which needs torch and safetensors only.
"""

import argparse
from pathlib import Path

from vmd_scale.checkpoints import load_trained
from vmd_scale.commandline import HelpFormatter
from vmd_scale.errors import reports_user_errors
from vmd_scale.export.card import accuracies_of, results_of
from vmd_scale.export.folder import DTYPES, check_request, export, exported_files
from vmd_scale.export.hub import push
from vmd_scale.files import check_writable, write_json


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--weights", default="ema", choices=["ema", "raw"], help="the moving average of the weights, or the last ones"
    )
    parser.add_argument("--encoder", action="store_true", help="q(z | x0, m) too: for bounds and further training")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the weights in the files")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="the largest weight file, such as 500MB"
    )
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="results of evaluate.py to put into the model card"
    )
    parser.add_argument("--push", metavar="USER/MODEL", help="upload the folder to the Hugging Face hub afterwards")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public, not private")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what was exported and from where")
    args = parser.parse_args()

    check_request(args.output, args.max_shard_size)
    check_writable(args.json, "--json")
    trained = load_trained(args.checkpoint, args.weights)
    results = results_of(trained, args.evaluation)
    accuracies = accuracies_of(trained)
    folder = export(trained, args.output, results, args.encoder, args.dtype, args.max_shard_size, accuracies)
    print(f"{trained.checkpoint} ({trained.weights} weights, step {trained.step}) -> {folder}")
    if args.json:
        files = {path.name: path.stat().st_size for path in sorted(exported_files(folder))}
        write_json(args.json, {"folder": str(folder), "step": trained.step, "weights": trained.weights, "files": files})
    if args.push:
        print(f"uploaded to {push(folder, args.push, args.public)}")


if __name__ == "__main__":
    main()
