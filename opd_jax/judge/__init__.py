"""The teacher as a judge: a verdict for every turn.

- `prompt`: what it is shown. `answer`: how it answers.
- `verdicts`: the batch of all turns. `agreement`: verdicts against an environment's own labels.
"""
