"""Selections computed before training: `dataflex-cli offline near|tsds|rds|ifd`."""
