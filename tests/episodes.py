"""Episode files for tests, drawn at random: what is in them is known, and nothing is trained."""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [" take", " the", " mug", " from", " desk", " 1", " go", " to", " fridge", ":", " clean"]
VERDICTS = ("SKIP", "WEAK", "STRONG")


def write_episodes(path: Path, episodes: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return path


def episode(
    seed: int,
    *,
    verdicts: Sequence[str] = ("WEAK", "SKIP", "DET_FAIL"),
    tokens_per_turn: int = 12,
    top: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """An episode with a turn for each verdict; `fields` replace those of its line."""
    rng = random.Random(seed)
    messages = [{"role": "system", "content": "You are in a household."}]
    turns, turn_of, texts = [], [-1] * 5, []
    for k, verdict in enumerate(verdicts):
        pieces = [rng.choice(WORDS) for _ in range(tokens_per_turn - 1)] + ["<|end|>"]
        messages.append({"role": "user", "content": f"Observation {k} of episode {seed}."})
        messages.append({"role": "assistant", "content": "".join(pieces[:-1])})
        scores = [-rng.expovariate(1) for _ in VERDICTS]
        turns.append(
            {
                "actor": "student",
                "action": "".join(pieces[:3]).strip(),
                "failure": "unknown_action" if verdict == "DET_FAIL" else "",
                "stop": "stop_token",
                "label": rng.choice(VERDICTS),
                "verdict": verdict,
                "judge": dict(zip(VERDICTS, scores, strict=True)),
                "intervention": {"SKIP": 0.0, "WEAK": 0.5}.get(verdict, 1.0),
                "confidence": 0.8,
            }
        )
        turn_of += [k] * len(pieces) + [-1] * 5
        texts += pieces
    position = [i for i, turn in enumerate(turn_of) if turn >= 0]
    messages.append({"role": "user", "content": "Nothing happens."})
    return {
        "messages": messages,
        "task": {"split": "train", "index": seed, "id": f"train-{seed}", "kind": "clean"},
        "who": "train",
        "update": 10,
        "end": "turn_limit",
        "success": False,
        "score": 0.0,
        "measures": {},
        "z": 1.6,
        "turns": turns,
        "tokens": {
            "id": [rng.randrange(500) for _ in turn_of],
            "turn": turn_of,
            "sampled_logprob": [-rng.random() if turn >= 0 else 0 for turn in turn_of],
        },
        "student_tokens": {
            "position": position,
            "text": texts,
            **_scores(rng, texts, [turns[turn_of[p]] for p in position], top=top),
        },
        **fields,
    }


def _scores(
    rng: random.Random, texts: Sequence[str], turns: Sequence[Mapping[str, Any]], *, top: bool
) -> dict[str, list]:
    divergence = [min(rng.expovariate(3), 4.0) ** 2 for _ in texts]
    student = [-rng.random() * 0.3 for _ in texts]
    teacher = [s - d + 0.2 for s, d in zip(student, divergence, strict=True)]
    columns: dict[str, list] = {
        "student_logprob": student,
        "teacher_logprob": teacher,
        "divergence": divergence,
        "weight": [1.6 * turn["intervention"] * turn["confidence"] for turn in turns],
        "agrees": [d < 0.3 for d in divergence],
    }
    if top:
        columns["top"] = [
            [[text, math.exp(t), math.exp(s)], *([word, 0.05, 0.02] for word in WORDS[:4])]
            for text, t, s in zip(texts, teacher, student, strict=True)
        ]
    return {
        name: [round(x, 5) if isinstance(x, float) else x for x in column]
        for name, column in columns.items()
    }
