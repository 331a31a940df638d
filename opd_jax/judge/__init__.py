"""The teacher as a judge: a verdict for every turn.

- `prompt`: what it is shown. `answer`: how it answers. `verdicts`: all turns of a batch.
- `labels`: what the environment says of turns. `agreement`: how far the judge agrees with it.
- `labellers`: who gives the verdicts of an update.
"""
