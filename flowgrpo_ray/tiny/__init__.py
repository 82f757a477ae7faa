"""The embedded model: a text-to-image model of 2.2 million parameters that draws coloured signs.

``assets/`` has its weights and prompts, which ``builtin:`` names in a spec; ``build`` makes them.
"""
