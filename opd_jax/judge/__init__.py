"""The teacher as a judge: a verdict for every turn.

- `prompt`: the question. `answer`: how it is answered. `verdicts`: all turns of a batch.
- `labels`: the environment's labels of turns. `agreement`: how far the judge agrees with them.
- `labellers`: who gives the verdicts of an update.
"""
