"""The keys of `metrics.jsonl`: one table, which the README shows and a run's lines are held to."""

import re
from typing import NamedTuple


class Key(NamedTuple):
    """A row of the table.

    Attributes:
      names: names, separated by blanks. `a/{b,c}` is two of them, and `*` stands for any word: an
        environment names the ends of its episodes itself.
      what: what it is, with its unit.
      healthy: the range that it has in a healthy run of the quickstart.
    """

    names: str
    what: str
    healthy: str


KEYS = (
    Key(
        "loss", "Σ weight · divergence / N, nats a student token", "OPD: falls. SAGE: moves with z"
    ),
    Key(
        "divergence by_turn/divergence",
        "mean without weights, nats",
        "falls: 1.4 to 0.3",
    ),
    Key("z", "N / Σ s", "OPD: 1. SAGE: 1.5 to 4"),
    Key("raw_weight by_turn/raw_weight", "mean of s, in SAGE i · c", "1 / z"),
    Key("active_tokens", "share of tokens with a weight above 0", "0.3 to 0.7"),
    Key("confidence by_turn/confidence", "mean of c over turns", "0.94 to 0.98"),
    Key(
        "{student,teacher}_entropy",
        "mean over tokens, nats",
        "0.05 to 0.25; both near 0: collapsed",
    ),
    Key(
        "logprob_error",
        "largest difference, sampled and recomputed log-probability",
        "float32 3e-5, bfloat16 .05",
    ),
    Key(
        "grad_norm update_norm",
        "norms: gradient before the clip; change of parameters",
        "0.5 to 3; 0.05 to 0.25",
    ),
    Key("learning_rate", "the rate of this update", "as `optimizer.schedule` says"),
    Key(
        "{verdict,by_turn}/{skip,weak,strong,det_fail}",
        "shares of turns",
        "`skip` rises, .3 to .75",
    ),
    Key("no_step", "1 if no token had a weight: the student was left as it was", "0"),
    Key("judge/asked", "share of turns that the judge was asked about", "1 − `det_fail`"),
    Key(
        "judge/too_long",
        "share of turns whose question does not fit the teacher: STRONG, not asked",
        "0",
    ),
    Key(
        "judge/unparsable{,_generate,_constrained}",
        "share of answers that are none of the words",
        "0",
    ),
    Key(
        "judge/decodings_agree",
        "scored and generated verdicts agree; now and then, on a sample",
        "above 0.95",
    ),
    Key(
        "judge/{precision,recall}",
        'of "needs correction", by the environment\'s labels',
        ".53 and .10: poor",
    ),
    Key("judge/{corrected,wrong}", "denominators of precision and recall", ""),
    Key(
        "judge/recall_{skip,weak,strong}",
        "share of turns of this label with this verdict",
        "chance: 1/3",
    ),
    Key(
        "reliability/{asked,right,failed,read,sampled}{,_*}",
        "`weight.by=reliability`: turns asked; the teacher's own right, rejected; its tokens",
        "docs/reliability.md",
    ),
    Key(
        "eval/dev/*",
        "on tasks of their own, every `eval.every` updates: figures as in `summary.json`, in a "
        "line of their own",
        "success rises",
    ),
    Key("batch/{success,score,turns}", "means over the batch's episodes", "success rises"),
    Key(
        "batch/{repeated,failed,by_teacher,replayed}",
        "shares of turns, as in the table above, or by who wrote them",
        "`repeated` falls; `failed` below 0.5",
    ),
    Key(
        "end/{success,turn_limit,context,*}",
        "shares of episodes by end",
        "`context`, `broken`: 0",
    ),
    Key(
        "stop/{stop_token,turn_budget,context,invented_turn}",
        "shares of turns by why sampling stopped",
        "`stop_token` above 0.99",
    ),
    Key(
        "tokens/{student,seen,sampled,sequence,teacher,by_teacher,read_by_teacher,judge} "
        "by_turn/turns",
        "N; its sum so far; sampled to learn from; all; read by a teacher that is told more; "
        "sampled by the teacher in the student's place, and read for that; read by the judge; "
        "episodes with this turn",
        "steady",
    ),
    Key(
        "padded/{reading,reading_by_teacher,sampling,judging,update}",
        "share of the positions computed that hold no token",
        "0.2 to 0.5",
    ),
    Key(
        "seconds/{rollout,judge,episodes,update,compile} tokens_per_s/{rollout,update}",
        "time without compiling; speed",
        "steady",
    ),
    Key("wall_s", "seconds that the run has taken, evaluations included, over all starts", ""),
    Key(
        "first/{token,update}",
        "seconds from a start, after imports, to the first sampled token, of an evaluation if one "
        "comes first, and to the first update; in its first line",
        "steady",
    ),
    Key(
        "peak_gib/{device,host}",
        "most memory so far, GiB: of the first process's fullest device (not on CPUs); its RSS",
        "steady",
    ),
)


def expanded(names: str) -> list[str]:
    """The single names of a `Key.names`."""
    found = []
    for name in names.split():
        before, brace, rest = name.partition("{")
        if not brace:
            found.append(name)
            continue
        words, _, after = rest.partition("}")
        found += [n for word in words.split(",") for n in expanded(before + word + after)]
    return found


def defined(name: str) -> bool:
    """Whether the table has a metric."""
    patterns = [pattern.replace("*", r"\w+") for key in KEYS for pattern in expanded(key.names)]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def markdown() -> str:
    """The table as the README shows it."""
    rows = ["| key | what it is | healthy |", "| --- | --- | --- |"]
    for names, what, healthy in KEYS:
        shown = ", ".join(f"`{name}`".replace("*", "…") for name in names.split())
        rows.append(f"| {shown} | {what} | {healthy} |".replace("|  |", "| |"))
    return "\n".join(rows)
