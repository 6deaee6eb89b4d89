"""Corpora from the Hugging Face hub, with a stand-in for it: splits, and reading on after the network was away."""

import logging
from pathlib import Path

import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data import remote
from vmd_scale.data.corpora import SPLITS, available_splits, documents
from vmd_scale.data.prepare import prepare, prepare_all
from vmd_scale.data.shards import verify_folder
from vmd_scale.errors import RunFailed, UserError


class Hub:
    """What `datasets` would find there. `trouble` is raised, one after the other, when so many records were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **splits: list[str]) -> None:
        import datasets

        self.splits, self.counted = splits, True
        self.trouble: list[tuple[int, Exception]] = []
        self.asked: list[tuple] = []  # name and, where there is one, configuration
        self.revisions: list[tuple[str, str | None]] = []  # by the function that was asked for it
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.split_names)
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        monkeypatch.setattr(datasets, "load_dataset", self.stream)
        monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)

    def split_names(self, *name, revision=None):
        self.asked.append(name)
        self._find("split_names", revision)
        self._fail(-1)
        return list(self.splits)

    def builder(self, *name, revision=None):
        self._find("builder", revision)

        class Split:
            def __init__(self, texts):
                self.num_examples = len(texts)

        class Builder:
            class info:
                splits = {name: Split(texts) for name, texts in self.splits.items()} if self.counted else None

        return Builder

    def stream(self, *name, split, streaming, revision=None):
        assert streaming
        self._find("stream", revision)
        for number, text in enumerate(self.splits[split]):
            self._fail(number)
            yield {"text": text, "id": number}

    def _find(self, function, revision):
        from datasets.exceptions import DatasetNotFoundError

        self.revisions.append((function, revision))
        if revision not in (None, "v1.0"):
            raise DatasetNotFoundError(f"Revision '{revision}' doesn't exist for dataset 'someone/corpus' on the Hub.")

    def _fail(self, number):
        if self.trouble and self.trouble[0][0] == number:
            raise self.trouble.pop(0)[1]


def data(corpus: str, **more: object) -> DataConfig:
    values = {"source": "hf:someone/corpus", "tokenizer": "text8", "row_length": 16, "shards": "unused", **more}
    return DataConfig.model_validate({"corpus": corpus, **values})


def texts(config: DataConfig, split: str) -> list[str]:
    return [document.text for document in documents(config, split)]


def numbered(count: int) -> list[str]:
    return [f"t{n}" for n in range(count)]


def test_splits_are_the_hubs_own_or_made_of_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, train=numbered(40), test=["x"])
    config = data("text")
    assert available_splits(config) == SPLITS
    assert texts(config, "test") == ["x"]
    assert texts(config, "validation") == ["t18", "t38"]
    assert len(texts(config, "train")) == 38


@pytest.mark.parametrize("counted", [True, False])
def test_the_last_documents_of_openwebtext_are_validation(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configs/openwebtext.json has it; where the hub does not know how many there are, they are counted."""
    hub = Hub(monkeypatch, train=numbered(25))
    hub.counted = counted
    config = data("openwebtext", validation_documents=10)
    assert available_splits(config) == ("train", "validation")
    assert texts(config, "train") == numbered(25)[:15]
    assert texts(config, "validation") == numbered(25)[15:]
    with pytest.raises(UserError, match="no 'test' split"):
        texts(config, "test")
    with pytest.raises(UserError, match=r"data\.validation_documents is 100,000, but corpus 'openwebtext' has only 25"):
        texts(data("openwebtext"), "validation")


def test_lm1b_of_the_hub_has_its_own_splits_and_the_corpus_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, train=["it 's train , yes ."] * 20, test=["held out , he did n't ."])
    config = data("lm1b", source="hf:someone/lm1b:plain")
    assert available_splits(config) == SPLITS
    assert texts(config, "test") == ["held out, he didn't."]
    assert set(texts(config, "train")) == {"it's train, yes."}
    assert hub.asked[0] == ("someone/lm1b", "plain")


