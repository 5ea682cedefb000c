"""Policies that LeRobot publishes, in its own format: SmolVLA and pi0. They need neither LeRobot nor a GPU.

``files`` reads and writes checkpoints, ``smolvla`` and ``pi0`` are networks, and ``policy`` makes a
``Policy`` of one.
"""
