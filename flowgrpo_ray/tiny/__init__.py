"""The embedded models, 2.2 million parameters each: one draws coloured signs, one recolours them.

``assets/`` has their weights and prompts, which ``builtin:`` names in a spec; ``build`` and
``build_edit`` make them.
"""
