"""How an answer is compared with the accepted ones: exact match and F1 after normalization.

Source: the normalization of Search-R1 (Jin et al., 2025, arXiv:2503.09516), which is SQuAD's
(Rajpurkar et al., 2016, arXiv:1606.05250); F1 with HotpotQA's rule for yes and no (Yang et al.,
2018, arXiv:1809.09600).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
# Sharing a word with one of these is no partial credit.
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether `answer` equals one of the accepted answers after normalization."""
    return normalize(answer) in {normalize(gold) for gold in accepted}


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 of the answer's words against an accepted answer's, in 0..1.

    F1 = 2PR / (P + R) over words with repetition: P is the share of the answer's words that are in
    the accepted answer, R the share of the accepted answer's words that are in the answer.
    """
    return max(_f1(normalize(answer), normalize(gold)) for gold in accepted)


def _f1(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0
    if answer in _CLOSED or gold in _CLOSED:
        return 0.0
    common = (Counter(answer.split()) & Counter(gold.split())).total()
    return 2 * common / (len(answer.split()) + len(gold.split()))
