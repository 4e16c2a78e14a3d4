"""Proof that zoo computes what the reference implementations compute: `python -m tests.parity`."""
