"""Export a checkpoint to a Hugging Face style folder that loads without this project.

    python launchers/export.py --checkpoint runs/text8 --output exported/text8
    python launchers/export.py --checkpoint runs/text8 --output exported/text8 --evaluation bounds.json

The folder holds config.json, model.safetensors, the tokenizer, a model card with the numbers of --evaluation (a file of
evaluate.py --json) and modeling_vmd.py, which needs torch and safetensors only.
"""

import argparse
from pathlib import Path

from vmd_scale.checkpoints import load_trained
from vmd_scale.errors import reports_user_errors
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.folder import export
from vmd_scale.files import read_json, write_json


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"])
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="results for the model card")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what was exported and from where")
    args = parser.parse_args()

    results = read_json(args.evaluation, list[Result]) if args.evaluation else []
    trained = load_trained(args.checkpoint, args.weights)
    folder = export(trained, args.output, results)
    print(f"{trained.checkpoint} ({trained.weights} weights, step {trained.step}) -> {folder}")
    if args.json:
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(args.json, {"folder": str(folder), "step": trained.step, "weights": trained.weights, "files": files})


if __name__ == "__main__":
    main()
