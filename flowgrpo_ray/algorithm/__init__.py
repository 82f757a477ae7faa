"""The mathematics and the update: one step as a Gaussian, the objective, sampling, the learner.

Torch and NumPy alone: tensors in, tensors out; no Ray, no files of a run, no reward. ``flow``,
``objective`` and ``advantages`` are the formulas, ``sampling`` draws and replays with them,
``learner`` updates the weights, ``optimizer`` and ``weights`` are its parts. This file and
``advantages`` load without torch.
"""
