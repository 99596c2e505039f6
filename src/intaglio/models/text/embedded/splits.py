"""Pre-tokenization of byte-level BPE: how text is split before merging, by tokenizer.ggml.pre (llama-vocab.cpp).

The patterns are those of the models' own tokenizer.json where llama.cpp's differ: its regex library lacks some
character classes, so it approximates them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """Returns the regular expression with which GPT-4's tokenizer (cl100k) splits text.

    Each match is a piece of the text. digits: quantifier of a run of digits, such as {1,3}; "": each digit is a piece.
    """
    return rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def _o200k(end: str, digits: str, less: str = "", tail: str = r"[\r\n/]*") -> str:
    """Returns the regular expression with which GPT-4o's tokenizer (o200k) splits text.

    Each match is a piece of the text. A capital after small letters begins a new piece.

    Args:
        end: pattern that may follow at the end of each word, such as an optional 's or 'll.
        digits: quantifier of a run of digits, such as {1,3}; "": each digit is a piece.
        less: regex text that excludes characters from the letters: &&[^x] excludes x. It is put at the end of each
            character class of letters. "": no letter is excluded.
        tail: pattern of what may follow a run of punctuation.
    """
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{less}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{less}]"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+{tail}|{SPACES}"


_CASED = (  # letters that have capitals, as DeepSeek lists them: single code points and ranges
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)


def _points(listed: str) -> str:
    r"""Turn a list of characters into the text that stands between [ and ] in a regular expression.

    listed: hexadecimal code points and ranges, separated by spaces. "41-5A 5F" gives \x{41}-\x{5A}\x{5F}.
    """
    return "".join("-".join(rf"\x{{{p}}}" for p in part.split("-")) for part in listed.split())


HAN = "[一-龥ࠀ-一가-퟿]+"
KANA = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"""
)
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # digits in threes, counted from the last
ASIAN = "4E00-9FFF 3400-4DBF 8C48-FAFF 3040-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F AA60-AA7F "
ASIAN += "A9E0-A9FF AC00-D7AF 1100-11FF"


@dataclass(frozen=True)
class Splits:
    """Pre-tokenization of one model family: how text is split into pieces before BPE merges.

    Attributes:
        patterns: regular expressions that are applied one after the other. Each match becomes a piece.
        digits: when every digit is split off: "first" (before the patterns), "last" (after the patterns) or "" (never).
        gpt2: True to apply GPT-2's pattern after all others.
        nfc: True to normalise text to Unicode NFC first.
        whole: True if a piece that is a token itself becomes that token without merging (ignore_merges).
    """

    patterns: tuple[str, ...] = ()
    digits: str = ""
    gpt2: bool = False
    nfc: bool = False
    whole: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        own = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
        steps = [*digits, *own] if self.digits == "first" else [*own, *digits]
        return pre_tokenizers.Sequence([*steps, byte_level])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_LLAMA3 = Splits((_cl100k("{1,3}"),), whole=True)
_CL100K = Splits((_cl100k("{1,3}"),))
_QWEN2 = Splits((_cl100k(""),), nfc=True)
_GPT2 = Splits(gpt2=True)
_GPT2_NFC = Splits(gpt2=True, nfc=True)
_STARCODER = Splits(digits="first", gpt2=True)
_O200K = Splits((_o200k(f"{CONTRACTION}?", "{1,3}"),))
_DEEPSEEK3 = Splits((r"\p{N}{1,3}", KANA, DEEPSEEK3))
_AFMOE = Splits((THREES, f"[{_points(ASIAN)}]+", DEEPSEEK3))
_KIMI = _o200k(f"{CONTRACTION}?", "{1,3}", r"&&[^\p{Han}]", r"[\r\n]*")
_LLM = (r"[\r\n]", rf"\s?[{_points(_CASED)}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN)
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_SEED = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NAMES: tuple[tuple[str, Splits], ...] = (
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5", _LLAMA3),
    ("dbrx smaug-bpe chatglm-bpe", _CL100K),
    ("qwen2 deepseek-r1-qwen kormo megrez stablelm2", _QWEN2),
    ("hunyuan solar-open grok-2", Splits((_cl100k(""),))),
    ("qwen35", Splits((f"{CONTRACTION}|{_MARKED}|{SPACES}",))),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling", _GPT2),
    ("mpt olmo", _GPT2_NFC),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _STARCODER),
    ("command-r", Splits(digits="first", gpt2=True, nfc=True)),
    ("gpt-4o llama4 kanana2 minimax-m2", _O200K),
    ("tekken", Splits((_o200k("", ""),), whole=True)),
    ("deepseek-v3 hunyuan-dense joyai-llm", _DEEPSEEK3),
    ("afmoe", _AFMOE),
    ("deepseek-llm", Splits(_LLM, digits="last")),
    ("deepseek-coder", Splits((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN), digits="last")),
    ("kimi-k2", Splits((rf"[\p{{Han}}]+|{_KIMI}",))),
    ("poro-chat bloom gpt3-finnish", Splits((_BLOOM,))),
    ("viking", Splits((_BLOOM,), digits="last")),
    ("seed-coder", Splits((f"{CONTRACTION}|{_SEED}|{SPACES}",))),
)
SPLITS: dict[str, Splits] = {name: own for names, own in _NAMES for name in names.split()}


class Falcon(Splits):
    """Pre-tokenization of Falcon, in four steps.

    It splits off runs of punctuation; applies GPT-2's pattern, which also turns bytes into GPT-2's characters for
    bytes; splits off runs of digits; and splits these runs into groups of three digits.
    """

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )


SPLITS["falcon"] = Falcon()
SPLITS["default"] = Falcon()  # what llama.cpp takes files without a name for
