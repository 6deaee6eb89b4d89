"""What an exported folder says of itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from untrained_models import untrained

from vmd_scale.adapters import merged
from vmd_scale.checkpoints import TrainedModel, checkpoint_id
from vmd_scale.evaluation.classification import Accuracy
from vmd_scale.export.card import accuracies_of, model_card
from vmd_scale.model import VMD
from vmd_scale.tokenization import SentencePieceTokenizer

RECORD = {"split": "test", "rows": 600, "labels": 4, "accuracy": 0.875, "standard_error": 0.0135, "label_nll": 0.5}


@pytest.fixture
def classifier(tmp_path: Path) -> TrainedModel:
    checkpoint = tmp_path / "news" / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    training = {"init_from": "/home/me/runs/text8", "trainable": []}
    return untrained(checkpoint=checkpoint, data={"corpus": "labels", "packing": "pad"}, training=training)


def test_the_accuracy_of_these_weights_is_shown_and_no_others(classifier: TrainedModel) -> None:
    file = classifier.checkpoint.parent.parent / "classification.json"
    assert accuracies_of(classifier) == []
    mine = RECORD | {"draws": 16, "step": 1, "weights": "ema", "checkpoint": checkpoint_id(classifier.checkpoint)}
    others = [mine | other for other in ({"step": 2}, {"weights": "raw"}, {"checkpoint": "0123456789abcdef"})]
    file.write_text(json.dumps([*others, RECORD | {"draws": 16}, mine]))  # one is of an older version: of any weights
    assert accuracies_of(classifier) == [Accuracy(**mine)]
    card = model_card(classifier, [], False, accuracies_of(classifier))
    assert "| test | 600 | 4 | 0.8750 | 0.0135 | 0.5000 |" in card
    assert "Nothing was evaluated" not in card
    assert "Nothing was evaluated" in model_card(classifier, [], False)


def test_where_the_weights_come_from(classifier: TrainedModel) -> None:
    card = model_card(classifier, [], True)
    assert "# Variational masked diffusion model, fine-tuned on `labels`" in card
    assert "Training started from the weights of `text8`." in card
    assert "/home" not in card
    assert "LoRA" not in card
    start = {"init_from": "runs/owt/checkpoints/step-00000400"}
    for parts, words in (
        ({"lora": {"rank": 2}}, "`owt, step-00000400`, with adapters (LoRA of rank 2) that are merged into these."),
        ({"trainable": ["latent", "*.norm.*"]}, "`; of them only `latent`, `*.norm.*` was trained."),
    ):
        adapted = untrained(training=start | parts)
        plain = VMD(adapted.model.architecture)
        plain.load_state_dict(merged(adapted.model.state_dict(), adapted.config.training.lora))
        assert words in model_card(replace(adapted, model=plain), [], True)
    scratch = model_card(untrained(latent={"width": 0}), [], False)
    assert "# Masked diffusion model, trained on `text`" in scratch
    assert "Training started" not in scratch


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("text8", "text8"),
        ("symbols:12", "symbols:12"),
        ("bert:/data/of/me/tokenizers", "bert"),
        ("/data/of/me/mine.model", "mine"),
        ("/data/of/me/llama/tokenizer.json", "llama"),
        ("/data/of/me/runs/news/tokenizer", "news"),
        ("bert-base-uncased", "bert-base-uncased"),
    ],
)
def test_the_tokenizer_has_a_name_without_folders(given: str, shown: str) -> None:
    trained = untrained(data={"tokenizer": given} if given.startswith(("text8", "symbols")) else {})
    if trained.config.data.tokenizer != given:
        data = trained.config.data.model_copy(update={"tokenizer": given})
        config = trained.config.model_copy(update={"data": data})
        trained = replace(trained, config=config, tokenizer=SubstituteTokenizer())
    assert f"(tokenizer `{shown}`, " in model_card(trained, [], True)


class SubstituteTokenizer(SentencePieceTokenizer):
    """One that is neither of characters nor of symbols, and has no tokenizer.json."""

    def __init__(self) -> None:
        pass

    def files(self) -> dict[str, bytes]:
        return {"spiece.model": b""}


def test_it_shows_how_to_get_text() -> None:
    card = model_card(untrained(data={"row_length": 64}), [], True)
    assert 'AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)' in card
    assert 'tokenizer("the first [MASK] of the", return_tensors="pt")' in card
    assert "the first" not in model_card(untrained(data={"tokenizer": "symbols:12", "row_length": 64}), [], True)
    without = model_card(replace(untrained(), tokenizer=SubstituteTokenizer()), [], True)
    assert 'SentencePieceProcessor(model_file="THIS FOLDER/spiece.model")' in without
    assert "AutoTokenizer" not in without
