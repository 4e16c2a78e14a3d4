"""Tasks: how each kind of model is fed, measured and reported. The trainer is the same for all."""
