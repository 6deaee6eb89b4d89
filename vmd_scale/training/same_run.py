"""Whether a checkpoint is of the run that is to go on from it."""

import json
from contextlib import suppress
from pathlib import Path

from vmd_scale.checkpoints import MANIFEST, RUN_STATE, check_fingerprint, damage, whole_checkpoints
from vmd_scale.config import Config
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError

# Keys of data that say where and how, not what.
MOVABLE = ("shards", "workers", "source", "shard_tokens", "cache", "cache_gib")


def check_newest(config: Config, fingerprint: str, run_folder: Path) -> None:
    """`check_same_run` with the newest whole checkpoint of a run folder, without its data.

    Nothing is said where there is none, or it is unreadable or just being thrown away: resuming finds that out.
    """
    with suppress(OSError, ValueError, KeyError):
        for newest in whole_checkpoints(run_folder / "checkpoints")[-1:]:
            wanted = json.loads((newest / MANIFEST).read_text())["files"][RUN_STATE]
            if damage(newest / RUN_STATE, wanted) is None:
                check_same_run(config, fingerprint, [], newest)


def check_same_run(
    config: Config, fingerprint: str, contents: list[dict[str, dict[str, float]]], checkpoint: Path
) -> None:
    """A resumed run must be the same experiment; how long and how often may change.

    Args:
        contents: see `contents_of`; the shards may lie elsewhere now, or be cut in another way.

    Raises:
        UserError: names the key and both values.
    """
    state = json.loads((checkpoint / RUN_STATE).read_text())
    check_fingerprint(config.data.tokenizer, fingerprint, state["tokenizer_fingerprint"], checkpoint)
    then = parse_config(state["config"], str(checkpoint / RUN_STATE))  # with keys that are newer than it
    saved, ours = then.resolved().model_dump(mode="json"), config.resolved().model_dump(mode="json")
    for values in (saved, ours):
        values["data"]["mixture"] = [
            {key: value for key, value in each.items() if key not in MOVABLE} for each in values["data"]["mixture"]
        ]
    # The tokenizer is compared above by what it does: its files may have been moved.
    fixed = [("data", k) for k in ours["data"] if k not in (*MOVABLE, "tokenizer")]
    fixed += [("model", k) for k in ours["model"] if k != "attention"]
    fixed += [("latent", k) for k in ours["latent"]] + [("diffusion", k) for k in ours["diffusion"]]
    fixed += [("training", k) for k in ("global_batch", "seed", "optimizer", "ema_decay", "trainable", "lora")]
    for section, key in fixed:
        before = saved[section][key]
        if before != ours[section][key]:
            raise UserError(
                f"{section}.{key} is {ours[section][key]!r}, but {checkpoint} was trained with {before!r}; "
                "choose another --output, or put it back"
            )
    for data, now, before in zip(config.data.corpora(), contents, state.get("contents", []), strict=False):
        for split in (split for split in now if split in before):
            for key, value in now[split].items():
                if value != before[split][key]:
                    raise UserError(
                        f"data.shards {data.shards!r}: {key} of split {split!r} is {value}, but {checkpoint} was "
                        f"trained with {before[split][key]}: not the same data; choose another --output, or put it back"
                    )
