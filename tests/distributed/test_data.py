"""Training on a mixture of corpora, one of them remote: real ranks, stopped and resumed with another number."""

import json
import re

import pytest

LAST = 6


def settings(lab, folder) -> tuple[str, ...]:
    other = {"corpus": "text", "source": str(lab.folder / "other.txt"), "normalizer": "text8", "weight": 3.0}
    mixture = [{**other, "shards": f"file://{folder}/other-shards"}]
    return (
        f"data.mixture={json.dumps(mixture)}",
        f"data.cache={folder}/cache",
        "model.dropout=0.0",
        f"training.steps={LAST}",
    )


@pytest.fixture(scope="module")
def mixed(lab, tmp_path_factory):
    """The second corpus, prepared; and an undisturbed run of one rank."""
    from vmd_scale.config_file import load_config
    from vmd_scale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("mixed")
    (lab.folder / "other.txt").write_text("zebras and xylophones\n" * 300)
    for each in load_config(lab.config, settings(lab, folder)).data.corpora()[1:]:
        prepare(each.model_copy(update={"shards": str(folder / "other-shards")}), progress=False)
    lab.pretrain(folder / "whole", *settings(lab, folder), ranks=1)
    return folder


def test_an_elastic_resume_goes_on_with_the_same_rows(lab, mixed):
    folder = mixed / "elastic"
    folder.mkdir()
    (folder / "STOP").touch()  # seen after one step
    lab.pretrain(folder, *settings(lab, mixed), ranks=2, expect=75)
    assert len(lab.losses(folder)) == 1
    lab.pretrain(folder, *settings(lab, mixed), ranks=1)
    assert lab.losses(folder) == pytest.approx(lab.losses(mixed / "whole"), rel=1e-4)
    assert list((mixed / "cache").glob("[0-9a-f]" * 64))


def test_other_weights_are_another_run(lab, mixed):
    changed = [setting.replace('"weight": 3.0', '"weight": 2.0') for setting in settings(lab, mixed)]
    finished = lab.pretrain(mixed / "whole", *changed, f"training.steps={LAST + 1}", ranks=1, expect=2)
    assert re.search(r"data\.mixture is .*'weight': 2\.0.* was trained with .*'weight': 3\.0", finished[0].errors[0])
