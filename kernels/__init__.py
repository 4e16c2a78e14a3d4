"""Operators shared by the models: one file each, a plain-torch reference beside every fast form."""
