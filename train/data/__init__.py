"""Data sets: reading them, checking them before the first step, and the transforms in front of a model."""