def test_a_revision_is_the_one_that_is_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, train=numbered(25))
    for source, revision in (("hf:someone/corpus@v1.0:plain", "v1.0"), ("hf:someone/corpus:plain", None)):
        hub.asked, hub.revisions = [], []
        config = data("openwebtext", source=source, validation_documents=10)
        assert available_splits(config) == ("train", "validation")
        assert texts(config, "validation") == numbered(25)[15:]
        assert set(hub.asked) == {("someone/corpus", "plain")}
        assert set(hub.revisions) == {(function, revision) for function in ("split_names", "builder", "stream")}
    with pytest.raises(UserError, match=r"'hf:someone/corpus@v2': Revision 'v2' doesn't exist .*; or download it"):
        texts(data("text", source="hf:someone/corpus@v2"), "train")


@pytest.mark.parametrize("source", ["hf:", "hf:@v1.0", "hf:someone/corpus@", "hf:someone/corpus@:plain", "hf:a/b:"])
def test_a_name_of_the_hub_with_an_empty_part_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, train=numbered(25))
    with pytest.raises(UserError, match=f"data.source '{source}': expected hf:NAME, hf:NAME@REVISION"):
        texts(data("text", source=source), "train")
    assert not hub.asked


def test_a_broken_stream_is_read_on_where_it_broke(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub(monkeypatch, train=[f"document {'abc'[n % 3]} of many" for n in range(200)])
    undisturbed = data("text", normalizer="text8", shards=str(tmp_path / "a"))
    disturbed = undisturbed.model_copy(update={"shards": str(tmp_path / "b")})
    first = prepare(undisturbed, progress=False)
    away = [(number, ConnectionError("network is away")) for number in (-1, 0, 70, 70, 71)]
    hub.trouble = [*away, (150, TimeoutError())]
    with caplog.at_level(logging.WARNING):
        assert prepare(disturbed, progress=False) == first
    assert not hub.trouble
    assert caplog.text.count("trying again") == 6
    verify_folder(tmp_path / "b")


def test_what_is_prepared_needs_no_hub_any_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prepared where there is a network, trained where there is none."""
    hub = Hub(monkeypatch, train=[f"document {'abc'[n % 3]} of many" for n in range(200)])
    config = data("text", normalizer="text8", shards=str(tmp_path))
    some = prepare(config, ["train", "validation"], progress=False)
    hub.trouble, asked = [(-1, ConnectionError("no network"))] * 99, len(hub.asked)
    for manifests in (
        prepare_all(config, progress=False, enough=["train", "validation"]),
        prepare_all(config, ["train"], progress=False),
    ):
        assert manifests == {str(tmp_path): some}
    assert len(hub.asked) == asked
    with pytest.raises(RunFailed, match="no network"):
        prepare_all(config, progress=False, enough=["train", "test"])


def test_a_hub_that_stays_away_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, train=numbered(9))
    hub.trouble = [(-1, ConnectionError("no network"))] * remote.ATTEMPTS
    wanted = r"data\.source 'hf:someone/corpus': could not be fetched in 6 attempts: no network; call again .* file or"
    with pytest.raises(RunFailed, match=wanted):
        texts(data("text"), "train")
    hub.trouble = [(5, ConnectionError("gone"))] * remote.ATTEMPTS
    with pytest.raises(RunFailed, match="6 attempts: gone"):
        texts(data("text"), "train")


def test_what_will_not_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    hub = Hub(monkeypatch, train=numbered(9))
    for error in (DatasetNotFoundError("no such dataset"), ValueError("no such dataset")):
        hub.trouble = [(-1, error)]
        with pytest.raises(UserError, match=r"data\.source 'hf:someone/corpus': .*no such dataset; or download it"):
            texts(data("text"), "train")
        assert not hub.trouble
    with pytest.raises(UserError, match=r'no string "body" \(data\.text_column\); columns: text, id'):
        texts(data("text", text_column="body"), "train")
