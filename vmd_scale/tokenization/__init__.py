"""Text to token ids and back, behind one small interface.

The mask symbol of the diffusion belongs to no tokenizer: it is always the id ``vocab_size``, one past the last.
"""

from vmd_scale.tokenization.characters import CharacterTokenizer, SymbolTokenizer
from vmd_scale.tokenization.exported import TOKENIZER_FILES
from vmd_scale.tokenization.interface import Tokenizer, checked_ids
from vmd_scale.tokenization.loading import KEPT, keep_tokenizer, kept_tokenizer, load_tokenizer, vocab_size_of
from vmd_scale.tokenization.sentences import SentencePieceTokenizer
from vmd_scale.tokenization.subword import SubwordTokenizer

__all__ = [
    "KEPT",
    "TOKENIZER_FILES",
    "CharacterTokenizer",
    "SentencePieceTokenizer",
    "SubwordTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "checked_ids",
    "keep_tokenizer",
    "kept_tokenizer",
    "load_tokenizer",
    "vocab_size_of",
]
