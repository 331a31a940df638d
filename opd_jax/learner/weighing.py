"""Which method weighs the student's tokens, and its settings: the config's section `weight`."""

import inspect
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.learner.weights import METHODS
from opd_jax.losses import NO_TURN, intervention_weight
from opd_jax.runtime import by as named
from opd_jax.runtime.fields import check_choice, check_within

# What a method may read (`opd_jax.learner.weights`).
LABELS = ("verdict", "reliability", "repeats")
OF_TEACHER = ("teacher_logprob", "teacher_top1_prob", "teacher_entropy")
OF_STUDENT = ("student_logprob", "student_entropy", "divergence")
# Settings of what is read.
_OF_READ = {
    "confidence_temperature": "teacher_top1_prob",
    "teacher_samples": "reliability",
    "teacher_labels": "reliability",
}
_GIVEN = frozenset([*LABELS, *OF_TEACHER, *OF_STUDENT, "sampled_logprobs", "num_turns"])


@dataclass(frozen=True)
class Weight:
    """A method's raw weight with its settings. Static under `jit`.

    Attributes:
      by: a name of `weights.METHODS`, or `module:function` of yours.
      skip_weight: the weight of SKIP turns; the paper's is 0.
      weak_weight: α, the weight of WEAK turns; STRONG has 1.
      fail_weight: the weight of turns that the environment rejected; the paper's is 1.
      confidence_temperature: temperature of the teacher's softmax in `teacher_top1_prob` only.
      entropy_bonus: added weight of tokens at which the teacher is uncertain.
      entropy_threshold: the teacher is uncertain above this entropy, nats.
      most_weight: bound on the weight of `sod`.
      discrepancy_eps: ε of `sod`, nats.
      early_bonus: γ of `iw_opd`.
      discount: γ of `return_to_go`.
      teacher_samples: own turns that the teacher takes at each turn, for `reliability`.
      teacher_labels: who labels those: "oracle", the environment that executes them, or "record",
        its rule over the record of the episode.
      options: further keyword arguments of a function of yours, as pairs, so that it hashes.
    """

    by: str
    skip_weight: float
    weak_weight: float
    fail_weight: float
    confidence_temperature: float
    entropy_bonus: float
    entropy_threshold: float
    most_weight: float
    discrepancy_eps: float
    early_bonus: float
    discount: float
    teacher_samples: int
    teacher_labels: str
    options: tuple[Any, ...] = ()

    def __post_init__(self):
        check_within(
            *(0, 1),
            skip_weight=self.skip_weight,
            weak_weight=self.weak_weight,
            fail_weight=self.fail_weight,
            discount=self.discount,
        )
        check_within(
            0,
            confidence_temperature=self.confidence_temperature,
            entropy_bonus=self.entropy_bonus,
            entropy_threshold=self.entropy_threshold,
            most_weight=self.most_weight,
            early_bonus=self.early_bonus,
        )
        check_within(1, teacher_samples=self.teacher_samples)
        check_choice(("oracle", "record"), teacher_labels=self.teacher_labels)
        check_within(1e-30, discrepancy_eps=self.discrepancy_eps)
        _ = self._arguments  # raises

    @cached_property
    def reads(self) -> frozenset[str]:
        """What the method takes besides its settings."""
        return _GIVEN.intersection(self._parameters)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it reads."""
        return tuple(name for name in LABELS if name in self.reads)

    @property
    def reads_verdict(self) -> bool:
        """Whether turns have to be judged."""
        return "verdict" in self.reads

    @property
    def reads_confidence(self) -> bool:
        """Whether it reads the teacher's top-1 probability."""
        return "teacher_top1_prob" in self.reads

    @property
    def reads_teacher(self) -> bool:
        """Whether it depends on the teacher's scores."""
        return not self.reads.isdisjoint(OF_TEACHER)

    @property
    def reads_student(self) -> bool:
        """Whether it depends on the student's scores.

        If not, weights are known before them, and one sweep of the heads makes scores and gradient
        (`losses.fused_loss`).
        """
        return not self.reads.isdisjoint(OF_STUDENT)

    def takes(self, setting: str) -> bool:
        """Whether the method, or what it reads, has such a setting."""
        if setting in _OF_READ:
            return _OF_READ[setting] in self.reads
        return setting in self._parameters

    def intervention(self, verdict: jax.Array) -> jax.Array:
        """`losses.intervention_weight` with these settings."""
        return intervention_weight(
            verdict,
            skip_weight=self.skip_weight,
            weak_weight=self.weak_weight,
            fail_weight=self.fail_weight,
        )

    def __call__(self, turn_id: jax.Array, **given: Any) -> jax.Array:
        """The raw weight s, float32 [B, R], 0 where `turn_id` is `NO_TURN`; no gradient.

        `given` has what the method reads; the arrays may hold anything where there is no token.
        """
        here = turn_id != NO_TURN
        arrays = {}
        for name in sorted(self.reads):  # in one order, so that all processes trace one program
            if name not in given:
                raise ValueError(
                    f"`weight.by` = {self.by!r} reads `{name}`, and the batch has no such label; "
                    "give it in `Batch.labels`"
                )
            arrays[name] = given[name]
        for name in sorted(self.reads.difference(LABELS, ["num_turns"])):
            arrays[name] = jnp.where(here, jax.lax.stop_gradient(arrays[name]), 0.0)
        s = self._function(turn_id, **arrays, **self._arguments)
        if jnp.shape(s) != turn_id.shape:
            raise ValueError(
                f"`weight.by` = {self.by!r}: expected a weight of each token, {turn_id.shape}, got "
                f"{jnp.shape(s)}; `losses.of_each_token` makes them of weights of turns"
            )
        return jnp.where(here, jax.lax.stop_gradient(s).astype(jnp.float32), 0.0)

    @cached_property
    def _function(self) -> Any:
        return named.find(self.by, METHODS, section="weight")

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        """The function's arguments after the first."""
        try:
            return tuple(inspect.signature(self._function).parameters)[1:]
        except (TypeError, ValueError):
            raise ValueError(
                f"`weight.by` = {self.by!r}: expected a function of (turn_id, *, …), as in "
                f"`learner.weights`; got {self._function!r}"
            ) from None

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """The settings that the function takes."""
        taken = {n: getattr(self, n) for n in self._parameters if n in WEIGHT_SETTINGS}
        taken |= dict(self.options)
        rest = partial(self._function, None, **dict.fromkeys(self.reads))
        named.check_arguments(self.by, rest, taken, section="weight")
        return taken


# The fields that a method may take.
WEIGHT_SETTINGS = tuple(f.name for f in fields(Weight) if f.name not in ("by", "options"))
