"""The teacher as a judge: a verdict for every turn.

- `prompt`: the question. `answer`: who answers it, and how. `verdicts`: all turns of a batch.
- `others`: verdicts without a model, from the environment's labels or a function of the user's.
- `labels`: what is said of every turn of a batch, as arrays: by the environment, and by the judge.
- `agreement`: how far the two agree.
"""
