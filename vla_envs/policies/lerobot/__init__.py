"""Policies that LeRobot publishes, in its own format: SmolVLA. It needs torch, and neither LeRobot nor a GPU.

``files`` reads and writes checkpoints, ``smolvla`` is a network, and ``policy`` makes a ``Policy`` of one.
"""
