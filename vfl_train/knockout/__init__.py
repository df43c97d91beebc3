"""Layers that interfere with a task: measured, one chosen or none, held out, written down."""
