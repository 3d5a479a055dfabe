"""A module whose TUNER is no tuner."""

TUNER = object
