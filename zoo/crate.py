"""The crate family."""
