"""Profiles: how often an output changes when the image is swapped or dropped at each layer."""
