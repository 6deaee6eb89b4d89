"""Which tokenizer a name means: a built-in one, a file, a folder, or the Hugging Face hub."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from vmd_scale.errors import UserError, first_line
from vmd_scale.files import read_json, write_atomically
from vmd_scale.tokenization.characters import MOST_SYMBOLS, CharacterTokenizer, SymbolTokenizer
from vmd_scale.tokenization.exported import ORIGINAL, TOKENIZER_CONFIG, TOKENIZER_FILES
from vmd_scale.tokenization.interface import Tokenizer
from vmd_scale.tokenization.sentences import sentencepiece_tokenizer
from vmd_scale.tokenization.subword import bert_tokenizer, gpt2_tokenizer, with_named_specials

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The 35 ids of MDLM's text8 tokenizer (arXiv 2406.07524, its released code), in its order.
MDLM_SPECIALS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
CHARACTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text8": (" " + LETTERS, ()),
    "text8_mdlm": (LETTERS + " ", MDLM_SPECIALS),
    "sudoku": ("123456789", ()),
}

ASSETS = Path("tokenizer/assets")
KEPT = "tokenizer"  # folder in that of a run
GPT2_FILES = [  # (vocabulary, merges)
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
    ("gpt2_encoder.json", "gpt2_vocab.bpe"),
]
BERT_FILES = ["vocab.txt", "bert_base_uncased_vocab.txt"]
# What planning needs to know of tokenizers that are not at hand (their published vocabularies).
VOCAB_SIZES = {"gpt2": 50_257, "bert-base-uncased": 30_522}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name, a file, a folder, or ``gpt2:FOLDER``.

    Args:
        name: a name may be ``text8``, ``text8_mdlm``, ``sudoku``, ``symbols:N``, a folder in tokenizer/assets such as
            ``gpt2``, or one of the Hugging Face hub.

    Raises:
        UserError: nothing there, several tokenizers in one folder, or a file that is not what its name says.
    """
    if name in CHARACTERS:
        return CharacterTokenizer(name, *CHARACTERS[name])
    kind, colon, folder = name.partition(":")
    if colon and kind == "symbols":
        return _symbols(name, folder)
    if colon and kind in ("gpt2", "bert"):
        loaders = _loaders_in(name, Path(folder))
        if kind not in loaders:
            raise UserError(f"data.tokenizer {name!r}: no {kind} files in {folder}; expected {_expected_files()[kind]}")
        return loaders[kind]()
    for place in _places(name):
        if place.exists():
            return _load_path(name, place)
    if "/" in name.strip("/") and (name.startswith((".", "/", "~")) or Path(name).suffix):
        raise UserError(f"data.tokenizer {name!r}: no such file or folder")
    return _load_from_hub(name)


def vocab_size_of(name: str) -> int:
    """That of the tokenizer which `load_tokenizer` gives; for those of the shipped configurations without its files.

    Raises:
        UserError: as `load_tokenizer`.
    """
    at_hand = any(place.exists() for place in _places(name))
    return VOCAB_SIZES[name] if name in VOCAB_SIZES and not at_hand else load_tokenizer(name).vocab_size


