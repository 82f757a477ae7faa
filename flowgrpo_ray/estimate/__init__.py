"""What a run will need, told before it starts: checks, FLOPs, memory of every process.

``preflight`` loads nothing heavy; ``footprint`` runs the network on shapes, without weights.
"""
