"""Comparison of an answer with the accepted ones: exact match and F1 after normalization.

Source: Search-R1 (Jin et al., 2025, arXiv:2503.09516), which normalizes as SQuAD does (Rajpurkar et
al., 2016, arXiv:1606.05250). F1 follows HotpotQA's rule for yes and no (Yang et al., 2018,
arXiv:1809.09600).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
# These answers are right or wrong; sharing a word with one earns no partial credit.
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """The text in lower case and single spaces, without ASCII punctuation and English articles."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether `answer` equals one of the accepted answers after normalization."""
    return normalize(answer) in {normalize(gold) for gold in accepted}


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 between the words of the answer and of an accepted answer, in 0..1.

    F1 = 2PR / (P + R). P is the share of the answer's words that are in the accepted answer, R the
    share of the accepted answer's words that are in the answer. Repeated words count each time.
    """
    return max(_f1(normalize(answer), normalize(gold)) for gold in accepted)


def _f1(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0
    if answer in _CLOSED or gold in _CLOSED:
        return 0.0
    common = (Counter(answer.split()) & Counter(gold.split())).total()
    return 2 * common / (len(answer.split()) + len(gold.split()))
