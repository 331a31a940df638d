"""A model that acts: chat format, conversations, generation, and the loop over environments.

- `chat`, `conversation`, `history`: what is said, on the host, token by token.
- `generate`: the compiled programs. `contexts`: the cache between their calls. `session`: the
  responses under way.
- `environments`: what the environments of a batch are asked. `rollout`: the loop over both.
"""
