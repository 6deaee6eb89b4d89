"""Export a checkpoint to a Hugging Face folder that loads without this project.

    python launchers/export.py --checkpoint runs/text8 --output exported/text8
    python launchers/export.py --checkpoint runs/text8 --output exported/text8 --encoder --dtype bf16
    python launchers/export.py --checkpoint runs/text8 --output exported/text8 --push USER/MODEL
    python launchers/export.py --checkpoint runs/lora --output exported/lora --adapter

The folder holds config.json, safetensors, the tokenizer, a model card with what was measured of these weights (in the
run folder, or in the file of --evaluation) and two files of code: transformers_vmd.py for
AutoModel.from_pretrained(DIR, trust_remote_code=True), and modeling_vmd.py, which needs torch and safetensors only.
With --adapter, it holds the adapters of a run with LoRA alone, in peft's format, for an exported base.
"""

import argparse
from pathlib import Path

from vmd_scale.checkpoints import load_trained
from vmd_scale.commandline import HelpFormatter, refuse_unused
from vmd_scale.errors import reports_user_errors
from vmd_scale.export.adapter import OWN as ADAPTER_FILES
from vmd_scale.export.adapter import export_adapter
from vmd_scale.export.card import accuracies_of, results_of
from vmd_scale.export.folder import DTYPES, check_request, export, exported_files
from vmd_scale.export.folder import OWN as MODEL_FILES
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
    parser.add_argument("--adapter", action="store_true", help="LoRA's adapters alone, for peft, not merged")
    parser.add_argument("--push", metavar="USER/MODEL", help="upload the folder to the Hugging Face hub afterwards")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public, not private")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what was exported and from where")
    args = parser.parse_args()

    check_writable(args.json, "--json")
    if not args.push:
        refuse_unused(args, parser, ("public",), "an export without --push")
    if args.adapter:
        refuse_unused(args, parser, ("encoder", "dtype", "max_shard_size", "evaluation"), "--adapter")
        checkpoint, step = export_adapter(args.checkpoint, args.output, args.weights)
    else:
        check_request(args.output, args.max_shard_size)
        trained = load_trained(args.checkpoint, args.weights)
        results, accuracies = results_of(trained, args.evaluation), accuracies_of(trained)
        export(trained, args.output, results, args.encoder, args.dtype, args.max_shard_size, accuracies)
        checkpoint, step = trained.checkpoint, trained.step
    own, what = (ADAPTER_FILES, "adapters, ") if args.adapter else (MODEL_FILES, "")
    print(f"{checkpoint} ({what}{args.weights} weights, step {step}) -> {args.output}")
    if args.json:
        files = {path.name: path.stat().st_size for path in exported_files(args.output, own)}
        write_json(args.json, {"folder": str(args.output), "step": step, "weights": args.weights, "files": files})
    if args.push:
        print(f"uploaded to {push(args.output, args.push, args.public, own)}")


if __name__ == "__main__":
    main()
