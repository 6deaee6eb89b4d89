"""What export writes into a folder that holds something already, and what an interruption leaves there."""

import os
from pathlib import Path

import pytest
import torch
from untrained_models import untrained

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.errors import UserError
from vmd_scale.export import folder as export_folder
from vmd_scale.export.folder import export
from vmd_scale.initial_weights import initialize_from
from vmd_scale.tokenization import load_tokenizer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_of(model: torch.nn.Module, wanted: TrainedModel) -> bool:
    weights = wanted.model.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_the_exporter_did_not_write_stays(tmp_path: Path) -> None:
    """A cloned repository of a hub, with notes in it."""
    folder = export(untrained(1), tmp_path / "out")
    kept = {
        ".git/HEAD": "ref: refs/heads/main",
        ".gitattributes": "*.safetensors filter=lfs",
        "NOTES.md": "mine",
        "adapter_model.safetensors": "mine too",
        "onnx/model.safetensors": "also",
    }
    for name, content in kept.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "README.md").write_text("of yesterday")
    again = untrained(2)
    export(again, folder, encoder=True)
    assert {name: (folder / name).read_text() for name in kept} == kept
    assert "yesterday" not in (folder / "README.md").read_text()
    assert not (folder / ".export").exists()
    assert names(tmp_path) == {"out"}  # nothing beside it
    fresh = untrained(3).model
    initialize_from(fresh, str(folder))
    assert is_of(fresh, again)


def test_files_of_an_earlier_export_do_not_outlive_it(tmp_path: Path, loaded_alone) -> None:
    """Of another number of shards and another kind of tokenizer: loaders would prefer them."""
    folder = export(untrained(1), tmp_path / "out", max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").exists()
    whole = untrained(2, data={"tokenizer": "symbols:30"})
    export(whole, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert is_of(loaded_alone(folder), whole)
    assert load_tokenizer(str(folder)).fingerprint == whole.tokenizer.fingerprint
    in_pieces = untrained(3)
    export(in_pieces, folder, max_shard_size="4KB")
    assert not (folder / "model.safetensors").exists()
    assert is_of(loaded_alone(folder), in_pieces)
    assert load_tokenizer(str(folder)).fingerprint == in_pieces.tokenizer.fingerprint


class Killed(BaseException):
    """What no `except Exception` sees."""


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_any_rename_it_is_one_of_the_two_models_and_never_a_mixture(
    earlier: bool, tmp_path: Path, loaded_alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, replace = untrained(1), untrained(2), os.replace
    calls = 99
    for at in range(99):
        folder = tmp_path / f"at {at}"
        if earlier:
            export(old, folder, max_shard_size="4KB")
            (folder / "NOTES.md").write_text("mine")
        left = at

        def until_killed(source, target):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(export_folder.os, "replace", until_killed)
        try:
            export(new, folder, max_shard_size="4KB")
            calls = at
        except Killed:
            pass
        monkeypatch.setattr(export_folder.os, "replace", replace)
        if calls == at:
            break
        found = []
        for place in (folder, folder / ".export" / "new", folder / ".export" / "old"):
            if (place / "config.json").exists() and (place / "modeling_vmd.py").exists():
                try:
                    model = loaded_alone(place)
                except FileNotFoundError:  # a shard: not whole
                    assert place != folder
                    continue
                assert is_of(model, old) or is_of(model, new)
                found.append(place)
        assert found or not earlier
        export(new, folder)  # and calling it again mends it
        assert is_of(loaded_alone(folder), new)
        assert len(list(folder.glob("*.safetensors"))) == 1
        assert not (folder / ".export").exists()
        assert (folder / "NOTES.md").exists() == earlier
    assert is_of(loaded_alone(tmp_path / f"at {calls}"), new)
    assert calls > 10


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(UserError, match="exists and is not an exported model"):
        export(untrained(1), tmp_path)
    assert names(tmp_path) == {"photo.jpg"}


def test_a_folder_that_is_a_link_is_filled_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for seed in (1, 2):
        export(untrained(seed), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()
