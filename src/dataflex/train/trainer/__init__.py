"""Trainers: mixins in front of any `transformers.Trainer` subclass."""
