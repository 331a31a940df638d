"""The teacher's verdicts of an update, and when it is asked in the other decoding too."""

import pytest
from settings import one_device, read

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.config import build
from opd_jax.config.models import load_teacher
from opd_jax.envs.base import Task


@pytest.mark.usefixtures("compile_quickly")
def test_the_other_decoding_is_asked_every_so_many_updates(small: tuple[str, ...]) -> None:
    turns = [Turn("seen", (), "Action: go", "stop_token", "go", "", "heard", "")]
    played = [Conversation(Task("id", "type", "goal", "scene"), end="success", turns=turns)]
    verdicts, asked = set(), []
    for every in (2, 0):
        settings = read("quickstart:runlocal", *small, f"judge.agreement_every={every}")
        label = build.make_labeller(settings, load_teacher(settings, one_device()))
        for update in range(3):
            verdict, metrics = label(played, update)
            assert metrics["judge/asked"] == (1, 1)
            # Without labels of an oracle nothing is said of precision.
            assert not any(name.startswith(("judge/precision", "judge/recall")) for name in metrics)
            verdicts.add(str(verdict))
            if "judge/decodings_agree" in metrics:
                asked.append((every, update))
                assert "judge/unparsable_generate" in metrics
    assert asked == [(2, 0), (2, 2)]
    # The second decoding is compared with the first. Verdicts stay those of the first.
    assert len(verdicts) == 1