def keep_tokenizer(tokenizer: Tokenizer, run_folder: Path) -> None:
    """Write its files into a run folder: where `data.tokenizer` points to may be moved, or was named from elsewhere."""
    files = tokenizer.files()
    for name in TOKENIZER_FILES:  # of another one, that an earlier start had and no checkpoint was made with
        if name not in files:
            (run_folder / KEPT / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(run_folder / KEPT / name, content)


def kept_tokenizer(name: str, run_folder: Path) -> str:
    """What `load_tokenizer` should be asked for: the files that a run keeps, where `name` is not built in.

    Runs of older versions keep none: then it is `name`.
    """
    built_in = name in CHARACTERS or name.startswith("symbols:")
    return name if built_in or not (run_folder / KEPT).is_dir() else str(run_folder / KEPT)


def _places(name: str) -> list[Path]:
    return [Path(name), ASSETS / name, ASSETS / f"{name}.model"]


def _load_path(name: str, path: Path) -> Tokenizer:
    if path.is_dir():
        if (original := _original_in(path)) is not None:
            return _load_path(name, original)
        loaders = _loaders_in(name, path)
        # these are complete by themselves; other files beside them only repeat what they say
        for complete in ("characters", "symbols", "tokenizer.json"):
            if complete in loaders:
                return loaders[complete]()
        if len(loaders) != 1:
            found = f"several tokenizers ({', '.join(sorted(loaders))})" if loaders else "no tokenizer"
            raise UserError(
                f"data.tokenizer {name!r}: {found} in {path}; name one file, or write gpt2:FOLDER or bert:FOLDER. "
                f"Known files: {'; '.join(_expected_files().values())}"
            )
        return next(iter(loaders.values()))()
    if path.suffix == ".model":
        return sentencepiece_tokenizer(name, path)
    if path.name in BERT_FILES:
        return bert_tokenizer(name, path)
    for vocabulary, merges in GPT2_FILES:
        if path.name in (vocabulary, merges):
            return gpt2_tokenizer(name, path.parent / vocabulary, path.parent / merges)
    if path.suffix == ".json":
        return _load_tokenizer_json(name, path)
    raise UserError(f"data.tokenizer {name!r}: unknown kind of file; expected {'; '.join(_expected_files().values())}")


def _original_in(folder: Path) -> Path | None:
    """What an exported tokenizer.json was made from, which had no mask."""
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path, dict[str, Any]) if path.is_file() else {}
    original = settings.get(ORIGINAL)
    return folder / Path(original).name if isinstance(original, str) else None


def _loaders_in(name: str, folder: Path) -> dict[str, Callable[[], Tokenizer]]:
    """Kind -> how to load it, for every tokenizer whose files are in the folder."""
    loaders: dict[str, Callable[[], Tokenizer]] = {}
    if (folder / "characters.json").is_file():
        loaders["characters"] = partial(_load_characters, folder / "characters.json")
    if (folder / "symbols.json").is_file():
        loaders["symbols"] = partial(_load_symbols, folder / "symbols.json")
    if (folder / "tokenizer.json").is_file():
        loaders["tokenizer.json"] = partial(_load_tokenizer_json, name, folder / "tokenizer.json")
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            loaders["gpt2"] = partial(gpt2_tokenizer, name, folder / vocabulary, folder / merges)
    for vocabulary in BERT_FILES:
        if (folder / vocabulary).is_file():
            loaders["bert"] = partial(bert_tokenizer, name, folder / vocabulary)
    for model in sorted(folder.glob("*.model")):
        loaders[model.name] = partial(sentencepiece_tokenizer, name, model)
    return loaders


def _expected_files() -> dict[str, str]:
    return {
        "tokenizer.json": "tokenizer.json",
        "gpt2": " or ".join(" + ".join(pair) for pair in GPT2_FILES),
        "bert": " or ".join(BERT_FILES),
        "sentencepiece": "NAME.model",
    }


def _load_characters(path: Path) -> Tokenizer:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return CharacterTokenizer(description["name"], description["alphabet"], description.get("specials", ()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a character tokenizer: {error!r}") from None


def _load_symbols(path: Path) -> Tokenizer:
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["symbols"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer of symbols: {error!r}") from None
    return _symbols(str(path), str(size))


def _symbols(name: str, size: str) -> Tokenizer:
    if not (size.isascii() and size.isdigit() and len(size) <= 5 and 2 <= int(size) <= MOST_SYMBOLS):
        raise UserError(
            f"data.tokenizer {name!r}: {size[:20]!r} symbols; expected a number from 2 to {MOST_SYMBOLS}, such as "
            "'symbols:10'"
        )
    return SymbolTokenizer(int(size))


def _load_tokenizer_json(name: str, path: Path) -> Tokenizer:
    try:
        serialized = path.read_text(encoding="utf-8")
        return with_named_specials(name, tokenizers.Tokenizer.from_str(serialized), path.parent)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer of the tokenizers library: {error}") from None


def _load_from_hub(name: str) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # offline, unknown name, no tokenizer.json: the library raises bare Exception
        raise UserError(
            f"data.tokenizer {name!r}: not {', '.join(CHARACTERS)} or symbols:N, not a file or folder, not under "
            f"{ASSETS / name}, and could not be fetched from the Hugging Face hub ({first_line(error)}). "
            f"Put its files into {ASSETS / name}/ or give their folder as data.tokenizer: "
            f"{'; '.join(_expected_files().values())}"
        ) from None
    return with_named_specials(name, tokenizer, None)
