"""A model that acts: chat format, conversations, generation, and the loop over environments.

- `chat`, `conversation`, `history`: what is said, on the host, token by token.
- `generate`: the compiled programs. `session`: the cache between their calls.
- `rollout`: a batch of episodes, turn by turn.
"""
