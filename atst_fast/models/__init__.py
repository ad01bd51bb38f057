"""Encoders and the two-network systems."""
