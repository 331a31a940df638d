"""Every method by name: the fields that it sets, what its paper reports, what we expected here.

This is no config. `quickstart` and the paper's configs take a method by `method=NAME`, and a
comparison several by `--config.compare.methods=opd,failures,sod`.

Figures of papers come from their own protocols. What was measured here is in docs/results.md.
"""

from typing import Any

# Every field in which methods differ, with SAGE-OPD's value.
_SAGE: dict[str, dict] = dict(
    weight=dict(by="sage", skip_weight=0.0, fail_weight=1.0, teacher_labels="oracle"),
    objective=dict(divergence="reverse_kl", normalize="all_tokens", teacher_turns=""),
    data=dict(source="on_policy", only_success=False),
    rollout=dict(
        per_task=1,
        depth_start=0,
        depth_from="front",
        teacher_share=0.0,
        take_over_after=0,
        cut_repeated_failure=False,
    ),
)


def method(**changes: dict) -> dict[str, dict]:
    """A method. It sets every field in which methods differ, so none of the base's method is left.

    But of the judge it sets only what it needs: the base of a comparison chooses the rest.
    """
    return changes | {group: _SAGE[group] | changes.get(group, {}) for group in _SAGE}


_UNIFORM = dict(by="uniform")
_UNSCALED = dict(normalize="none")
_BY_FORWARD_KL = dict(teacher_turns="forward_kl")
# Of `tcod_b2f` (docs/rollouts.md makes it). A run takes another by --config.data.source=, a
# comparison by --config.compare.variants.tcod_b2f.data.source=, each prefixes:FILE.
TEACHERS_EPISODES = "runs/quickstart/episodes/teacher-train.jsonl"
_CONTROLS = "opd_jax.configs.controls"

METHODS: dict[str, Any] = {
    # --- Baselines ---
    # Fine-tuning on the teacher's own episodes. SAGE-OPD: 26.1 on ALFWorld, unseen, 1.7B from 8B.
    # Expected: below OPD.
    "sft": method(
        weight=_UNIFORM,
        objective=dict(divergence="cross_entropy"),
        data=dict(source="teacher"),
    ),
    # The same on those that succeeded. Expected: above sft.
    "sft_success": method(
        weight=_UNIFORM,
        objective=dict(divergence="cross_entropy"),
        data=dict(source="teacher", only_success=True),
    ),
    # Rejection fine-tuning: on the student's own episodes that succeeded, without a teacher.
    # Expected: below OPD.
    "rft": method(
        weight=_UNIFORM,
        objective=dict(divergence="cross_entropy"),
        data=dict(only_success=True),
    ),
    # On-policy distillation: every token has weight 1. SAGE-OPD: 61.9 there.
    "opd": method(weight=_UNIFORM),
    # --- SAGE-OPD (arXiv 2606.19659) and one factor of z · i · c off ---
    # 70.2 there, 1.7B from 8B. Expected: above OPD.
    "sage": method(),
    # Its judge sees what the paper's sees, whatever the base shows. Expected: below OPD.
    "sage_table9": method(judge=dict(context="table9")),
    "sage_without_intervention": method(weight=dict(by="confidence")),
    "sage_without_confidence": method(weight=dict(by="intervention")),
    "sage_without_normalizer": method(objective=_UNSCALED),
    # --- Ours ---
    # Nothing is learnt where the environment rejected the student; no judge. Expected after a first
    # table: above OPD.
    "failures": method(
        weight=dict(by="intervention", skip_weight=1.0, fail_weight=0.0),
        judge=dict(by="failures"),
    ),
    # SAGE that skips what failed as well. Expected: as good as its judge.
    "sage_fail0": method(weight=dict(by="sage", fail_weight=0.0)),
    # Both with other judges: the environment's labels, and the rule over its record. Expected: with
    # failures at 1 below OPD, at 0 above; the rule nearly as good as the labels.
    **{
        f"{name}_{judge}": method(weight=dict(by="sage", fail_weight=weight), judge=dict(by=judge))
        for name, weight in (("sage", 1.0), ("sage_fail0", 0.0))
        for judge in ("oracle", "record")
    },
    # How often the teacher's own turn is accepted: an oracle. Expected: as good as `failures`.
    "reliability": method(weight=dict(by="reliability")),
    # The same without an oracle: the teacher's turn is sampled, and the environment's rule over the
    # record judges it. Expected: near `reliability`.
    "reliability_proxy": method(weight=dict(by="reliability", teacher_labels="record")),
    # Discounted log-ratios of later turns. Expected: near OPD.
    "return_to_go": method(weight=dict(by="return_to_go")),
    # --- Controls of `failures` and `sage_fail0` (`controls`) ---
    # Expected: `failures` without its gain; all of its gain; none of it.
    "drop_accepted": method(
        weight=dict(by="intervention"), judge=dict(by=f"{_CONTROLS}:drop_accepted")
    ),
    "drop_first_failures": method(
        weight=dict(by=f"{_CONTROLS}:first_failures"), judge=dict(by="failures")
    ),
    "drop_repeated_failures": method(
        weight=dict(by=f"{_CONTROLS}:repeated_failures"), judge=dict(by="failures")
    ),
    # The weight of a rejected turn is how often the teacher's own turn there is right, or wrong.
    # Expected: the first as good as `failures`; the second below OPD, if its advice is what harms.
    **{
        f"keep_{which}_failures": method(
            weight=dict(by=f"{_CONTROLS}:{which}_failures"), judge=dict(by="failures")
        )
        for which in ("right", "wrong")
    },
    # Expected: below `sage_fail0_oracle`.
    "sage_fail0_shuffled": method(
        weight=dict(by="sage", fail_weight=0.0), judge=dict(by=f"{_CONTROLS}:shuffled")
    ),
    # --- Other papers' weights ---
    # The teacher's entropy over its top K tokens there, K not stated; here over the vocabulary.
    # SAGE-OPD: 79.1 on ALFWorld, unseen, 1.7B from 32B. Expected: near OPD.
    "entropy_aware": method(weight=dict(by="entropy_aware"), objective=_UNSCALED),
    # SOD (arXiv 2605.07725), without its reward: 36.3 to 43.0 on mathematics and code. A third
    # party has it below OPD on ScienceWorld (3.8). Expected: below OPD, since it shrinks weights.
    "sod": method(weight=dict(by="sod"), objective=_UNSCALED),
    # IW-OPD (arXiv 2606.22600), on single turns. Expected: near OPD.
    "iw_opd": method(weight=dict(by="iw_opd"), objective=_UNSCALED),
    # --- Other rollouts ---
    # Half as many tasks an update: the teacher scores as many episodes as in the other methods.
    "opd_two_rollouts": method(weight=_UNIFORM, rollout=dict(per_task=2)),
    # TCOD-F2B (arXiv 2604.24005): 60.5 to 79.2 on ALFWorld, unseen, 3B. Expected: above OPD.
    "tcod_f2b": method(weight=_UNIFORM, rollout=dict(depth_start=1, depth_every=1)),
    # TCOD-B2F: the student plays the last turns of the teacher's successful episodes, in update n
    # 1 + ⌊n / 2⌋ of them, behind a replay of those before. 75.4 to 86.4 on ALFWorld, seen, 7B; a
    # third party has it above OPD by 4. The file is made as docs/rollouts.md says. Expected: above
    # OPD.
    "tcod_b2f": method(
        weight=_UNIFORM,
        data=dict(source=f"prefixes:{TEACHERS_EPISODES}", only_success=True),
        rollout=dict(depth_start=1, depth_every=2, depth_from="back"),
    ),
    # Guided-OPD (arXiv 2606.15912): a turn is the teacher's with a probability that falls from 1 to
    # 0 along a cosine over 0.8 of the updates, and is learnt by forward KL there. 26.9 to 29.9 on
    # ALFWorld, OOD, 1.7B from 30B; of its mean success 16.1 to 19.9, a linear fall leaves 17.0 and
    # forward KL everywhere 17.0. A third party has it near OPD (20.8 and 20.1 on ALFWorld).
    # Expected: above OPD early, near it at the end.
    "guided": method(
        weight=_UNIFORM,
        objective=_BY_FORWARD_KL,
        rollout=dict(teacher_share=1.0, teacher_share_for=0.8),
    ),
    # Ours. After three failures in a row the teacher shows the way out, from where the student came
    # to. Expected: fewer repeated failures than OPD.
    "take_over": method(weight=_UNIFORM, objective=_BY_FORWARD_KL, rollout=dict(take_over_after=3)),
    # Ours. Nothing is played or learnt behind a repeated failure, where the student is lost and the
    # teacher advises worst. Expected: as good as OPD, and fewer tokens.
    "cut_repeated": method(weight=_UNIFORM, rollout=dict(cut_repeated_failure=True)),
}

# What `configs/quickstart.py:compare` runs: the paper's method, its ablation and two baselines.
ABLATION = (
    *("sft", "opd", "sage"),
    *(f"sage_without_{factor}" for factor in ("intervention", "confidence", "normalizer")),
)


def name_of(method: str, ablate: str) -> str:
    """The method that the arguments of a config name.

    Raises:
      ValueError: there is none.
    """
    name = method if ablate == "none" else f"{method}_without_{ablate}"
    if name not in METHODS:
        raise ValueError(
            f"config argument `method={method},ablate={ablate}`: expected method "
            f"{', '.join(n for n in METHODS if '_without_' not in n)}, and ablate intervention, "
            "confidence or normalizer with sage only"
        )
    return name
